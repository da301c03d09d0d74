"""MaskNet (InterFormer Eq. 6): makes one sequence of k aligned fields, and damps what is noise in it."""

# B batch  T events  E concatenated fields' dims  d token dim
from typing import Literal

from torch import Tensor, nn

from dlrm_scale.models.layers import linear


class MaskNet(nn.Module):
    """MLP_lce(S * MLP_mask(S)), event by event: (B, T, E) -> (B, T, d).

    The mask starts at 1 (its last bias), so that at first all fields pass. The paper's text names no output activation;
    `sigmoid` is what most public ports have.
    """

    def __init__(self, in_dim: int, dim: int, ratio: float, activation: Literal["none", "sigmoid"]) -> None:
        super().__init__()
        hidden = max(1, round(ratio * in_dim))
        expand = linear(hidden, in_dim)
        nn.init.ones_(expand.bias)
        output = nn.Sigmoid() if activation == "sigmoid" else nn.Identity()
        self.mask = nn.Sequential(linear(in_dim, hidden), nn.SiLU(), expand, output)
        self.mix = linear(in_dim, dim)

    def forward(self, events_BTE: Tensor) -> Tensor:
        return self.mix(events_BTE * self.mask(events_BTE))

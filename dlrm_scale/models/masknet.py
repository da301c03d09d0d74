"""MaskNet (InterFormer Eq. 6): makes one sequence of k aligned fields, and damps what is noise in it."""

# B batch  T events  E concatenated fields' dims  d token dim
from typing import Literal

import torch
from torch import Tensor, nn

from dlrm_scale.models.layers import linear


class MaskNet(nn.Module):
    """MLP_lce(S * MLP_mask(S)), event by event: (B, T, E) -> (B, T, d).

    The mask starts at 1 (its last bias), so that at first all fields pass. The paper's text names no output activation;
    `sigmoid` is what most public ports have. The mixing matrix starts as the fields' sum over sqrt(k), so that an event starts
    in the space of its embeddings, where a dot product with a feature of the same table means something: on Amazon reviews
    that is worth 0.01 to 0.02 of AUC over a random start (docs/results/first_runs.md).
    """

    def __init__(self, num_fields: int, dim: int, ratio: float, activation: Literal["none", "sigmoid"]) -> None:
        super().__init__()
        in_dim = num_fields * dim
        hidden = max(1, round(ratio * in_dim))
        expand = linear(hidden, in_dim)
        nn.init.ones_(expand.bias)
        output = nn.Sigmoid() if activation == "sigmoid" else nn.Identity()
        self.mask = nn.Sequential(linear(in_dim, hidden), nn.SiLU(), expand, output)
        self.mix = linear(in_dim, dim)
        with torch.no_grad():
            self.mix.weight.copy_(torch.eye(dim).repeat(1, num_fields) / num_fields**0.5)

    def forward(self, events_BTE: Tensor) -> Tensor:
        return self.mix(events_BTE * self.mask(events_BTE))

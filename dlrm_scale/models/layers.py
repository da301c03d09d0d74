"""Small pieces that every dense arch is made of.

Linear layers start Xavier-normal with zero bias, as in the framework of the InterFormer paper's benchmarks. Norms have a tiny
epsilon: embedding tables may start at 1e-2 or 1e-4, and a larger one would shrink such tokens instead of normalising them.
"""

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional

NORM_EPS = 1e-10


class Linear(nn.Linear):
    """`product`: (..., I), weight (O, I), bias (O,) or None -> (..., O); kernels.py sets another."""

    product = staticmethod(functional.linear)

    def forward(self, x: Tensor) -> Tensor:
        return self.product(x, self.weight, self.bias)


def linear(in_features: int, out_features: int, bias: bool = True) -> Linear:
    layer = Linear(in_features, out_features, bias=bias)
    nn.init.xavier_normal_(layer.weight)
    if bias:
        nn.init.zeros_(layer.bias)
    return layer


def mlp(widths: Sequence[int], activation: type[nn.Module], dropout: float = 0.0) -> nn.Sequential:
    """Linear layers of `widths[0] -> widths[1] -> ...`; activation and dropout after all but the last."""
    layers: list[nn.Module] = []
    for fan_in, fan_out in pairwise(widths[:-1]):
        layers += [linear(fan_in, fan_out), activation()]
        if dropout:
            layers.append(nn.Dropout(dropout))
    return nn.Sequential(*layers, linear(widths[-2], widths[-1]))


class RMSNorm(nn.RMSNorm):
    """In fp32 under autocast too, which does not list this norm."""

    def __init__(self, dim: int) -> None:
        super().__init__(dim, eps=NORM_EPS)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.float())


class TokenMix(nn.Module):
    """The paper's LCE (App. A.2.1): every output token is a linear combination of the input tokens; no bias.

    (B, num_in, d) -> (B, num_out, d)
    """

    def __init__(self, num_in: int, num_out: int) -> None:
        super().__init__()
        self.weight_OI = nn.Parameter(torch.empty(num_out, num_in))
        nn.init.xavier_normal_(self.weight_OI)

    def forward(self, tokens_BId: Tensor) -> Tensor:
        return self.weight_OI @ tokens_BId

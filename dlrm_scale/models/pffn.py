"""Personalised feed-forward (InterFormer Eq. 8): its weights are made from X_sum, separately for every sample.

The paper and Meta's later texts give four forms (reading D in docs/interformer.md). Each starts so that the output's
variance is about the input's: generated weights are a shared random matrix plus a part that depends on the sample, each with
half of the variance, and X_sum is normalised first, so that small embeddings do not make the weights vanish.
"""

# B batch  C summary tokens  N tokens  d token dim  K hidden width  H heads  h dim of a head
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional

from dlrm_scale.config import InterFormerConfig
from dlrm_scale.models.layers import NORM_EPS, Linear, RMSNorm

SILU_POWER = 0.3557  # E[silu(z)^2] and E[gelu(z)^2] for z ~ N(0, 1), by quadrature
GELU_POWER = 0.4252


class HyperNetwork(nn.Module):
    """Makes matrices from X_sum: normalise, flatten, Linear(Cd -> d), SiLU, and one Linear a matrix.

    Args:
        shapes: (rows, columns, variance of an entry at the start) of each matrix.

    (B, C, d) -> [(B, rows, columns), ...]
    """

    def __init__(self, num_summary: int, dim: int, shapes: list[tuple[int, int, float]]) -> None:
        super().__init__()
        self.shapes = [(rows, columns) for rows, columns, _ in shapes]
        self.trunk = Linear(num_summary * dim, dim)
        nn.init.normal_(self.trunk.weight, std=(num_summary * dim) ** -0.5)
        nn.init.zeros_(self.trunk.bias)
        self.heads = nn.ModuleList(Linear(dim, rows * columns) for rows, columns, _ in shapes)
        for head, (_, _, variance) in zip(self.heads, shapes, strict=True):
            nn.init.normal_(head.bias, std=(variance / 2) ** 0.5)
            nn.init.normal_(head.weight, std=(variance / 2 / (SILU_POWER * dim)) ** 0.5)

    def forward(self, summary_BCd: Tensor) -> list[Tensor]:
        hidden_Bd = functional.silu(self.trunk(_normalise(summary_BCd.flatten(1))))
        return [head(hidden_Bd).unflatten(1, shape) for head, shape in zip(self.heads, self.shapes, strict=True)]


class RankPFFN(nn.Module):
    """App. A.2.2 as printed: W_PFFN = X_sum W, so each output token lies in the span of the C summary tokens."""

    def __init__(self, num_summary: int, dim: int) -> None:
        super().__init__()
        self.weight_dC = nn.Parameter(torch.empty(dim, num_summary).normal_(std=(dim * num_summary) ** -0.5))

    def forward(self, summary_BCd: Tensor, tokens_BNd: Tensor) -> Tensor:
        return (tokens_BNd @ self.weight_dC) @ _normalise(summary_BCd)


class MatrixPFFN(nn.Module):
    """Eq. 8 with f an MLP that makes one d x d matrix: S W(X_sum)."""

    def __init__(self, num_summary: int, dim: int) -> None:
        super().__init__()
        self.hyper = HyperNetwork(num_summary, dim, [(dim, dim, 1 / dim)])

    def forward(self, summary_BCd: Tensor, tokens_BNd: Tensor) -> Tensor:
        (weight_Bdd,) = self.hyper(summary_BCd)
        return tokens_BNd @ weight_Bdd


class TwoLayerPFFN(nn.Module):
    """The deployed form (KernelEvolve, arXiv 2512.23236, section 5.3.2): RMSNorm(RMSNorm(GELU(S W1 + b1)) W2 + b2).

    W1 (d, K) and W2 (K, d) are made for each sample; the biases are shared.

    Attributes:
        fused: one kernel for all but the making of the weights (kernels.py sets it); None: the operations here.
    """

    def __init__(self, num_summary: int, dim: int, hidden: int) -> None:
        super().__init__()
        self.hyper = HyperNetwork(num_summary, dim, [(dim, hidden, 1 / dim), (hidden, dim, 1 / hidden)])
        self.bias1_K = nn.Parameter(torch.zeros(hidden))
        self.bias2_d = nn.Parameter(torch.zeros(dim))
        self.norm1 = RMSNorm(hidden)
        self.norm2 = RMSNorm(dim)
        self.fused: Callable[..., Tensor] | None = None

    def forward(self, summary_BCd: Tensor, tokens_BNd: Tensor) -> Tensor:
        weight1_BdK, weight2_BKd = self.hyper(summary_BCd)
        if self.fused is not None:
            shared = (self.bias1_K, self.norm1.weight, weight2_BKd, self.bias2_d, self.norm2.weight)
            return self.fused(tokens_BNd, weight1_BdK, *shared)
        hidden_BNK = self.norm1(functional.gelu(tokens_BNd @ weight1_BdK + self.bias1_K))
        return self.norm2(hidden_BNK @ weight2_BKd + self.bias2_d)


class GDPAPFFN(nn.Module):
    """Generalised dot-product attention (Kunlun, arXiv 2602.10016): per head GELU(S K^T / tau) V, K and V made from X_sum.

    tau is the sequence length, and nothing normalises the K weights of a token. K starts large enough that the
    activation sees unit variance in spite of tau.
    """

    def __init__(self, num_summary: int, dim: int, hidden: int, num_heads: int, tau: int) -> None:
        super().__init__()
        self.num_heads, self.tau = num_heads, tau
        key_variance, value_variance = tau**2 * num_heads / dim, 1 / (GELU_POWER * hidden)
        self.hyper = HyperNetwork(num_summary, dim, [(hidden, dim, key_variance), (hidden, dim, value_variance)])

    def forward(self, summary_BCd: Tensor, tokens_BNd: Tensor) -> Tensor:
        key_BHKh, value_BHKh = (self._split(matrix_BKd) for matrix_BKd in self.hyper(summary_BCd))
        scores_BHNK = self._split(tokens_BNd) @ key_BHKh.transpose(2, 3) / self.tau
        return (functional.gelu(scores_BHNK) @ value_BHKh).transpose(1, 2).flatten(2)

    def _split(self, x_BNd: Tensor) -> Tensor:
        return x_BNd.unflatten(2, (self.num_heads, -1)).transpose(1, 2)


def build_pffn(config: InterFormerConfig, num_tokens: int) -> nn.Module | None:
    """A module (X_sum (B, C, d), S (B, N, d)) -> (B, N, d), or None for `pffn: none`."""
    num_summary, dim = config.num_cls, config.dim
    hidden = config.pffn_hidden or dim
    match config.pffn:
        case "rank":
            return RankPFFN(num_summary, dim)
        case "matrix":
            return MatrixPFFN(num_summary, dim)
        case "two_layer":
            return TwoLayerPFFN(num_summary, dim, hidden)
        case "gdpa":
            return GDPAPFFN(num_summary, dim, hidden, config.num_heads, tau=num_tokens)
        case "none":
            return None


def _normalise(x: Tensor) -> Tensor:
    return functional.rms_norm(x.float(), x.shape[-1:], eps=NORM_EPS)

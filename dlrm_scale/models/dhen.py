"""InterFormer's Interaction Arch (Eq. 7) with the backbone of its experiments: one DHEN layer of DOT and DCN modules."""

# B batch  N input tokens  O output tokens  d token dim
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from dlrm_scale.config import InterFormerConfig
from dlrm_scale.errors import ConfigError
from dlrm_scale.models.interactions import LowRankCross, PairwiseDots
from dlrm_scale.models.layers import NORM_EPS, TokenMix, linear, mlp


class DotModule(nn.Module):
    """All pairwise dot products, projected to tokens: (B, N, d) -> (B, O, d)."""

    def __init__(self, num_in: int, num_out: int, dim: int) -> None:
        super().__init__()
        self.dots = PairwiseDots(num_in)
        self.project = nn.Sequential(linear(self.dots.num_pairs, num_out * dim), nn.SiLU())
        self.num_out = num_out

    def forward(self, tokens_BNd: Tensor) -> Tensor:
        return self.project(self.dots(tokens_BNd)).unflatten(1, (self.num_out, -1))


class CrossModule(nn.Module):
    """Low-rank cross layers over the flattened tokens, projected to tokens: (B, N, d) -> (B, O, d)."""

    def __init__(self, num_in: int, num_out: int, dim: int, num_layers: int, rank: int) -> None:
        super().__init__()
        self.cross = LowRankCross(num_in * dim, num_layers, rank)
        self.project = linear(num_in * dim, num_out * dim)
        self.num_out = num_out

    def forward(self, tokens_BNd: Tensor) -> Tensor:
        return self.project(self.cross(tokens_BNd.flatten(1))).unflatten(1, (self.num_out, -1))


class DHEN(nn.Module):
    """LayerNorm(Ensemble(modules) + ShortCut) (arXiv 2203.11014; InterFormer section 3.2).

    The ensemble sums the modules' tokens, or concatenates them on the embedding axis and projects back. The shortcut
    mixes the N input tokens to O. (B, N, d) -> (B, O, d)
    """

    def __init__(
        self, modules: Sequence[nn.Module], num_in: int, num_out: int, dim: int, ensemble: Literal["sum", "concat"]
    ) -> None:
        super().__init__()
        self.parts = nn.ModuleList(modules)
        self.join = linear(len(self.parts) * dim, dim) if ensemble == "concat" else None
        self.shortcut = TokenMix(num_in, num_out)
        self.norm = nn.LayerNorm(dim, eps=NORM_EPS)

    def forward(self, tokens_BNd: Tensor) -> Tensor:
        outputs = [part(tokens_BNd) for part in self.parts]
        joined_BOd = sum(outputs) if self.join is None else self.join(torch.cat(outputs, dim=2))
        # PyTorch's norm of bf16 on a CPU adds up its weight's gradient in bf16: nonsense from some thousand rows on
        return self.norm((joined_BOd + self.shortcut(tokens_BNd)).float())


class InteractionArch(nn.Module):
    """Eq. 7: X' = MLP(DHEN([X || S_sum])); the MLP acts on each token. (B, N, d) -> (B, O, d)

    Raises:
        ConfigError: dot products are asked for, but there is only one token.
    """

    def __init__(self, num_in: int, num_out: int, config: InterFormerConfig) -> None:
        super().__init__()
        if "dot" in config.interactions and num_in < 2:
            raise ConfigError(
                f"model.interactions has dot, which needs 2 or more tokens to pair, but the interaction arch has {num_in}; "
                "set model.interactions=[dcn] or add a feature"
            )
        dim = config.dim
        modules = [
            DotModule(num_in, num_out, dim)
            if kind == "dot"
            else CrossModule(num_in, num_out, dim, config.dcn_layers, config.dcn_rank)
            for kind in config.interactions
        ]
        self.dhen = DHEN(modules, num_in, num_out, dim, config.ensemble)
        self.mlp = mlp((dim, dim, dim), nn.SiLU)

    def forward(self, tokens_BNd: Tensor) -> Tensor:
        return self.mlp(self.dhen(tokens_BNd))

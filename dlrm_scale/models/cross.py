"""InterFormer's Cross Arch (section 4.4): a few summary tokens of each side, made for the other side to read."""

# B batch  X non-sequence tokens  C CLS (= summary) tokens  N = C + T tokens of the sequence  d token dim  Y tokens of S_sum
import torch
from torch import Tensor, nn

from dlrm_scale.config import InterFormerConfig
from dlrm_scale.models.attention import AttentionPooling
from dlrm_scale.models.layers import TokenMix, mlp


class Gate(nn.Module):
    """The paper's self-gating: sigma(x * MLP(x)), with the readings that `InterFormerConfig.gating` lists.

    The MLP acts on the embedding axis and is shared by all tokens. Its last bias starts at 1, so the gate starts open
    whatever the scale of x. (..., d) -> (..., d)
    """

    def __init__(self, dim: int, kind: str) -> None:
        super().__init__()
        self.kind = kind
        if kind != "none":
            self.mlp = mlp((dim, dim, dim), nn.SiLU)
            nn.init.ones_(self.mlp[-1].bias)

    def forward(self, x: Tensor) -> Tensor:
        match self.kind:
            case "none":
                return x
            case "mask":
                return x * self.mlp(x).sigmoid()
            case "sigmoid":
                return (x * self.mlp(x)).sigmoid()
            case "tanh":
                return (x * self.mlp(x)).tanh()
            case "identity":
                return x * self.mlp(x)
            case "sigmoid_times_x":
                return (x * self.mlp(x)).sigmoid() * x
        raise AssertionError(self.kind)


class NonSequenceSummary(nn.Module):
    """Eq. 10: X_sum = Gating(LCE(X)). (B, X, d) -> (B, C, d)"""

    def __init__(self, num_tokens: int, config: InterFormerConfig) -> None:
        super().__init__()
        self.mix = TokenMix(num_tokens, config.num_cls)
        self.gate = Gate(config.dim, config.gating)

    def forward(self, tokens_BXd: Tensor) -> Tensor:
        return self.gate(self.mix(tokens_BXd))


class LearnedSummary(nn.Module):
    """Stands in for X_sum where the sequence arch may not see X (modes s2n, sep): same shape, same for every sample."""

    def __init__(self, config: InterFormerConfig) -> None:
        super().__init__()
        self.tokens_Cd = nn.Parameter(torch.empty(config.num_cls, config.dim).normal_(std=0.02))

    def forward(self, tokens_BXd: Tensor) -> Tensor:
        return self.tokens_Cd.expand(len(tokens_BXd), -1, -1)


class SequenceSummary(nn.Module):
    """Eq. 11: S_sum = Gating([S_CLS || S_PMA || S_recent]). (B, N, d) -> (B, Y, d), Y = CLS + PMA + recent."""

    def __init__(self, config: InterFormerConfig) -> None:
        super().__init__()
        self.num_cls, self.num_recent = config.num_cls, config.num_recent
        self.pma_sees_cls = config.pma_sees_cls
        self.pma = AttentionPooling(config.dim, config.num_heads, config.num_pma) if config.num_pma else None
        self.gate = Gate(config.dim, config.gating)

    def forward(self, tokens_BNd: Tensor, valid_BN: Tensor, lengths_B: Tensor) -> Tensor:
        parts = [tokens_BNd[:, : self.num_cls]]
        if self.pma is not None:
            start = 0 if self.pma_sees_cls else self.num_cls
            parts.append(self.pma(tokens_BNd[:, start:], valid_BN[:, start:]))
        if self.num_recent:
            parts.append(recent_events(tokens_BNd[:, self.num_cls :], lengths_B, self.num_recent))
        return self.gate(torch.cat(parts, dim=1))


def num_sequence_summary(config: InterFormerConfig) -> int:
    """Y, the tokens of S_sum."""
    return config.num_cls + config.num_pma + config.num_recent


def recent_events(events_BTd: Tensor, lengths_B: Tensor, num_recent: int) -> Tensor:
    """The last `num_recent` events of each left-aligned sequence, latest last; zeros in front where there are fewer."""
    index_BK = lengths_B.unsqueeze(1) + torch.arange(-num_recent, 0, device=lengths_B.device)
    # not take_along_dim, which torch.compile compiles anew for each T
    index_BKd = index_BK.clamp(min=0).unsqueeze(2).expand(-1, -1, events_BTd.shape[2])
    gathered_BKd = events_BTd.gather(1, index_BKd.long())
    return gathered_BKd * (index_BK >= 0).unsqueeze(2)

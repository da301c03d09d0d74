"""Feature interactions that several archs share: low-rank cross layers and pairwise dot products."""

# B batch  D width of the flat input  R rank  N tokens  d token dim  P pairs
import torch
from torch import Tensor, nn

from dlrm_scale.models.layers import linear


class LowRankCross(nn.Module):
    """DCNv2's cross layers with W = U V: x <- x0 * (U(V x) + b) + x (arXiv 2008.13535; MLPerf's DLRM-DCNv2).

    (B, D) -> (B, D)
    """

    def __init__(self, width: int, num_layers: int, rank: int) -> None:
        super().__init__()
        self.down = nn.ModuleList(linear(width, rank, bias=False) for _ in range(num_layers))
        self.up = nn.ModuleList(linear(rank, width) for _ in range(num_layers))

    def forward(self, x0_BD: Tensor) -> Tensor:
        x_BD = x0_BD
        for down, up in zip(self.down, self.up, strict=True):
            x_BD = x_BD + x0_BD * up(down(x_BD))
        return x_BD


class PairwiseDots(nn.Module):
    """Dot products of all pairs of different tokens, each pair once: (B, N, d) -> (B, P), P = N(N-1)/2.

    Order: (1,0), (2,0), (2,1), (3,0), ...: the strictly lower triangle, row by row.
    """

    def __init__(self, num_tokens: int) -> None:
        super().__init__()
        row, column = torch.tril_indices(num_tokens, num_tokens, offset=-1)
        self.register_buffer("pairs_P", row * num_tokens + column, persistent=False)
        self.num_pairs = len(row)

    def forward(self, tokens_BNd: Tensor) -> Tensor:
        dots_BNN = tokens_BNd @ tokens_BNd.transpose(1, 2)
        return dots_BNN.flatten(1)[:, self.pairs_P]

"""Attention over events: rotary multi-head self-attention, and pooling by learned queries.

Both are bidirectional with a mask of the valid keys; the paper mentions no causal mask (reading G in docs/interformer.md).
"""

# B batch  N tokens  d = H h token dim  H heads  h dim of a head  f = h / 2 pairs  R = 3 d: q, k and v  Q pooled tokens
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional

from dlrm_scale.models.inputs import valid_mask
from dlrm_scale.models.layers import Linear, linear


def rotary_table(num_positions: int, head_dim: int, base: float) -> Tensor:
    """(2, N, f): cosines, and sines, of position x frequency, frequency i of the pair 2i, 2i + 1 being base^(-2i/h) (RoFormer, Eq. 15)."""
    frequency = base ** (-torch.arange(0, head_dim, 2) / head_dim)
    angle = torch.outer(torch.arange(num_positions).float(), frequency)
    return torch.stack((angle.cos(), angle.sin()))


def rotate(x_BHNh: Tensor, rotary_2Nf: Tensor) -> Tensor:
    """Each pair (x_2i, x_2i+1) turned by its position's angle."""
    cos_Nf, sin_Nf = rotary_2Nf[:, : x_BHNh.shape[2]].to(x_BHNh.dtype)
    even, odd = x_BHNh.unflatten(3, (-1, 2)).unbind(4)
    return torch.stack((even * cos_Nf - odd * sin_Nf, even * sin_Nf + odd * cos_Nf), dim=4).flatten(3)


def plain_attention(qkv_BNR: Tensor, rotary_2Nf: Tensor, lengths_B: Tensor, num_heads: int) -> Tensor:
    """Eq. 3 with rotary queries and keys, over the first `lengths_B` tokens, one or more: (B, N, d)."""
    q, k, v = qkv_BNR.unflatten(2, (3, num_heads, -1)).permute(2, 0, 3, 1, 4)
    valid_BN = valid_mask(lengths_B, qkv_BNR.shape[1])
    mixed_BHNh = functional.scaled_dot_product_attention(
        rotate(q, rotary_2Nf), rotate(k, rotary_2Nf), v, attn_mask=valid_BN[:, None, None]
    )
    return mixed_BHNh.transpose(1, 2).flatten(2)


class SelfAttention(nn.Module):
    """Eq. 3 with rotary positions 0 .. num_tokens - 1 on each head's queries and keys; no biases.

    (B, N, d), lengths_B >= 1 -> (B, N, d), N <= num_tokens; what a token behind a sample's last one holds changes no valid token.

    Attributes:
        attend: `plain_attention`, or a kernel in its place (kernels.py sets it).
    """

    def __init__(self, dim: int, num_heads: int, num_tokens: int, rope_base: float) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = linear(dim, 3 * dim, bias=False)
        self.out = linear(dim, dim, bias=False)
        self.register_buffer("rotary_2Nf", rotary_table(num_tokens, dim // num_heads, rope_base), persistent=False)
        self.attend: Callable[[Tensor, Tensor, Tensor, int], Tensor] = plain_attention

    def forward(self, tokens_BNd: Tensor, lengths_B: Tensor) -> Tensor:
        return self.out(self.attend(self.qkv(tokens_BNd), self.rotary_2Nf, lengths_B, self.num_heads))


class AttentionPooling(nn.Module):
    """PMA (Eq. 4; Set Transformer without its feed-forward and norms): learned queries attend to the tokens.

    Values and output start as the identity: a pooled token starts near the mean of the tokens, in their own space.
    As the queries are no tokens' own, neither keys nor values of the tokens are ever made: q (W_k s) = (W_k^T q) s, and the sum of
    p (W_v s) = W_v (the sum of p s).
    (B, N, d), valid_BN -> (B, Q, d); zeros for a sample without a valid token.
    """

    def __init__(self, dim: int, num_heads: int, num_queries: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.queries_Qd = nn.Parameter(torch.empty(num_queries, dim).normal_(std=0.02))
        self.kv = linear(dim, 2 * dim, bias=False)
        self.out = Linear(dim, dim, bias=False)
        with torch.no_grad():
            self.kv.weight[dim:] = torch.eye(dim)
            nn.init.eye_(self.out.weight)

    def forward(self, tokens_BNd: Tensor, valid_BN: Tensor) -> Tensor:
        any_valid_B1 = valid_BN.any(dim=1, keepdim=True)  # the softmax of a row without a valid key is not defined
        mask_BN = valid_BN | ~any_valid_B1
        key_Hhd, value_Hhd = self.kv.weight.unflatten(0, (2, self.num_heads, -1)).unbind()
        query_QHh = self.queries_Qd.unflatten(1, (self.num_heads, -1)) * key_Hhd.shape[1] ** -0.5
        seen_QHd = torch.einsum("qhe,hed->qhd", query_QHh, key_Hhd)
        scores_BNP = self.kv.product(tokens_BNd, seen_QHd.flatten(0, 1), None)  # P = Q H
        weights_BNP = scores_BNP.masked_fill(~mask_BN.unsqueeze(2), -torch.inf).softmax(1)
        pooled_BQHd = (weights_BNP.transpose(1, 2) @ tokens_BNd).unflatten(1, seen_QHd.shape[:2])
        mixed_BQHh = torch.einsum("bqhd,hed->bqhe", pooled_BQHd, value_Hhd)
        return self.out(mixed_BQHh.flatten(2)) * any_valid_B1.unsqueeze(2)

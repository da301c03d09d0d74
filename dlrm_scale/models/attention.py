"""Attention over events: rotary multi-head self-attention, and pooling by learned queries.

Both are bidirectional with a mask of the valid keys; the paper mentions no causal mask (reading G in docs/interformer.md).
"""

# B batch  N tokens  d token dim  H heads  h dim of a head  f = h / 2 pairs  Q pooled tokens
import torch
from torch import Tensor, nn
from torch.nn import functional

from dlrm_scale.models.cpu_attention import CpuAttention
from dlrm_scale.models.cpu_ways import takes_cpu_way
from dlrm_scale.models.layers import Linear, linear, linear_of


def rotary_table(num_positions: int, head_dim: int, base: float) -> Tensor:
    """(2, N, h): cosines, and sines, of position x frequency, frequency i of the pair 2i, 2i + 1 being base^(-2i/h) (RoFormer, Eq. 15)."""
    frequency = base ** (-torch.arange(0, head_dim, 2) / head_dim)
    angle = torch.outer(torch.arange(num_positions).float(), frequency).repeat_interleave(2, dim=1)
    return torch.stack((angle.cos(), angle.sin()))


def quarter_turn(rows_Rd: Tensor) -> Tensor:
    """Each pair (r_2i, r_2i+1) of rows becomes (-r_2i+1, r_2i). What a matrix makes of a vector turns as the matrix's rows do."""
    even, odd = rows_Rd.unflatten(0, (-1, 2)).unbind(1)
    return torch.stack((-odd, even), dim=1).flatten(0, 1)


def attend(q_BHNh: Tensor, k_BHNh: Tensor, v_BHNh: Tensor, valid_BN: Tensor) -> Tensor:
    """Eq. 3 over the valid keys, of which each sample has one or more: (B, H, N, h)."""
    if takes_cpu_way(q_BHNh):
        return CpuAttention.apply(q_BHNh.bfloat16(), k_BHNh.bfloat16(), v_BHNh.bfloat16(), valid_BN)
    return functional.scaled_dot_product_attention(q_BHNh, k_BHNh, v_BHNh, attn_mask=valid_BN[:, None, None])


class SelfAttention(nn.Module):
    """Eq. 3 with rotary positions 0 .. num_tokens - 1 on each head's queries and keys; no biases.

    (B, N, d), valid_BN -> (B, N, d), N <= num_tokens; what an invalid key holds changes nothing.
    """

    def __init__(self, dim: int, num_heads: int, num_tokens: int, rope_base: float) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = linear(dim, 3 * dim, bias=False)
        self.out = linear(dim, dim, bias=False)
        table = rotary_table(num_tokens, dim // num_heads, rope_base)
        self.register_buffer(
            "rotary_2Nd", table.repeat(1, 1, 2 * num_heads), persistent=False
        )  # of all queries and keys

    def forward(self, tokens_BNd: Tensor, valid_BN: Tensor) -> Tensor:
        # A pair turned by an angle is cos times the pair, and sin times the pair turned by a quarter.
        weight_QKV = self.qkv.weight
        num_turned = len(weight_QKV) // 3 * 2
        weight = torch.cat((weight_QKV, quarter_turn(weight_QKV[:num_turned])))
        made_BNr = linear_of(tokens_BNd, weight)
        qk_BNr, v_BNd, turned_BNr = made_BNr.split((num_turned, num_turned // 2, num_turned), dim=2)
        cos_Nr, sin_Nr = self.rotary_2Nd[:, : tokens_BNd.shape[1]].to(made_BNr.dtype)
        q_BHNh, k_BHNh = self._heads(qk_BNr * cos_Nr + turned_BNr * sin_Nr, 2)
        mixed_BHNh = attend(q_BHNh, k_BHNh, *self._heads(v_BNd, 1), valid_BN)
        return self.out(mixed_BHNh.transpose(1, 2).flatten(2))

    def _heads(self, x_BNr: Tensor, parts: int) -> tuple[Tensor, ...]:
        """(B, N, parts x H x h) as `parts` of (B, H, N, h)."""
        return x_BNr.unflatten(2, (parts, self.num_heads, -1)).permute(2, 0, 3, 1, 4).unbind()


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
        scores_BNP = linear_of(tokens_BNd, seen_QHd.flatten(0, 1))  # P = Q H
        weights_BNP = scores_BNP.masked_fill(~mask_BN.unsqueeze(2), -torch.inf).softmax(1)
        pooled_BQHd = (weights_BNP.transpose(1, 2) @ tokens_BNd).unflatten(1, seen_QHd.shape[:2])
        mixed_BQHh = torch.einsum("bqhd,hed->bqhe", pooled_BQHd, value_Hhd)
        return self.out(mixed_BQHh.flatten(2)) * any_valid_B1.unsqueeze(2)

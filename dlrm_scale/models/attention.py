"""Attention over events: rotary multi-head self-attention, and pooling by learned queries.

Both are bidirectional with a mask of the valid keys; the paper mentions no causal mask (reading G in docs/interformer.md).
"""

# B batch  N tokens  d token dim  H heads  h dim of a head  f = h / 2 pairs  Q pooled tokens
import torch
from torch import Tensor, nn
from torch.nn import functional

from dlrm_scale.models.layers import Linear, linear


def rotary_table(num_positions: int, head_dim: int, base: float) -> Tensor:
    """(N, h/2, 2): cosine and sine of position x frequency, frequency i being base^(-2i/h) (RoFormer, Eq. 15)."""
    frequency = base ** (-torch.arange(0, head_dim, 2) / head_dim)
    angle = torch.outer(torch.arange(num_positions).float(), frequency)
    return torch.stack((angle.cos(), angle.sin()), dim=-1)


def rotate(x_Nh: Tensor, table_Nf2: Tensor) -> Tensor:
    """Turns each pair (x_2i, x_2i+1) of position n by its angle: a product of complex numbers. Leading axes are free."""
    pairs = torch.view_as_complex(x_Nh.float().unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * torch.view_as_complex(table_Nf2)).flatten(-2)


class SelfAttention(nn.Module):
    """Eq. 3 with rotary positions 0 .. num_tokens - 1 on each head's queries and keys; no biases.

    (B, N, d), valid_BN -> (B, N, d); what an invalid key holds changes nothing.
    """

    def __init__(self, dim: int, num_heads: int, num_tokens: int, rope_base: float) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = linear(dim, 3 * dim, bias=False)
        self.out = linear(dim, dim, bias=False)
        table = rotary_table(num_tokens, dim // num_heads, rope_base)
        self.register_buffer("rotary_Nf2", table, persistent=False)

    def forward(self, tokens_BNd: Tensor, valid_BN: Tensor) -> Tensor:
        qkv_3BHNh = self.qkv(tokens_BNd).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        q_BHNh, k_BHNh = rotate(qkv_3BHNh[:2], self.rotary_Nf2)
        mixed_BHNh = functional.scaled_dot_product_attention(
            q_BHNh, k_BHNh, qkv_3BHNh[2], attn_mask=valid_BN[:, None, None]
        )
        return self.out(mixed_BHNh.transpose(1, 2).flatten(2))


class AttentionPooling(nn.Module):
    """PMA (Eq. 4; Set Transformer without its feed-forward and norms): learned queries attend to the tokens.

    Values and output start as the identity: a pooled token starts near the mean of the tokens, in their own space.
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
        k_BHNh, v_BHNh = self.kv(tokens_BNd).unflatten(-1, (2, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        q_HQh = self.queries_Qd.unflatten(-1, (self.num_heads, -1)).transpose(0, 1)
        q_BHQh = q_HQh.expand(len(tokens_BNd), -1, -1, -1)
        mixed_BHQh = functional.scaled_dot_product_attention(q_BHQh, k_BHNh, v_BHNh, attn_mask=mask_BN[:, None, None])
        return self.out(mixed_BHQh.transpose(1, 2).flatten(2)) * any_valid_B1.unsqueeze(2)

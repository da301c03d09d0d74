"""Attention over short sequences in bf16 on a CPU: PyTorch 2.13's fused kernel takes ten times as long backward in bf16 as in fp32.

Three batched products forward and five backward, which keeps what the fused kernel keeps: the probabilities are worked out again.
"""

# B batch  H heads  N tokens  h dim of a head
from typing import Any

import torch
from torch import Tensor


class CpuAttention(torch.autograd.Function):
    """softmax(q k^T / sqrt(h), over valid keys) v. All of q, k, v and the result (B, H, N, h); valid_BN has a True in each row."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, valid_BN: Tensor) -> Tensor:
        ctx.scale = q.shape[-1] ** -0.5
        q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
        out = _probabilities(q, k, valid_BN, ctx.scale) @ v
        ctx.save_for_backward(q, k, v, valid_BN, out)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        q, k, v, valid_BN, out = ctx.saved_tensors
        grad = grad.contiguous()
        p = _probabilities(q, k, valid_BN, ctx.scale)
        grad_v = p.transpose(2, 3) @ grad
        # of the softmax: p (g - sum of p g), and that sum is that of grad x out
        from_sum = (grad * out).sum(-1, keepdim=True, dtype=torch.float32).to(grad.dtype)
        grad_scores = (grad @ v.transpose(2, 3)).sub_(from_sum).mul_(p)
        return (grad_scores @ k) * ctx.scale, (grad_scores.transpose(2, 3) @ q) * ctx.scale, grad_v, None


def _probabilities(q: Tensor, k: Tensor, valid_BN: Tensor, scale: float) -> Tensor:
    """(B, H, N, N): of each query, over the keys."""
    scores = (q * scale) @ k.transpose(2, 3)
    out_of_sight_BN = torch.zeros_like(valid_BN, dtype=scores.dtype).masked_fill_(~valid_BN, -torch.inf)
    return scores.add_(out_of_sight_BN[:, None, None]).softmax(-1)  # inside, in fp32

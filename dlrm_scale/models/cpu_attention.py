"""Rotary self-attention in bf16 on a CPU, by a kernel of our own (cpu_attention.cpp).

PyTorch 2.13's fused kernel takes ten times as long backward in bf16 as in fp32 on a CPU, and batched products of heads this small
write all scores to memory (docs/results/speed.md). This one keeps only q, k and v, as the fused ones do.
"""

# B batch  N tokens  R = 3 H h: q, k and v of each head  f = h / 2 pairs
import torch
from torch import Tensor

from dlrm_scale.models.cpu_library import call

SOURCE = "cpu_attention.cpp"


@torch.library.custom_op("dlrm_scale::rotary_attention", mutates_args=())
def _forward(qkv_BNR: Tensor, rotary_2Nf: Tensor, lengths_B: Tensor, num_heads: int) -> Tensor:
    out_BNd = qkv_BNR.new_empty(_shape_of_result(qkv_BNR))
    _call("attend_forward", qkv_BNR, rotary_2Nf, lengths_B, out_BNd, num_heads=num_heads)
    return out_BNd


@torch.library.custom_op("dlrm_scale::rotary_attention_backward", mutates_args=())
def _backward(qkv_BNR: Tensor, rotary_2Nf: Tensor, lengths_B: Tensor, grad_BNd: Tensor, num_heads: int) -> Tensor:
    grad_qkv_BNR = torch.empty_like(qkv_BNR)
    _call("attend_backward", qkv_BNR, rotary_2Nf, lengths_B, grad_BNd, grad_qkv_BNR, num_heads=num_heads)
    return grad_qkv_BNR


def _shape_of_result(qkv_BNR: Tensor) -> tuple[int, int, int]:
    return qkv_BNR.shape[0], qkv_BNR.shape[1], qkv_BNR.shape[2] // 3


def _call(function: str, qkv_BNR: Tensor, rotary_2Nf: Tensor, *tensors: Tensor, num_heads: int) -> None:
    (num_samples, num_tokens, columns), num_positions = qkv_BNR.shape, rotary_2Nf.shape[1]
    lengths_B = tensors[0]
    if lengths_B.shape != (num_samples,) or (num_samples and not 0 <= lengths_B.min() <= lengths_B.max() <= num_tokens):
        raise ValueError(f"lengths are {lengths_B.tolist()}; they must be {num_samples} from 0 to {num_tokens}")
    sizes = (num_positions, num_samples, num_tokens, num_heads, columns // 3 // num_heads)
    call(SOURCE, function, (qkv_BNR, rotary_2Nf, *tensors), sizes)


@_forward.register_fake
def _(qkv_BNR, rotary_2Nf, lengths_B, num_heads):
    return qkv_BNR.new_empty(_shape_of_result(qkv_BNR))


@_backward.register_fake
def _(qkv_BNR, rotary_2Nf, lengths_B, grad_BNd, num_heads):
    return torch.empty_like(qkv_BNR)


def _keep_inputs(ctx, inputs, output) -> None:
    *tensors, ctx.num_heads = inputs
    ctx.save_for_backward(*tensors)


def _gradients(ctx, grad_BNd):
    return _backward(*ctx.saved_tensors, grad_BNd.contiguous(), ctx.num_heads), None, None, None


_forward.register_autograd(_gradients, setup_context=_keep_inputs)


def rotary_attention(qkv_BNR: Tensor, rotary_2Nf: Tensor, lengths_B: Tensor, num_heads: int) -> Tensor:
    """As `plain_attention` in attention.py, but for zeros behind a sample's last token: bf16 (B, N, R) -> (B, N, d).

    Raises:
        ValueError: it would read outside of a tensor.
    """
    num_tokens, columns = qkv_BNR.shape[1:]
    half = columns // 3 // num_heads // 2
    if qkv_BNR.dtype != torch.bfloat16 or columns != 6 * half * num_heads:
        raise ValueError(
            f"q, k, v: {qkv_BNR.dtype} of {columns} columns; they must be bf16 of 3 x {num_heads} even heads"
        )
    fp32 = rotary_2Nf.dtype == torch.float32 and rotary_2Nf.is_contiguous()
    if not fp32 or rotary_2Nf.shape[1] < num_tokens or rotary_2Nf.shape[2] != half:
        raise ValueError(
            f"angles are of {tuple(rotary_2Nf.shape[1:])}, {rotary_2Nf.dtype}; they must be fp32, contiguous, of {num_tokens} tokens or more, {half} pairs"
        )
    return _forward(qkv_BNR.contiguous(), rotary_2Nf, lengths_B.long().contiguous(), num_heads)

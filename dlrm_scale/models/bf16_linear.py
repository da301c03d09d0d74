"""A linear layer in bf16 on a CPU, in the layouts that its matrix units multiply fast.

Autocast's own does the same products, with three differences. oneDNN multiplies a transposed left matrix at half speed where the
core has AMX ("Products in bf16" in docs/results/speed.md), and the weight's gradient, g^T x, is such a product: here the narrower
of the two is transposed by a copy first where that pays. The gradients of a weight that is used several times add up in fp32. And
the weight is cast again for the backward pass, which takes a hundredth of its product: kept, each use would keep a copy.
"""

# M rows: samples, or tokens  I input features  O output features
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

LEAST_TRANSPOSED = 256  # columns; of fewer, the copy takes longer than it saves


class Bf16Linear(torch.autograd.Function):
    """(M, I), fp32 weight (O, I) and bias (O,) or None -> bf16 (M, O); gradients of weight and bias in fp32."""

    @staticmethod
    def forward(ctx: Any, x_MI: Tensor, weight_OI: Tensor, bias_O: Tensor | None) -> Tensor:
        x_MI = x_MI.bfloat16()
        ctx.save_for_backward(x_MI, weight_OI)
        ctx.has_bias = bias_O is not None
        return functional.linear(x_MI, weight_OI.bfloat16(), bias_O.bfloat16() if ctx.has_bias else None)

    @staticmethod
    def backward(ctx: Any, grad_MO: Tensor) -> tuple[Tensor | None, ...]:
        x_MI, weight_OI = ctx.saved_tensors
        need_x, need_weight, need_bias = ctx.needs_input_grad
        grad_x = grad_MO @ weight_OI.bfloat16() if need_x else None
        grad_weight = weight_gradient(grad_MO, x_MI) if need_weight else None
        grad_bias = grad_MO.sum(0, dtype=torch.float32) if need_bias else None
        return grad_x, grad_weight, grad_bias


def weight_gradient(grad_MO: Tensor, x_MI: Tensor) -> Tensor:
    """grad^T x: (O, I), summed in fp32, rounded to bf16 by the product, and handed on as fp32, in which several uses add up."""
    outputs, inputs = grad_MO.shape[1], x_MI.shape[1]
    if min(outputs, inputs) < LEAST_TRANSPOSED:
        return (grad_MO.t() @ x_MI).float()
    if outputs <= inputs:
        return (grad_MO.t().contiguous() @ x_MI).float()
    return (x_MI.t().contiguous() @ grad_MO).t().float().contiguous()


def linear_in_bf16(x: Tensor, weight_OI: Tensor, bias_O: Tensor | None) -> Tensor:
    """(..., I) -> (..., O); leading axes are free."""
    return Bf16Linear.apply(x.flatten(0, -2), weight_OI, bias_O).unflatten(0, x.shape[:-1])

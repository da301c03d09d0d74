"""The two-layer PFFN in bf16 on a CPU, by a kernel of our own (cpu_pffn.cpp).

PyTorch's batched products of matrices this small run at a third of the core's speed, and each step between them goes through memory
(docs/results/speed.md). This one keeps only its inputs; the plain twin is in pffn.py.
"""

# B batch  N tokens  d token dim  K hidden width  S = 2 K + 2 d: the shared parameters, one behind the other
import ctypes

import torch
from torch import Tensor

from dlrm_scale.models.cpu_library import call
from dlrm_scale.models.layers import NORM_EPS

SOURCE = "cpu_pffn.cpp"
WIDTH_STEP = 16  # of d and K: the widest registers' elements of fp32


def suits(dim: int, hidden: int) -> bool:
    return dim % WIDTH_STEP == 0 and hidden % WIDTH_STEP == 0


@torch.library.custom_op("dlrm_scale::pffn_on_cpu", mutates_args=())
def _forward(
    tokens_BNd: Tensor, weight1_BdK: Tensor, bias1_K: Tensor, scale1_K: Tensor, weight2_BKd: Tensor, bias2_d: Tensor, scale2_d: Tensor
) -> Tensor:  # fmt: skip
    out_BNd = torch.empty_like(tokens_BNd)
    inputs = (tokens_BNd, weight1_BdK, bias1_K, scale1_K, weight2_BKd, bias2_d, scale2_d)
    _call("pffn_forward", (*inputs, out_BNd), weight1_BdK)
    return out_BNd


@torch.library.custom_op("dlrm_scale::pffn_on_cpu_backward", mutates_args=())
def _backward(
    tokens_BNd: Tensor, weight1_BdK: Tensor, bias1_K: Tensor, scale1_K: Tensor, weight2_BKd: Tensor, bias2_d: Tensor, scale2_d: Tensor,
    grad_BNd: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of tokens and of both weights, and (S,) of the shared parameters."""
    inputs = (tokens_BNd, weight1_BdK, bias1_K, scale1_K, weight2_BKd, bias2_d, scale2_d, grad_BNd)
    grads = tuple(map(torch.empty_like, (tokens_BNd, weight1_BdK, weight2_BKd)))
    sums_BS = bias1_K.new_empty(len(tokens_BNd), 2 * len(bias1_K) + 2 * len(bias2_d))
    _call("pffn_backward", (*inputs, *grads, sums_BS), weight1_BdK)
    return *grads, sums_BS.sum(0)


def _call(function: str, tensors: tuple[Tensor, ...], weight1_BdK: Tensor) -> None:
    num_tokens = tensors[0].shape[1]
    num_samples, dim, hidden = weight1_BdK.shape
    call(SOURCE, function, tensors, (num_samples, num_tokens, dim, hidden), ctypes.c_float(NORM_EPS))


@_forward.register_fake
def _(tokens_BNd, *_):
    return torch.empty_like(tokens_BNd)


@_backward.register_fake
def _(tokens_BNd, weight1_BdK, bias1_K, scale1_K, weight2_BKd, bias2_d, scale2_d, grad_BNd):
    grads = map(torch.empty_like, (tokens_BNd, weight1_BdK, weight2_BKd))
    return *grads, bias1_K.new_empty(2 * len(bias1_K) + 2 * len(bias2_d))


def _keep_inputs(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs)


def _gradients(ctx, grad_BNd):
    inputs = ctx.saved_tensors  # once: under activation checkpointing it can be asked for no second time
    hidden, dim = len(inputs[2]), len(inputs[5])
    grad_tokens, grad_weight1, grad_weight2, sums_S = _backward(*inputs, grad_BNd.contiguous())
    of_bias1, of_scale1, of_bias2, of_scale2 = sums_S.split([hidden, hidden, dim, dim])
    return grad_tokens, grad_weight1, of_bias1, of_scale1, grad_weight2, of_bias2, of_scale2


_forward.register_autograd(_gradients, setup_context=_keep_inputs)


def pffn_on_cpu(
    tokens_BNd: Tensor, weight1_BdK: Tensor, bias1_K: Tensor, scale1_K: Tensor, weight2_BKd: Tensor, bias2_d: Tensor, scale2_d: Tensor
) -> Tensor:  # fmt: skip
    """(B, N, d) in bf16, differentiable once; tokens and weights are cast to bf16, the others are fp32.

    Raises:
        ValueError: it would read outside of a tensor.
    """
    num_samples, _, dim = tokens_BNd.shape
    hidden = len(bias1_K)
    tokens_BNd, weight1_BdK, weight2_BKd = (
        tensor.bfloat16().contiguous() for tensor in (tokens_BNd, weight1_BdK, weight2_BKd)
    )
    inputs = (tokens_BNd, weight1_BdK, bias1_K, scale1_K, weight2_BKd, bias2_d, scale2_d)
    if any(
        tensor.dtype != torch.float32 or not tensor.is_contiguous() for tensor in (bias1_K, scale1_K, bias2_d, scale2_d)
    ):
        raise ValueError("biases and scales must be fp32 and contiguous")
    shapes = [tuple(tensor.shape) for tensor in inputs[1:]]
    expected = [(num_samples, dim, hidden), (hidden,), (hidden,), (num_samples, hidden, dim), (dim,), (dim,)]
    if shapes != expected or not suits(dim, hidden):
        raise ValueError(
            f"weights, biases and scales are {shapes}; they must be {expected}, widths multiples of {WIDTH_STEP}"
        )
    return _forward(*inputs)

"""RMSNorm(RMSNorm(GELU(S W1 + b1)) W2 + b2) with W1 and W2 of each sample, as one Triton kernel forward and one backward.

The hidden tokens (B, N, K) never reach memory in the forward pass: the inner norm is one factor a token, so that it is put on
behind the second product, and K is walked in blocks. The backward pass makes the hidden tokens anew, which costs one product
and saves keeping them. It sums nothing by atomics: two runs give the same bits.

Products take their operands in the dtype of `tokens` and sum in fp32; norms, GELU and biases are fp32. The plain twin is
`plain_pffn` in pffn.py. Under Triton's interpreter (TRITON_INTERPRET=1, set before Triton is imported) the kernels run on the CPU.
"""

# B batch  N tokens  d token dim  K hidden width  BN, BD, BK: their blocks in a kernel, the tokens of one sample
import math

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.runtime.interpreter import InterpretedFunction

from dlrm_scale.models.layers import NORM_EPS

MAX_DIM = 256  # a block holds whole tokens: wider ones would not fit the registers
MIN_BLOCK = 16  # of tl.dot
INVERSE_SQRT2 = tl.constexpr(1 / math.sqrt(2))
INVERSE_SQRT_2PI = tl.constexpr(1 / math.sqrt(2 * math.pi))


@triton.jit
def _load(start, rows, columns, num_rows, num_columns):
    """A block of a contiguous matrix; zeros outside of it."""
    inside = (rows < num_rows)[:, None] & (columns < num_columns)[None, :]
    return tl.load(start + rows[:, None] * num_columns + columns[None, :], mask=inside, other=0.0)


@triton.jit
def _store(start, rows, columns, num_rows, num_columns, block):
    inside = (rows < num_rows)[:, None] & (columns < num_columns)[None, :]
    tl.store(start + rows[:, None] * num_columns + columns[None, :], block.to(start.dtype.element_ty), mask=inside)


@triton.jit
def _normal_cdf(x):
    return 0.5 * (1.0 + tl.erf(x * INVERSE_SQRT2))


@triton.jit
def _forward_kernel(
    tokens_BNd, weight1_BdK, bias1_K, scale1_K, weight2_BKd, bias2_d, scale2_d, out_BNd, inner_BNd, inverse_rms_BN,
    num_tokens, eps, d: tl.constexpr, K: tl.constexpr,
    BN: tl.constexpr, BD: tl.constexpr, BK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One block of one sample's tokens. `inner` is what the outer norm takes, `inverse_rms` the inner norm's factor."""
    num_blocks = tl.cdiv(num_tokens, BN)
    sample = (tl.program_id(0) // num_blocks).to(tl.int64)
    rows = (tl.program_id(0) % num_blocks) * BN + tl.arange(0, BN)
    columns = tl.arange(0, BD)
    first_token = sample * num_tokens * d
    tokens = _load(tokens_BNd + first_token, rows, columns, num_tokens, d)
    sums = tl.zeros((BN, BD), dtype=tl.float32)
    squares = tl.zeros((BN,), dtype=tl.float32)
    for start in range(0, K, BK):
        hidden = start + tl.arange(0, BK)
        weight1 = _load(weight1_BdK + sample * d * K, columns, hidden, d, K)
        before = tl.dot(tokens, weight1, input_precision=PRECISION)
        before += tl.load(bias1_K + hidden, mask=hidden < K, other=0.0)[None, :]
        active = before * _normal_cdf(before)
        squares += tl.sum(active * active, axis=1)
        scaled = active * tl.load(scale1_K + hidden, mask=hidden < K, other=0.0)[None, :]
        weight2 = _load(weight2_BKd + sample * K * d, hidden, columns, K, d)
        sums = tl.dot(scaled.to(weight2.dtype), weight2, sums, input_precision=PRECISION)
    inverse_rms = 1.0 / tl.sqrt(squares / K + eps)
    inner = sums * inverse_rms[:, None] + tl.load(bias2_d + columns, mask=columns < d, other=0.0)[None, :]
    outer = 1.0 / tl.sqrt(tl.sum(inner * inner, axis=1) / d + eps)
    out = inner * outer[:, None] * tl.load(scale2_d + columns, mask=columns < d, other=0.0)[None, :]
    _store(out_BNd + first_token, rows, columns, num_tokens, d, out)
    _store(inner_BNd + first_token, rows, columns, num_tokens, d, inner)
    tl.store(inverse_rms_BN + sample * num_tokens + rows, inverse_rms, mask=rows < num_tokens)


@triton.jit
def _backward_kernel(
    grad_BNd, tokens_BNd, weight1_BdK, bias1_K, scale1_K, weight2_BKd, bias2_d, scale2_d, inner_BNd, inverse_rms_BN,
    grad_tokens_BNd, grad_inner_BNd, normed_BNK, grad_before_BNK, sums_K2, sums_d2,
    num_tokens, eps, d: tl.constexpr, K: tl.constexpr,
    BN: tl.constexpr, BD: tl.constexpr, BK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One block of one sample's tokens: their gradients, both factors of each weight's gradient, and this block's part of the
    sums for bias1 and scale1 (2 rows of K) and for bias2 and scale2 (2 rows of d)."""
    num_blocks = tl.cdiv(num_tokens, BN)
    program = tl.program_id(0).to(tl.int64)
    sample = program // num_blocks
    rows = (tl.program_id(0) % num_blocks) * BN + tl.arange(0, BN)
    columns = tl.arange(0, BD)
    first_token, first_hidden = sample * num_tokens * d, sample * num_tokens * K
    tokens = _load(tokens_BNd + first_token, rows, columns, num_tokens, d)
    inner = _load(inner_BNd + first_token, rows, columns, num_tokens, d).to(tl.float32)
    grad = _load(grad_BNd + first_token, rows, columns, num_tokens, d).to(tl.float32)
    outer = 1.0 / tl.sqrt(tl.sum(inner * inner, axis=1) / d + eps)[:, None]
    scale2 = tl.load(scale2_d + columns, mask=columns < d, other=0.0)[None, :]
    along = tl.sum(grad * scale2 * inner, axis=1)[:, None] / d
    grad_inner = outer * (grad * scale2 - inner * (outer * outer * along))
    tl.store(sums_d2 + program * 2 * d + columns, tl.sum(grad_inner, axis=0), mask=columns < d)
    tl.store(sums_d2 + program * 2 * d + d + columns, tl.sum(grad * inner * outer, axis=0), mask=columns < d)
    # The inner norm's sum over K of gradient x value, taken on its other side: (p W2) . grad = p . (W2 grad).
    bias2 = tl.load(bias2_d + columns, mask=columns < d, other=0.0)[None, :]
    along1 = tl.sum(grad_inner * (inner - bias2), axis=1)[:, None] / K
    inverse_rms = tl.load(inverse_rms_BN + sample * num_tokens + rows, mask=rows < num_tokens, other=0.0)[:, None]
    grad_inner = grad_inner.to(tokens.dtype)
    _store(grad_inner_BNd + first_token, rows, columns, num_tokens, d, grad_inner)
    grad_tokens = tl.zeros((BN, BD), dtype=tl.float32)
    for start in range(0, K, BK):
        hidden = start + tl.arange(0, BK)
        weight1 = _load(weight1_BdK + sample * d * K, columns, hidden, d, K)
        weight2 = _load(weight2_BKd + sample * K * d, hidden, columns, K, d)
        before = tl.dot(tokens, weight1, input_precision=PRECISION)
        before += tl.load(bias1_K + hidden, mask=hidden < K, other=0.0)[None, :]
        cdf = _normal_cdf(before)
        unit = before * cdf * inverse_rms
        scale1 = tl.load(scale1_K + hidden, mask=hidden < K, other=0.0)[None, :]
        _store(normed_BNK + first_hidden, rows, hidden, num_tokens, K, unit * scale1)
        grad_normed = tl.dot(grad_inner, tl.trans(weight2), input_precision=PRECISION)
        grad_active = inverse_rms * (grad_normed * scale1 - unit * along1)
        slope = cdf + before * tl.exp(-0.5 * before * before) * INVERSE_SQRT_2PI
        grad_before = grad_active * slope
        at = sums_K2 + program * 2 * K + hidden
        tl.store(at, tl.sum(grad_before, axis=0), mask=hidden < K)
        tl.store(at + K, tl.sum(grad_normed * unit, axis=0), mask=hidden < K)
        grad_before = grad_before.to(tokens.dtype)
        _store(grad_before_BNK + first_hidden, rows, hidden, num_tokens, K, grad_before)
        grad_tokens = tl.dot(grad_before, tl.trans(weight1), grad_tokens, input_precision=PRECISION)
    _store(grad_tokens_BNd + first_token, rows, columns, num_tokens, d, grad_tokens)


INTERPRETED = isinstance(_forward_kernel, InterpretedFunction)


def _blocks(dtype: torch.dtype, dim: int) -> dict[str, int]:
    """By registers and shared memory of what Triton 3.7.1 compiles for sm_80, sm_90 and sm_100; no GPU has timed them yet."""
    wide = dim > MAX_DIM // 2
    return {
        "BN": 32 if dtype == torch.float32 and wide else 64,
        "BD": max(MIN_BLOCK, triton.next_power_of_2(dim)),
        "BK": 32,
        "num_warps": 8 if wide else 4,
        "num_stages": 1 if dtype == torch.float32 else 2,
    }


def _launch(tokens_BNd: Tensor, hidden: int) -> tuple[tuple[int], dict[str, int | float | str]]:
    """Grid and the arguments that both kernels have in common."""
    num_samples, num_tokens, dim = tokens_BNd.shape
    blocks = _blocks(tokens_BNd.dtype, dim)
    precision = "tf32" if torch.backends.cuda.matmul.allow_tf32 else "ieee"
    sizes = {"num_tokens": num_tokens, "eps": NORM_EPS, "d": dim, "K": hidden, "PRECISION": precision}
    return (num_samples * triton.cdiv(num_tokens, blocks["BN"]),), sizes | blocks


@torch.library.custom_op("dlrm_scale::pffn", mutates_args=())
def _forward(
    tokens_BNd: Tensor,
    weight1_BdK: Tensor,
    bias1_K: Tensor,
    scale1_K: Tensor,
    weight2_BKd: Tensor,
    bias2_d: Tensor,
    scale2_d: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """The result (B, N, d) in fp32, and what the backward pass needs: the outer norm's input and the inner norm's factors (B, N)."""
    out_BNd = torch.empty_like(tokens_BNd, dtype=torch.float32)
    inner_BNd = torch.empty_like(tokens_BNd)
    inverse_rms_BN = out_BNd.new_empty(tokens_BNd.shape[:2])
    grid, shared = _launch(tokens_BNd, len(bias1_K))
    inputs = (tokens_BNd, weight1_BdK, bias1_K, scale1_K, weight2_BKd, bias2_d, scale2_d)
    _forward_kernel[grid](*inputs, out_BNd, inner_BNd, inverse_rms_BN, **shared)
    return out_BNd, inner_BNd, inverse_rms_BN


@_forward.register_fake
def _(tokens_BNd, weight1_BdK, bias1_K, scale1_K, weight2_BKd, bias2_d, scale2_d):
    out_BNd = torch.empty_like(tokens_BNd, dtype=torch.float32)
    return out_BNd, torch.empty_like(tokens_BNd), out_BNd.new_empty(tokens_BNd.shape[:2])


@torch.library.custom_op("dlrm_scale::pffn_backward", mutates_args=())
def _backward(
    grad_BNd: Tensor,
    tokens_BNd: Tensor,
    weight1_BdK: Tensor,
    bias1_K: Tensor,
    scale1_K: Tensor,
    weight2_BKd: Tensor,
    bias2_d: Tensor,
    scale2_d: Tensor,
    inner_BNd: Tensor,
    inverse_rms_BN: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of `_forward`'s inputs, in their order and dtypes."""
    hidden, dim = len(bias1_K), len(bias2_d)
    grid, shared = _launch(tokens_BNd, hidden)
    grad_tokens_BNd, grad_inner_BNd = torch.empty_like(tokens_BNd), torch.empty_like(tokens_BNd)
    normed_BNK = tokens_BNd.new_empty(*tokens_BNd.shape[:2], hidden)
    grad_before_BNK = torch.empty_like(normed_BNK)
    sums_P2K = grad_BNd.new_empty(*grid, 2, hidden)  # P programs
    sums_P2d = grad_BNd.new_empty(*grid, 2, dim)
    inputs = (tokens_BNd, weight1_BdK, bias1_K, scale1_K, weight2_BKd, bias2_d, scale2_d, inner_BNd, inverse_rms_BN)
    outputs = (grad_tokens_BNd, grad_inner_BNd, normed_BNK, grad_before_BNK, sums_P2K, sums_P2d)
    _backward_kernel[grid](grad_BNd, *inputs, *outputs, **shared)
    grad_weight1_BdK = tokens_BNd.transpose(1, 2) @ grad_before_BNK
    grad_weight2_BKd = normed_BNK.transpose(1, 2) @ grad_inner_BNd
    (grad_bias1_K, grad_scale1_K), (grad_bias2_d, grad_scale2_d) = sums_P2K.sum(0), sums_P2d.sum(0)
    return (
        *(grad_tokens_BNd, grad_weight1_BdK, grad_bias1_K.clone(), grad_scale1_K.clone()),
        *(grad_weight2_BKd, grad_bias2_d.clone(), grad_scale2_d.clone()),  # a custom operator's results share no memory
    )


@_backward.register_fake
def _(grad_BNd, *inputs):
    return tuple(torch.empty_like(tensor) for tensor in inputs[:7])


def _keep_inputs(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs, *output[1:])
    ctx.set_materialize_grads(False)


def _gradients(ctx, grad_BNd, *_):
    return _backward(grad_BNd.contiguous(), *ctx.saved_tensors)


_forward.register_autograd(_gradients, setup_context=_keep_inputs)


def fused_pffn(
    tokens_BNd: Tensor,
    weight1_BdK: Tensor,
    bias1_K: Tensor,
    scale1_K: Tensor,
    weight2_BKd: Tensor,
    bias2_d: Tensor,
    scale2_d: Tensor,
) -> Tensor:
    """(B, N, d) in fp32, differentiable once; d at most MAX_DIM. Under autocast its products are in autocast's dtype."""
    kind = tokens_BNd.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else tokens_BNd.dtype
    tokens_BNd, weight1_BdK, weight2_BKd = (
        tensor.to(dtype).contiguous() for tensor in (tokens_BNd, weight1_BdK, weight2_BKd)
    )
    return _forward(tokens_BNd, weight1_BdK, bias1_K, scale1_K, weight2_BKd, bias2_d, scale2_d)[0]

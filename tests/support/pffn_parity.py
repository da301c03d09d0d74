"""The fused PFFN beside its plain twin in fp64: `python -m tests.support.pffn_parity` tells it of Triton's interpreter, as JSON.

Triton decides at its import whether it interprets, so that this needs a process of its own (TRITON_INTERPRET=1).
"""

import json
from unittest import mock

import torch
import triton.language as tl
from torch import Tensor
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle, _convert_float

from dlrm_scale.models.pffn import TwoLayerPFFN
from dlrm_scale.models.pffn_triton import fused_pffn

NUM_SUMMARY = 4
# samples, tokens, d, K: of several blocks, of less than one, of no multiple of 16, and with a K of several blocks
SHAPES = ((2, 70, 16, 32), (3, 5, 20, 24), (1, 65, 136, 40), (2, 9, 16, 70))
Results = dict[str, Tensor]


def both(shape: tuple[int, int, int, int], device: str, bf16: bool) -> tuple[Results, Results, Results]:
    """Outputs and all gradients of the kernel, of the plain twin, and of the twin in fp64, by name."""
    num_samples, num_tokens, dim, hidden = shape
    generator = torch.Generator().manual_seed(0)
    pffn = TwoLayerPFFN(NUM_SUMMARY, dim, hidden)
    for parameter in (pffn.bias1_K, pffn.bias2_d, pffn.norm1.weight, pffn.norm2.weight):
        parameter.data += 0.3 * torch.randn(parameter.shape, generator=generator)
    pffn.to(device)
    summary, tokens, grad = (
        torch.randn(num_samples, n, dim, generator=generator).to(device) for n in (NUM_SUMMARY, num_tokens, num_tokens)
    )
    plain = run(pffn, summary, tokens, grad, bf16)
    pffn.fused = fused_pffn
    fused = run(pffn, summary, tokens, grad, bf16)
    pffn.fused = None
    with mock.patch.object(Tensor, "float", lambda tensor: tensor):  # norms take fp32 whatever comes; here all is fp64
        exact = run(pffn.double(), summary.double(), tokens.double(), grad.double(), bf16=False)
    return fused, plain, exact


def run(pffn: TwoLayerPFFN, summary: Tensor, tokens: Tensor, grad: Tensor, bf16: bool) -> Results:
    pffn.zero_grad()
    summary, tokens = summary.clone().requires_grad_(), tokens.clone().requires_grad_()
    with torch.autocast(tokens.device.type, torch.bfloat16, enabled=bf16):
        out = pffn(summary, tokens)
    out.backward(grad.to(out.dtype))
    gradients = {name: parameter.grad for name, parameter in pffn.named_parameters()}
    return {"out": out.detach(), "tokens": tokens.grad, "summary": summary.grad} | gradients


def errors(shape: tuple[int, int, int, int], device: str, bf16: bool) -> dict[str, tuple[float, float]]:
    """By name, of the kernel and of the plain twin: the distance from the twin in fp64, over that one's norm."""
    fused, plain, exact = both(shape, device, bf16)
    return {
        name: tuple(((mine[name] - exact[name]).norm() / exact[name].norm()).item() for mine in (fused, plain))
        for name in exact
    }


def multiply_bf16() -> None:
    """Triton 3.7.1's interpreter holds bf16 as 16-bit integers, and multiplies those; after this, its products are of the numbers."""
    dot = InterpreterBuilder.create_dot

    def as_fp32(x: TensorHandle) -> TensorHandle:
        if x.dtype.scalar != tl.bfloat16:
            return x
        return TensorHandle(_convert_float(x.data, tl.bfloat16, tl.float32, None).view("float32"), tl.float32)

    InterpreterBuilder.create_dot = lambda self, a, b, *rest: dot(self, as_fp32(a), as_fp32(b), *rest)


if __name__ == "__main__":
    torch.set_num_threads(1)
    multiply_bf16()
    cases = [(shape, False) for shape in SHAPES] + [(shape, True) for shape in SHAPES[:2]]
    print(json.dumps([{"shape": shape, "bf16": bf16, "errors": errors(shape, "cpu", bf16)} for shape, bf16 in cases]))

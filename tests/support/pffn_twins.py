"""A fused PFFN beside its plain twin, and that one in fp64."""

from collections.abc import Callable
from unittest import mock

import torch
from torch import Tensor

from dlrm_scale.models.pffn import TwoLayerPFFN

NUM_SUMMARY = 4
Results = dict[str, Tensor]
Shape = tuple[int, int, int, int]  # samples, tokens, d, K


def both(fused: Callable[..., Tensor], shape: Shape, device: str, bf16: bool) -> tuple[Results, Results, Results]:
    """Outputs and all gradients of the kernel, of the plain twin, and of the twin in fp64, by name."""
    num_samples, num_tokens, dim, hidden = shape
    torch.manual_seed(0)  # of the weights
    generator = torch.Generator().manual_seed(0)
    pffn = TwoLayerPFFN(NUM_SUMMARY, dim, hidden)
    for parameter in (pffn.bias1_K, pffn.bias2_d, pffn.norm1.weight, pffn.norm2.weight):
        parameter.data += 0.3 * torch.randn(parameter.shape, generator=generator)
    pffn.to(device)
    summary, tokens, grad = (
        torch.randn(num_samples, n, dim, generator=generator).to(device) for n in (NUM_SUMMARY, num_tokens, num_tokens)
    )
    plain = run(pffn, summary, tokens, grad, bf16)
    pffn.fused = fused
    mine = run(pffn, summary, tokens, grad, bf16)
    pffn.fused = None
    with mock.patch.object(Tensor, "float", lambda tensor: tensor):  # norms take fp32 whatever comes; here all is fp64
        exact = run(pffn.double(), summary.double(), tokens.double(), grad.double(), bf16=False)
    return mine, plain, exact


def run(pffn: TwoLayerPFFN, summary: Tensor, tokens: Tensor, grad: Tensor, bf16: bool) -> Results:
    pffn.zero_grad()
    summary, tokens = summary.clone().requires_grad_(), tokens.clone().requires_grad_()
    with torch.autocast(tokens.device.type, torch.bfloat16, enabled=bf16):
        out = pffn(summary, tokens)
    out.backward(grad.to(out.dtype))
    gradients = {name: parameter.grad for name, parameter in pffn.named_parameters()}
    return {"out": out.detach(), "tokens": tokens.grad, "summary": summary.grad} | gradients


def errors(fused: Callable[..., Tensor], shape: Shape, device: str, bf16: bool) -> dict[str, tuple[float, float]]:
    """By name, of the kernel and of the plain twin: the distance from the twin in fp64, over that one's norm."""
    mine, plain, exact = both(fused, shape, device, bf16)
    return {
        name: tuple(((found[name] - exact[name]).norm() / exact[name].norm()).item() for found in (mine, plain))
        for name in exact
    }

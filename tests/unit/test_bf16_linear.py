"""Products in bf16 on a CPU against the same in fp32 of the same rounded numbers."""

import pytest
import torch
from torch.nn import functional

from dlrm_scale.models.bf16_linear import linear_in_bf16


@pytest.mark.parametrize(("inputs", "outputs"), [(24, 40), (512, 256), (256, 512)])
@pytest.mark.parametrize("bias", [True, False])
def test_products_and_gradients_are_fp32_s_but_for_rounding(inputs, outputs, bias):
    torch.manual_seed(0)
    x = torch.randn(6, 5, inputs).bfloat16().float().requires_grad_()
    weight = torch.randn(outputs, inputs).bfloat16().float().requires_grad_()
    shift = torch.randn(outputs).bfloat16().float().requires_grad_() if bias else None
    wanted = [t for t in (x, weight, shift) if t is not None]
    grad = torch.randn(6, 5, outputs).bfloat16()
    exact = functional.linear(x, weight, shift)
    got = linear_in_bf16(x, weight, shift)
    assert got.dtype == torch.bfloat16 and got.shape == exact.shape
    gradients = torch.autograd.grad(got, wanted, grad)
    assert all(g.dtype == torch.float32 for g in gradients)
    for a, b in zip((got, *gradients), (exact, *torch.autograd.grad(exact, wanted, grad.float())), strict=True):
        assert (a.float() - b).norm() <= 0.004 * b.norm()  # one rounding to bf16


def test_gradients_of_a_weight_used_many_times_add_up_in_fp32():
    """A thousand ones in bf16 would stay at 256."""
    weight, x = torch.zeros(1, 1, requires_grad=True), torch.ones(1, 1)
    sum(linear_in_bf16(x, weight, None).float() for _ in range(1000)).sum().backward()
    assert weight.grad.item() == 1000

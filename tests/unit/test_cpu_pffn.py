import pytest
import torch

from dlrm_scale.models.cpu_pffn import pffn_on_cpu
from dlrm_scale.models.ranking_model import build_model
from tests.support.model_inputs import run_config
from tests.support.pffn_twins import errors

# samples, tokens, d, K: of several blocks, of one token, of an odd number, and of widths that fill no pair of registers
SHAPES = [(2, 130, 64, 64), (3, 1, 32, 64), (5, 67, 48, 16), (4, 64, 16, 128)]


def inputs(num_samples=2, num_tokens=7, dim=16, hidden=32):
    torch.manual_seed(0)
    tokens, weight1, weight2 = (
        torch.randn(num_samples, *shape).bfloat16() for shape in ((num_tokens, dim), (dim, hidden), (hidden, dim))
    )
    bias1_K, scale1_K, bias2_d, scale2_d = torch.randn(hidden), torch.rand(hidden), torch.randn(dim), torch.rand(dim)
    return [tokens, weight1, bias1_K, scale1_K, weight2, bias2_d, scale2_d]


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "x".join(map(str, shape)))
def test_the_kernel_is_as_near_to_fp64_as_the_plain_twin(shape):
    found = errors(pffn_on_cpu, shape, "cpu", bf16=True)
    wrong = {name: (mine, plain) for name, (mine, plain) in found.items() if not mine <= 2 * plain or not plain < 2e-2}
    assert len(found) == 13 and wrong == {}


def test_it_gives_the_same_bits_in_other_threads():
    threads, results = torch.get_num_threads(), []
    for count in (1, 3):
        torch.set_num_threads(count)
        leaves = [tensor.requires_grad_() for tensor in inputs(num_samples=50)]
        out = pffn_on_cpu(*leaves)
        out.float().square().sum().backward()
        results.append([out, *(leaf.grad for leaf in leaves)])
    torch.set_num_threads(threads)
    assert all(one.equal(other) for one, other in zip(*results, strict=True))


@pytest.mark.parametrize("spoiled", [float("nan"), float("inf")])
def test_what_is_not_finite_spoils_its_own_token_and_sample_only(spoiled):
    tokens, *others = inputs()
    tokens[1, 2, 3] = spoiled
    leaves = [tensor.requires_grad_() for tensor in (tokens, *others)]
    out = pffn_on_cpu(*leaves)
    out.float().sum().backward()
    assert not out[1, 2].isfinite().any() and out[0].isfinite().all() and out[1, :2].isfinite().all()
    grad_tokens, grad_weight1 = leaves[0].grad, leaves[1].grad
    assert grad_tokens[0].isfinite().all() and grad_weight1[0].isfinite().all()
    assert not grad_tokens[1, 2].isfinite().any() and not grad_weight1[1].isfinite().all()


def test_it_reads_nothing_outside():
    for i, wrong in (
        (1, torch.zeros(2, 16, 16)),
        (2, torch.zeros(16)),
        (4, torch.zeros(1, 32, 16)),
        (6, torch.zeros(1)),
    ):
        given = inputs()
        given[i] = wrong
        with pytest.raises(ValueError, match="weights, biases and scales are"):
            pffn_on_cpu(*given)
    given = inputs()
    given[6] = given[6].bfloat16()
    with pytest.raises(ValueError, match="fp32 and contiguous"):
        pffn_on_cpu(*given)
    with pytest.raises(ValueError, match="multiples of 16"):
        pffn_on_cpu(*inputs(dim=24))


def test_the_operator_keeps_torch_s_rules():
    given = [tensor.requires_grad_() for tensor in inputs()]
    torch.library.opcheck(torch.ops.dlrm_scale.pffn_on_cpu.default, given)


@pytest.mark.parametrize(
    ("precision", "dim", "fused"), [("bf16", 32, pffn_on_cpu), ("bf16", 24, None), ("fp32", 32, None)]
)
def test_bf16_on_a_cpu_takes_it_where_the_widths_suit(precision, dim, fused):
    config = run_config(precision=precision, dim=dim)
    model = build_model(config, table_device=torch.device("meta"), dense_device=torch.device("cpu"))
    assert {layer.pffn.fused for layer in model.dense.arch.sequences} == {fused}

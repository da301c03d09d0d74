"""The trace on fake tensors against the same model run on real ones, and against counts by hand."""

import resource
import time

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from dlrm_scale.models import cpu_attention, cpu_pffn, kernels, layers
from dlrm_scale.models.cpu_library import load_library
from dlrm_scale.models.dense_trace import KeptStorages, count_flops, input_tensors, lookups, norm_of_cuda, trace_dense
from dlrm_scale.models.kernels import choose_kernels
from dlrm_scale.models.length_chunks import CHUNK_SAMPLES
from dlrm_scale.models.ranking_model import DensePart, build_arch
from tests.support.model_inputs import FEATURES, run_config, with_features

BATCH = 48
ARCHS = ("interformer", "dlrm", "dlrm_dcnv2", "logistic")


def really_kept(config, batch_size: int) -> int:
    dense, inputs = DensePart(build_arch(config), config.train.precision), lookups(config.features, batch_size)
    choose_kernels(dense.arch, config, torch.device("cpu"))
    kept = KeptStorages([*dense.parameters(), *input_tensors(inputs)])
    with kept:
        dense(*inputs)
    return kept.num_bytes


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("model", [*({"arch": arch} for arch in ARCHS), {"dim": 16}], ids=str)
def test_trace_is_that_of_a_real_run(model, precision):
    config = run_config(precision=precision, **model)
    trace = trace_dense(config, BATCH)
    assert trace.num_parameters == sum(p.numel() for p in build_arch(config).parameters()) > 0
    assert trace.activation_bytes == really_kept(config, BATCH)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_trace_holds_for_several_chunks(precision):
    """But for what puts samples in order."""
    config, batch_size = run_config(precision=precision, dim=16), 4 * CHUNK_SAMPLES
    assert trace_dense(config, batch_size).activation_bytes == pytest.approx(really_kept(config, batch_size), rel=3e-3)


def test_weights_cast_to_bf16_are_kept_on_a_gpu_alone():
    config = run_config(arch="dlrm", precision="bf16", top_hidden=[1024, 512])
    weights = sum(p.numel() for p in build_arch(config).parameters() if p.dim() == 2)
    assert trace_dense(config, 1, "cuda").activation_bytes == pytest.approx(2 * weights, rel=0.02)
    assert trace_dense(config, 1, "cpu").activation_bytes < 0.01 * weights


@pytest.mark.parametrize("mode", ["int", "s2n", "n2s", "sep", "sole"])
def test_every_exchange_mode_is_traced(mode):
    config = run_config(mode=mode)
    assert min(count_flops(config, BATCH)) > 0 and trace_dense(config, BATCH).activation_bytes > 0


def test_features_of_one_kind_are_traced():
    without_sequences = with_features(sequences=[])
    without_sequences["tables"] = {k: v for k, v in FEATURES["tables"].items() if k != "cate"}
    only_ids = {"tables": {"item": FEATURES["tables"]["item"]}, "dense": [], "sequences": FEATURES["sequences"]}
    only_ids["sequences"] = [{"name": "h", "max_length": 6, "fields": [{"name": "hi", "table": "item"}]}]
    only_ids["categorical"] = [{"name": "item_id", "table": "item"}]
    for features in (without_sequences, only_ids):
        assert min(count_flops(run_config(features, arch="dlrm"), BATCH)) > 0


def test_flops_of_dlrm_by_hand():
    """Two dense features, five tokens of width 8 (three ids, two pooled sequence fields) beside the dense one."""
    config = run_config(arch="dlrm", bottom_hidden=[32], top_hidden=[64, 16])
    num_tokens, num_pairs, dim, tasks = 6, 15, 8, 2
    bottom = [(2, 32), (32, dim)]
    top = [(dim + num_pairs, 64), (64, 16), (16, tasks)]
    macs = sum(i * o for i, o in bottom + top) + num_tokens * num_tokens * dim
    assert trace_dense(config, BATCH).num_parameters == sum(i * o + o for i, o in bottom + top)
    # two products a layer backward, but one for the layer whose input, the dense features, wants no gradient
    assert count_flops(config, BATCH) == (2 * BATCH * macs, 2 * BATCH * (2 * macs - 2 * 32))


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_flops_of_attention_by_hand(precision):
    """Of its equation: a rotation is no product, and probabilities that are worked out again are no work."""
    length, dim, layers = 30, 8, 2
    features = with_features(sequences=[{**FEATURES["sequences"][0], "max_length": length}])
    with_attention, without = (
        count_flops(run_config(features, precision=precision, attention=on), BATCH) for on in (True, False)
    )
    tokens = run_config().model.num_cls + length
    forward = 2 * BATCH * layers * (tokens * dim * 4 * dim + 2 * tokens * tokens * dim)
    assert [a - b for a, b in zip(with_attention, without, strict=True)] == [forward, 2 * forward]


def test_flops_of_pooling_by_hand():
    """By one query: scores and means of whole tokens for each head, and of the means the values; out of them the result."""
    length, dim, heads = 6, 8, 2
    pooled, mean = (count_flops(run_config(mode="sole", early_pooling=kind), BATCH) for kind in ("mha", "mean"))
    forward = 2 * BATCH * (2 * length * dim * heads + 2 * dim * dim) + 2 * dim * dim
    assert [a - b for a, b in zip(pooled, mean, strict=True)] == [forward, 2 * forward]


def test_pooling_by_many_queries_counts_as_by_keys_and_values():
    """16 queries of heads as wide as 8 columns let each head see more than keys and values hold."""
    one, two, four = (count_flops(run_config(num_pma=16, num_heads=n), BATCH) for n in (1, 2, 4))
    assert two == four and two[0] > one[0] and two[1] > one[1]


def test_a_gpu_takes_none_of_the_ways_of_cpus(monkeypatch):
    def refuse(*args):
        raise AssertionError("a way of CPUs")

    config = run_config(precision="bf16", dim=16)
    ways = ((cpu_attention, "rotary_attention"), (cpu_pffn, "pffn_on_cpu"), (kernels, "linear_in_bf16"))
    for module, name in ways:
        with monkeypatch.context() as patch:
            patch.setattr(module, name, refuse)
            trace_dense(config, BATCH, "cuda")
            with pytest.raises(AssertionError, match="a way of CPUs"):
                trace_dense(config, BATCH)


def test_without_a_compiler_pytorchs_kernels_count(monkeypatch):
    config = run_config(precision="bf16", dim=16)
    by_ours = trace_dense(config, BATCH)
    monkeypatch.setenv("CXX", "/nowhere/c++ -O1")
    monkeypatch.setattr(kernels, "load_library", load_library.__wrapped__)  # what was compiled before must not stand in
    with pytest.warns(UserWarning, match=r"there is no /nowhere/c\+\+"):
        kept = really_kept(config, BATCH)
    assert trace_dense(config, BATCH).activation_bytes == kept > by_ours.activation_bytes


def test_a_gpus_kernel_counts_where_it_would_run():
    """Of a token of d = K in bf16 it keeps 4 d + 4 bytes. PyTorch's operations keep 16 d + 16: the inputs of both products in bf16,
    those of GELU and of both norms in fp32, and two numbers a norm."""
    pytest.importorskip("triton")
    dim, num_layers = 32, 2
    by_torch, auto, triton = (
        trace_dense(run_config(precision="bf16", dim=dim, num_layers=num_layers, pffn_kernel=kernel), BATCH, "cuda")
        for kernel in ("torch", "auto", "triton")
    )
    tokens = num_layers * BATCH * (run_config().model.num_cls + 6)
    assert by_torch.activation_bytes - auto.activation_bytes == tokens * (12 * dim + 12)
    assert auto == triton


def test_a_gpus_kernel_does_not_count_where_it_would_not_run():
    by_torch, strict = (trace_dense(run_config(pffn_kernel=kernel), BATCH, "cuda") for kernel in ("torch", "auto"))
    assert by_torch == strict  # fp32 without TF32
    config = run_config(precision="bf16", pffn_kernel="triton")
    assert trace_dense(config, BATCH) == trace_dense(run_config(precision="bf16"), BATCH)


def test_flops_are_those_of_the_model_whatever_kernel_runs():
    by_torch, fused = (count_flops(run_config(precision="bf16", pffn_kernel=k), BATCH) for k in ("torch", "triton"))
    assert by_torch == fused


def test_a_norm_of_a_gpu_keeps_its_input_and_two_numbers_a_row():
    dim, rows = 32, 40
    with FakeTensorMode():
        norm, x = layers.RMSNorm(dim), torch.zeros(rows, dim, requires_grad=True)
        kept = KeptStorages(norm.parameters())
        with kept:
            assert norm_of_cuda(norm, x).shape == x.shape
    assert kept.num_bytes == 4 * rows * (dim + 2)


def test_memory_of_a_large_batch_is_not_allocated():
    tables = {name: {**table, "embedding_dim": 256} for name, table in FEATURES["tables"].items()}
    config = run_config(with_features(tables=tables), precision="bf16", dim=256, num_heads=4, head_hidden=[1024, 512])
    before_kb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    started = time.monotonic()
    trace = trace_dense(config, 65_536)
    assert trace.activation_bytes > 10e9
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before_kb < 300_000
    assert time.monotonic() - started < 20


def test_trace_leaves_the_random_state_alone():
    state = torch.get_rng_state()
    trace_dense(run_config(), BATCH)
    assert torch.equal(torch.get_rng_state(), state)

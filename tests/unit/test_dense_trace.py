"""The trace on fake tensors against the same model run on real ones, and against counts by hand."""

import resource
import time

import pytest
import torch

from dlrm_scale.models.dense_trace import KeptStorages, count_flops, input_tensors, lookups, run_counted, trace_dense
from dlrm_scale.models.ranking_model import DensePart, build_arch
from tests.support.model_inputs import FEATURES, run_config, with_features

BATCH = 48
ARCHS = ("interformer", "dlrm", "dlrm_dcnv2", "logistic")


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("arch", ARCHS)
def test_trace_is_that_of_a_real_run(arch, precision):
    config = run_config(arch=arch, precision=precision)
    dense = DensePart(build_arch(config), precision)
    inputs = lookups(config.features, BATCH)
    kept = KeptStorages([*dense.parameters(), *input_tensors(inputs)])
    with kept:
        dense(*inputs)
    trace = trace_dense(config, BATCH)
    assert trace.num_parameters == sum(p.numel() for p in dense.parameters()) > 0
    flops = count_flops(config, BATCH)
    assert flops == run_counted(dense, inputs) and flops[0] == trace.forward_flops
    # fake attention in bf16 keeps the logarithms of its sums in bf16, real attention in fp32
    assert trace.activation_bytes == pytest.approx(kept.num_bytes, rel=2e-3 if precision == "bf16" else 0)


@pytest.mark.parametrize("mode", ["int", "s2n", "n2s", "sep", "sole"])
def test_every_exchange_mode_is_traced(mode):
    trace = trace_dense(run_config(mode=mode), BATCH)
    assert trace.forward_flops > 0 and trace.activation_bytes > 0


def test_features_of_one_kind_are_traced():
    without_sequences = with_features(sequences=[])
    without_sequences["tables"] = {k: v for k, v in FEATURES["tables"].items() if k != "cate"}
    only_ids = {"tables": {"item": FEATURES["tables"]["item"]}, "dense": [], "sequences": FEATURES["sequences"]}
    only_ids["sequences"] = [{"name": "h", "max_length": 6, "fields": [{"name": "hi", "table": "item"}]}]
    only_ids["categorical"] = [{"name": "item_id", "table": "item"}]
    for features in (without_sequences, only_ids):
        assert trace_dense(run_config(features, arch="dlrm"), BATCH).forward_flops > 0


def test_flops_and_activations_of_dlrm_by_hand():
    """Two dense features, five tokens of width 8 (three ids, two pooled sequence fields) beside the dense one."""
    config = run_config(arch="dlrm", bottom_hidden=[32], top_hidden=[64, 16])
    trace = trace_dense(config, BATCH)
    num_tokens, num_pairs, dim, tasks = 6, 15, 8, 2
    bottom = [(2, 32), (32, dim)]
    top = [(dim + num_pairs, 64), (64, 16), (16, tasks)]
    macs = sum(i * o for i, o in bottom + top) + num_tokens * num_tokens * dim
    assert trace.num_parameters == sum(i * o + o for i, o in bottom + top)
    assert trace.forward_flops == 2 * BATCH * macs
    # two products a layer, but one for the layer whose input, the dense features, wants no gradient
    assert count_flops(config, BATCH) == (trace.forward_flops, 2 * BATCH * (2 * macs - 2 * 32))


def test_flops_of_attention_are_counted():
    """Doubling the events more than doubles attention's products, and nothing else's grows faster than the events."""
    short, long = (
        with_features(sequences=[{**FEATURES["sequences"][0], "max_length": length}]) for length in (32, 512)
    )
    without = [trace_dense(run_config(f, attention=False, num_pma=0), 4).forward_flops for f in (short, long)]
    with_attention = [trace_dense(run_config(f), 4).forward_flops for f in (short, long)]
    assert without[1] < 16 * without[0]
    assert with_attention[1] > 30 * with_attention[0]


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

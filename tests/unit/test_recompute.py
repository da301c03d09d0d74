"""Layers that are run again give bitwise the gradients of layers that are not, keep less, and are traced as they are."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from dlrm_scale.config import RunConfig
from dlrm_scale.config_io import parse_config
from dlrm_scale.errors import ConfigError
from dlrm_scale.models import length_chunks
from dlrm_scale.models.dense_trace import KeptStorages, count_flops, input_tensors, lookups, trace_dense
from dlrm_scale.models.kernels import choose_kernels
from dlrm_scale.models.ranking_model import DensePart, build_arch
from dlrm_scale.models.recompute import recomputed_layers
from tests.support.model_inputs import run_config, with_checkpointing

BATCH = 48


def gradients(config: RunConfig) -> tuple[dict[str, torch.Tensor], int]:
    """By parameter and input; and the FLOPs of both passes."""
    dense, inputs = DensePart(build_arch(config), config.train.precision), lookups(config.features, BATCH)
    choose_kernels(dense.arch, config, torch.device("cpu"))
    torch.manual_seed(3)  # of the inputs and of dropout
    for tensor in input_tensors(inputs):
        if tensor.requires_grad:
            tensor.data.normal_()
    with FlopCounterMode(display=False) as counter:
        dense(*inputs).sum().backward()
    found = dict(dense.named_parameters()) | {f"input {i}": t for i, t in enumerate(input_tensors(inputs))}
    return {name: t.grad for name, t in found.items() if t.requires_grad}, counter.get_total_flops()


@pytest.mark.parametrize(
    "model", [{}, {"dim": 16}, {"dropout": 0.3}, {"mode": "sole"}, {"mode": "sep", "num_layers": 3}], ids=str
)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("chunk_samples", [BATCH, BATCH // 3])
def test_gradients_are_bitwise_those_without(monkeypatch, chunk_samples, precision, model):
    monkeypatch.setattr(length_chunks, "CHUNK_SAMPLES", chunk_samples)
    config = run_config(precision=precision, **model)
    (plain, flops), (recomputed, more_flops) = gradients(config), gradients(with_checkpointing(config))
    assert len(plain) > 10 and plain.keys() == recomputed.keys()
    assert [name for name, grad in plain.items() if not torch.equal(grad, recomputed[name])] == []
    assert more_flops > 1.1 * flops  # layers really ran twice


def test_names_of_parameters_stay():
    config = run_config()
    names = [[name for name, _ in build_arch(c).named_parameters()] for c in (config, with_checkpointing(config))]
    assert names[0] == names[1]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_trace_counts_what_is_kept_and_the_layer_that_is_run_again(precision):
    """Against real tensors: what autograd keeps outside the layers, and what each layer keeps when it runs alone."""
    config = with_checkpointing(run_config(precision=precision, num_layers=3, dim=16))
    dense, inputs = DensePart(build_arch(config), precision), lookups(config.features, BATCH)
    choose_kernels(dense.arch, config, torch.device("cpu"))
    outside, in_layer = KeptStorages([*dense.parameters(), *input_tensors(inputs)]), []
    calls = []
    for layer in recomputed_layers(dense.arch):
        plain = layer.plain
        layer.plain = lambda *args, plain=plain: calls.append((plain, args)) or plain(*args)
    with outside:
        dense(*inputs)
    for plain, args in calls:
        kept = KeptStorages(dense.parameters())
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"), kept:
            plain(*args)
        in_layer.append(kept.num_bytes)
    traced = trace_dense(config, BATCH)
    assert traced.activation_bytes == outside.num_bytes + max(in_layer)


def test_deep_arches_keep_less_and_count_no_more_work():
    config = run_config(num_layers=6)
    plain, recomputed = trace_dense(config, BATCH), trace_dense(with_checkpointing(config), BATCH)
    assert recomputed.activation_bytes < 0.5 * plain.activation_bytes
    assert count_flops(with_checkpointing(config), BATCH) == count_flops(config, BATCH)


def test_an_arch_without_layers_is_refused():
    tree = with_checkpointing(run_config(arch="logistic")).model_dump(mode="json")
    with pytest.raises(ConfigError, match=r"activation_checkpointing is true, but model\.arch logistic has no layers"):
        parse_config(tree, "test")

"""The benchmark of the dense arch: what it times, and its counted limits against counts by hand."""

import argparse
from dataclasses import asdict

import pytest
import torch
import yaml
from rich.console import Console

from dlrm_scale.errors import ConfigError
from dlrm_scale.models.dense_trace import trace_dense
from tests.support.model_inputs import FEATURES, run_config, with_checkpointing
from tools.benchmark.dense_work import DenseWork, count_dense, limits_ms
from tools.benchmark.model import add_arguments, run, show
from tools.benchmark.model_cells import BASE, cells_of
from tools.benchmark.peaks import GPU_CLASSES, Peaks
from tools.commands import PLAIN

BATCH = 48
LOGISTIC = {
    "tables": {"user": FEATURES["tables"]["user"]},
    "dense": FEATURES["dense"],
    "categorical": [{"name": "user_id", "table": "user"}],
    "sequences": [],
    "labels": ["click"],
}


@pytest.fixture
def arguments(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(run_config().model_dump(mode="json")))
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    return lambda *words: parser.parse_intermixed_args(["--config", str(path), *words])


def test_every_variant_is_made_at_every_combination_of_sizes(arguments):
    args = arguments(
        *("seed=0", "--axis", "dim", "16", "32", "--axis", "sequence", "5"),
        *("--axis", "batch", "64", "128", "--variant", "half", "train.precision=bf16"),
    )
    cells = cells_of(args)
    assert [[c.name for c in of_sizes] for of_sizes in cells] == [[BASE, "half"]] * 4
    assert [of_sizes[0].sizes for of_sizes in cells] == [
        {"dim": dim, "sequence": 5, "batch": batch} for dim in (16, 32) for batch in (64, 128)
    ]
    base, half = cells[-1]
    assert base.config.model.dim == 32 and base.batch_size == 128
    assert {t.embedding_dim for t in base.config.features.tables.values()} == {32}
    assert base.config.features.sequences[0].max_length == 5
    assert (base.config.train.precision, half.config.train.precision) == ("fp32", "bf16")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--axis", "width", "8"), "--axis has no 'width'; it has dim, sequence, batch"),
        (("--axis", "dim"), "--axis dim names no size"),
        (("--axis", "dim", "16", "--axis", "dim", "32"), "--axis dim is given twice"),
        (("--variant", BASE, "seed=1"), "two variants of the name 'base'"),
        (("--device", "cpu", "--variant", "fast", "train.tf32=true"), "only CUDA has TF32"),
    ],
)
def test_what_cannot_be_timed_is_refused(arguments, words, message):
    with pytest.raises(ConfigError, match=message):
        run(arguments(*words), Console(stderr=True))


def test_work_of_a_linear_model_by_hand():
    """logits = [dense || row] w + b, of two dense features and a row of eight: the forward pass keeps what it has put together."""
    work = count_dense(run_config(LOGISTIC, arch="logistic"), BATCH, "cpu")
    dense, row, both, logits = (BATCH * 4 * n for n in (2, 8, 10, 1))
    weights, bias = 10 * 4, 4
    assert (work.forward_flops, work.backward_flops) == (2 * BATCH * 10, 2 * 2 * BATCH * 10)
    assert work.activation_bytes == both
    assert work.kept_bytes == 2 * (dense + row) + 2 * both + 3 * (weights + bias)
    joined, product, total = dense + row + both, both + weights + bias + logits, logits + 4
    # the gradient of the sum is one number, expanded; the rows' gradient is joined of one part
    back = (4 + 4) + (4 + weights + both) + (4 + both + weights) + (4 + bias) + 2 * row
    assert work.op_bytes == joined + product + total + back


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_layers_that_are_run_again_are_no_work_but_take_time_and_memory(device):
    config = run_config(num_layers=3, precision="bf16")
    plain, again = (count_dense(c, BATCH, device) for c in (config, with_checkpointing(config)))
    assert (again.forward_flops, again.backward_flops) == (plain.forward_flops, plain.backward_flops)
    assert again.op_bytes > 1.2 * plain.op_bytes
    trace = trace_dense(with_checkpointing(config), BATCH, device)
    assert again.activation_bytes == trace.kept_bytes + max(trace.layer_bytes) < plain.activation_bytes
    assert (
        again.kept_bytes >= plain.kept_bytes
    )  # each layer keeps and reads, when it runs again, what it would have kept


def test_limits_are_work_over_peaks():
    work = DenseWork(2_000, 4_000, activation_bytes=0, kept_bytes=500, op_bytes=5_000)
    peaks = Peaks({"fp32": 1e6}, 1e5)
    assert limits_ms(work, peaks, "fp32") == {"matrix": 6.0, "kept": 5.0, "op_by_op": 50.0}
    assert limits_ms(work, peaks, "bf16")["matrix"] is None
    assert all(set(gpu.flops_per_s) == {"fp32", "tf32", "bf16"} for gpu in GPU_CLASSES.values())


def test_more_events_ask_more_of_everything():
    short, long = (
        count_dense(run_config({**FEATURES, "sequences": [{**FEATURES["sequences"][0], "max_length": n}]}), 8, "cpu")
        for n in (10, 100)
    )
    for name in ("forward_flops", "backward_flops", "activation_bytes", "kept_bytes", "op_bytes"):
        assert getattr(long, name) > 4 * getattr(short, name), name
    assert short.op_bytes > 3 * short.kept_bytes


def test_expected_and_measured_results_are_shown(arguments, capsys):
    console = Console(**PLAIN)
    expected = run(arguments("--axis", "batch", "64", "--expected", "H100", "H200"), console)
    assert [row["gpu"] for row in expected["rows"]] == ["H100", "H200"]
    slow, fast = (row["limits_ms"] for row in expected["rows"])
    assert slow["matrix"] == fast["matrix"] and slow["kept"] > fast["kept"]
    (cell,) = cells_of(arguments("--axis", "batch", "64"))[0]
    assert expected["rows"][0]["work"] == asdict(count_dense(cell.config, 64, "cuda"))
    threads = torch.get_num_threads()
    measured = run(arguments("--device", "cpu", "--threads", "1", "--seconds", "1", "--profile"), console)
    torch.set_num_threads(threads)
    (row,) = measured["rows"]
    assert 0 < row["forward_ms"]["median"] < row["step_ms"]["median"] and row["step_over_base"]["median"] == 1
    assert row["peak_bytes"] is None and 0 < row["mfu"] < 1
    assert "aten::" in measured["costliest"][BASE]
    for result in (expected, measured):
        show(result, console)
    assert "nothing of it is measured" in capsys.readouterr().out

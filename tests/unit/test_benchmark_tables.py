"""What the benchmarks print as tables fits a terminal of 80 columns, titles too, each figure whole and in one line."""

from io import StringIO

import pytest
from rich.console import Console

from dlrm_scale.training.clock import STAGES
from tools.benchmark import data, growth, model, train
from tools.benchmark.tables import in_digits
from tools.commands import PLAIN

CONFIG = "configs/benchmark/interformer_t100_of_a_name_that_takes_most_of_a_line.yaml"
LONG = "activation_checkpointing and bf16"
SPREAD = {"median": 12_558.27, "p10": 12_283.4, "p90": 13_600.1}
PEAKS = {"flops_per_s": {"fp32": 67e12, "tf32": 494.5e12, "bf16": 989.5e12}, "copy_bytes_per_s": 4.8e12}
WORK = {"forward_flops": 4e14, "backward_flops": 8e14, "activation_bytes": 183_456_000_000}


def shown(show, result):
    file = StringIO()
    show(result, Console(file=file, width=80, **PLAIN))
    lines = file.getvalue().splitlines()
    titles = [line for line in lines if line.startswith(CONFIG)]
    tables = [line for line in lines if "  " in line or "─" in line]
    assert "…" not in file.getvalue() and titles and max(map(len, titles + tables)) <= 80
    return file.getvalue().split()


def row(variant, precision, **of_the_kind):
    return {
        "variant": variant,
        "precision": precision,
        "sizes": {"dim": 256, "sequence": 1000, "batch": 32_768},
        "work": WORK,
        "limits_ms": {"matrix": 257.84, "kept": 12_185.9, "op_by_op": 41_024.2},
        **of_the_kind,
    }


def test_times_of_the_dense_arch():
    measured = {
        "forward_ms": SPREAD,
        "step_ms": SPREAD,
        "step_over_base": {"median": 0.914},
        "mfu": 0.551,
        "peak_bytes": 141.2e9,
        "peaks": PEAKS,
    }
    rows = [row(name, "bf16", **measured) for name in (model.BASE, "compiled", LONG)]
    words = shown(model.show, {"config": CONFIG, "device": "NVIDIA H200", "rows": rows, "costliest": {}})
    for figure in ("12,558", "12,283..13,600", "1.09", "55.1%", "258", "12,186", "41,024", "183", "141", "32,768"):
        assert figure in words


def test_limits_of_the_dense_arch():
    rows = [row(name, "bf16", gpu=gpu) for name in (model.BASE, LONG) for gpu in ("H200", "B200")]
    words = shown(model.show, {"config": CONFIG, "device": None, "rows": rows})
    for figure in ("256", "1,000", "32,768", "B200", "1,200", "183", "258", "12,186", "41,024"):
        assert words.count(figure) >= 2


def trained(names, repeats):
    run = {
        "mfu": {"fp32": 0.551},
        "mbu": 0.123,
        "precision": "fp32",
        "step_ms": {"p50": 12_558.27, "p90": 13_600.1},
        "peak_memory": [{"host_bytes": 23_456_000_000}],
        "stage_ms": dict.fromkeys(STAGES, 12_345.6),
        "peaks": PEAKS,
    }
    of_variant = {
        "samples_per_s": {"median": 1_234_567.0},
        "over_base": {"median": 0.914, "least": 0.853, "most": 0.951},
        "runs": [run],
    }
    result = {"config": CONFIG, "steps": 40, "repeats": repeats, "trace": None, "costliest": None}
    return {**result, "variants": dict.fromkeys(names, of_variant)}


def test_training_of_long_names():
    names = (train.BASE, "without data", "stock TorchRec, 2 ranks of 1 thread, our allocator", LONG)
    words = shown(train.show, trained(names, repeats=5))
    for figure in ("1,234,567", "12,558", "13,600", "55.1%", "12.3%", "23.5"):
        assert words.count(figure) == len(names)
    assert words.count("0.91") == words.count("(0.85..0.95)") == len(names) - 1
    assert words.count("12,346") == len(names) * len(STAGES)


def test_rows_a_second():
    reading = {name: SPREAD for name in ("rows_per_core_s", "rows_per_s", "over_loader")}
    reading["parts_ns_per_row"] = dict.fromkeys(data.PARTS, 1_234.0)
    readings = {"loader": reading, "plain loop": reading}
    result = {"config": CONFIG, "rows": 1_000_000, "rounds": 12, "open_seconds": 1.0, "consumed_rows_per_s": None}
    words = shown(data.show, {**result, "readings": readings})
    assert words.count("(12,283..13,600)") == 2


def test_growth_with_sizes():
    speed = {"median": 1_234_567.0, "least": 1_123_456.0, "most": 1_345_678.0}
    cell = {"size": 100_000_000, "does_not_fit": None, "repeats": 3, "samples_per_s": speed, "host_gb_a_rank": 23.4}
    cells = [{"axis": axis, **cell} for axis in growth.AXES]
    words = shown(growth.show, {"config": CONFIG, "repeats": 3, "cells": cells, "out": "growth.json", "html": None})
    assert words.count("(1,123,456..1,345,678)") == words.count("23.40") == 4


def test_a_single_repeat_has_no_range():
    speed = {"median": 1_234_567.0, "least": 1_234_567.0, "most": 1_234_567.0}
    cell = {
        "axis": "rows",
        "size": 7,
        "does_not_fit": None,
        "repeats": 1,
        "samples_per_s": speed,
        "host_gb_a_rank": 23.4,
    }
    grown = {"config": CONFIG, "repeats": 1, "cells": [cell], "out": "growth.json", "html": None}
    for words in (shown(train.show, trained((train.BASE, "fast"), repeats=1)), shown(growth.show, grown)):
        text = " ".join(words)
        assert " 1 repeat" in text and "repeats" not in text and ".." not in text and "edian" not in text.split("─")[0]
        assert "1,234,567" in words


@pytest.mark.parametrize(
    ("value", "told"), [(0.0, "0.000"), (0.1234, "0.123"), (1.234, "1.23"), (12.34, "12.3"), (12_345.6, "12,346")]
)
def test_three_digits_or_all_before_the_point(value, told):
    assert in_digits(value) == told

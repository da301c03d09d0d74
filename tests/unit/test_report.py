"""What a run leaves behind: lines of records.jsonl that any JSON reader takes, and tables that fit a terminal."""

import io
import json
import math
from pathlib import Path

import pytest
from rich.console import Console

from dlrm_scale.cluster import this_cluster
from dlrm_scale.config_io import fingerprint
from dlrm_scale.resilience.goodput import Goodput
from dlrm_scale.sharding.plan import Plan, RankLoad, TablePlan, plan_request
from dlrm_scale.training.report import append_line, print_end, print_start, record_line, run_record
from dlrm_scale.training.result import TrainResult
from tests.support.configs import tiny_config

RUN_DIR = Path("runs/tiny/20260102-030405")
GOODPUT = Goodput(useful=40.0, recomputed=0.0, startup=7.0, down=0.0, save=3.0, evaluation=0.0)


def strict_json(line: str):
    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} is not JSON")

    return json.loads(line, parse_constant=refuse)


def printed(show, *args) -> list[str]:
    out = io.StringIO()
    show(Console(width=80, file=out), *args)
    lines = out.getvalue().splitlines()
    assert all(len(line) <= 100 for line in lines) and "…" not in out.getvalue()  # nothing cut off
    return lines


def hand_made_plan(num_tables: int) -> Plan:
    """`num_tables` copies of one table: the first on every rank, the others on rank 1."""
    request = plan_request(tiny_config(), this_cluster(2, 2, "cpu"), 0)
    names = [f"table_{i:02}" for i in range(num_tables)]
    request = request.model_copy(update={"tables": dict.fromkeys(names, request.tables["user"])})
    everywhere = TablePlan(sharding_type="data_parallel", compute_kernel="dense", ranks=(0, 1), shards=())
    on_one = TablePlan(sharding_type="table_wise", compute_kernel="fused", ranks=(1,), shards=())
    tables = dict.fromkeys(names, on_one) | {names[0]: everywhere}
    loads = tuple(RankLoad(device_bytes={"weights": 1.0}, host_bytes={}, step_ms={"forward": 1.0}) for _ in range(2))
    return Plan(
        fingerprint=fingerprint(request), request=request, tables=tables, ranks=loads, score_ms=1.0, bound_ms=1.0
    )


def steps_ms(*totals: float) -> list[dict[str, float]]:
    return [
        {
            "data_wait": 0.1 * t,
            "input_dist": 0.2 * t,
            "embedding_forward": 0.1 * t,
            "dense_forward": 0.2 * t,
            "dense_backward": 0.3 * t,
            "embedding_backward": 0.1 * t,
            "optimizer": 0.0,
            "step": t,
        }
        for t in totals
    ]


@pytest.fixture
def result() -> TrainResult:
    return TrainResult(
        num_steps=20,
        samples_consumed=12800,
        timed_samples=9000,
        timed_seconds=4.5,
        step_ms=steps_ms(10.0, 20.0, 30.0),
        losses=[0.7, 0.6],
        eval_metrics={
            "click": {"ne": 0.8125, "auc": 0.7344, "calibration": 1.0312, "log_loss": math.nan, "base_rate": 0.25}
        },
        mended={f"kind_{i}": i for i in range(1, 11)},
    )


def test_each_record_is_one_line_of_strict_json(tmp_path):
    path = tmp_path / "new" / "records.jsonl"
    append_line(
        path, record_line({"losses": [0.5, math.nan, (math.nan, 1)], "metrics": {"auc": math.nan}, "note": "a\nb"})
    )
    append_line(path, record_line({"name": "second"}))
    lines = path.read_text().splitlines()
    assert [strict_json(line) for line in lines] == [
        {"losses": [0.5, None, [None, 1]], "metrics": {"auc": None}, "note": "a\nb"},
        {"name": "second"},
    ]


@pytest.mark.parametrize("infinite", [math.inf, -math.inf])
def test_an_infinite_figure_is_null(tmp_path, infinite):
    append_line(tmp_path / "records.jsonl", record_line({"losses": [infinite], "metrics": {"log_loss": infinite}}))
    assert strict_json((tmp_path / "records.jsonl").read_text()) == {"losses": [None], "metrics": {"log_loss": None}}


def test_record_of_a_run_holds_its_speed_by_stage(tmp_path, result):
    memory = [{"host_bytes": 7}, {"host_bytes": 9}]
    record = run_record(tiny_config(), this_cluster(2, 2, "cpu"), hand_made_plan(2), result, memory, None, GOODPUT)
    append_line(tmp_path / "records.jsonl", record_line(record))
    record = strict_json((tmp_path / "records.jsonl").read_text())
    assert record["samples_per_second"] == 2000.0
    assert record["goodput"]["fraction"] == 0.8 and record["goodput"]["save_s"] == 3.0
    assert record["step_ms"] == pytest.approx({"p10": 12.0, "p50": 20.0, "p90": 28.0})
    assert {stage: ms["p50"] for stage, ms in record["stage_ms"].items()} == pytest.approx(
        {"data_wait": 2.0, "input_dist": 4.0, "embedding_forward": 2.0, "dense_forward": 4.0}
        | {"dense_backward": 6.0, "embedding_backward": 2.0, "optimizer": 0.0}
    )
    assert record["plan"]["sharding_types"] == {"table_00": "data_parallel", "table_01": "table_wise"}
    assert record["peak_memory"] == memory and record["metrics"]["click"]["log_loss"] is None


def test_start_shows_where_each_table_lies():
    lines = printed(print_start, tiny_config(), hand_made_plan(2), RUN_DIR, 20)
    [first], [second] = ([line for line in lines if name in line] for name in ("table_00", "table_01"))
    assert [cell.strip() for cell in first.strip("│").split("│")] == ["table_00", "500 x 8", "data_parallel", "all"]
    assert [cell.strip() for cell in second.strip("│").split("│")] == ["table_01", "500 x 8", "table_wise", "1"]
    assert any(str(RUN_DIR) in line for line in lines)


@pytest.mark.parametrize(
    ("train", "said"),
    [
        ({"max_steps": 500}, "train.max_steps is 500, but 1 epoch(s) have 20 steps"),
        ({"schedule": {"warmup_steps": 20}}, "warmup_steps (20) last all 20 steps"),
        ({"max_steps": 20, "schedule": {"warmup_steps": 19}}, None),
    ],
)
def test_start_notes_settings_that_the_data_is_too_short_for(train, said):
    text = " ".join(printed(print_start, tiny_config(train=train), hand_made_plan(2), RUN_DIR, 20))
    assert ("note:" in text) == (said is not None) and (said is None or said in text)


def test_start_of_many_tables_says_how_many_are_left_out():
    lines = printed(print_start, tiny_config(), hand_made_plan(45), RUN_DIR, 20)
    assert sum("table_" in line for line in lines) == 40 and any("5 more tables" in line for line in lines)


def test_end_shows_the_model_beside_the_oracle(result):
    oracle = {"click": {"ne": 0.7891, "auc": 0.7656, "gauc": 0.75, "calibration": 0.9984, "log_loss": 0.5156}}
    lines = printed(print_end, tiny_config(), result, oracle, RUN_DIR, GOODPUT)
    [model], [best] = ([line for line in lines if name in line] for name in ("click: interformer", "click: oracle"))
    assert model.replace("│", " ").split()[2:] == ["0.8125", "0.7344", "-", "1.0312", "-"]
    assert best.replace("│", " ").split()[2:] == ["0.7891", "0.7656", "0.7500", "0.9984", "0.5156"]


@pytest.mark.parametrize(
    ("base_rate", "said"),
    [(1.0, "it is 1 in all held-out samples"), (float("nan"), "no held-out sample has a weight above 0"), (0.5, None)],
)
def test_end_says_why_there_is_no_auc(base_rate, said):
    metrics = {"click": {"ne": float("nan"), "auc": float("nan"), "base_rate": base_rate}}
    text = "\n".join(printed(print_end, tiny_config(), TrainResult(eval_metrics=metrics), None, RUN_DIR, GOODPUT))
    assert ("click has no NE and AUC" in text) == bool(said) and (said or "") in text


def test_end_shows_speed_and_the_commonest_mends(result):
    lines = printed(print_end, tiny_config(), result, None, RUN_DIR, GOODPUT)
    text = "\n".join(lines)
    assert "2,000 samples/s" in text and "12.0/20.0/28.0" in text
    assert "input_dist 4.0" in text and "dense_backward 6.0" in text
    assert "goodput 80% of 50 s over all attempts; the rest, s: startup 7.0, save 3.0" in text
    assert [line.split(":")[0].strip() for line in lines if "kind_" in line] == [f"kind_{i}" for i in range(10, 4, -1)]
    assert "4 more kinds" in text and f"tensorboard --logdir {RUN_DIR}" in text and "oracle" not in text


def test_end_of_a_run_that_was_all_warm_up_has_no_speed():
    lines = printed(print_end, tiny_config(), TrainResult(num_steps=2), None, RUN_DIR, GOODPUT)
    assert not any("samples/s" in line or "held-out" in line for line in lines)

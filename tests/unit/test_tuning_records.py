"""Records: what a run leaves is what is read back; what cannot be used is named by file and line."""

import json
import math

import pytest

from dlrm_scale.errors import ConfigError
from dlrm_scale.record_format import hardware_facts
from dlrm_scale.resilience.goodput import Goodput
from dlrm_scale.training.clock import STAGES
from dlrm_scale.training.report import record_line, run_record
from dlrm_scale.training.result import TrainResult
from dlrm_scale.tuning.records import append_record, read_records, records_fingerprint
from tests.support.tuning import PLANS, tiny_space

GOODPUT = Goodput(useful=1.0, recomputed=0.0, startup=0.0, down=0.0, save=0.0, evaluation=0.0)
VERSIONS = {"torch": "2", "torchrec": "1", "fbgemm-gpu": "1", "dlrm-scale": "0", "python": "3"}


@pytest.fixture(scope="module")
def line() -> dict:
    """As the trainer writes it."""
    space, plans = tiny_space(), PLANS
    point = space.point({"ranks": 2, "batch": 128, "pipeline": "none", "user": "row_wise"})
    job = space.job(point)
    result = TrainResult(num_steps=20, step_ms=[dict.fromkeys((*STAGES, "step"), t) for t in (10.0, 20.0, 30.0)])
    record = run_record(job.config, job.cluster, plans.plan(job.config, job.cluster), result, [], None, GOODPUT)
    return json.loads(record_line(record)) | {"versions": VERSIONS}


def write(path, *lines):
    path.write_text("".join((text if isinstance(text, str) else json.dumps(text)) + "\n" for text in lines))
    return path


def test_what_the_trainer_writes_is_read(tmp_path, line):
    [record] = read_records([write(tmp_path / "records.jsonl", line)]).records
    assert (record.outcome, record.step_ms, record.step_ms_spread) == ("ok", 20.0, pytest.approx(0.8))
    assert record.sharding_types["user"] == "row_wise" and len(record.loads) == 2
    assert record.job.config.train.global_batch_size == 128 and record.job.launch.num_ranks == 2
    assert record.trial is None and record.num_steps == 20
    assert record.hardware == hardware_facts()["fingerprint"]


def test_the_parts_of_a_trial_are_read(tmp_path, line):
    trial = {"space": "abc", "point": {"batch": 64, "pipeline": "none"}, "steps": 30, "seed": 4}
    parts = {"trial": trial, "hardware": {"fingerprint": "h"}, "launch": {"threads_per_rank": 2}}
    failed = {"outcome": "does not fit", "reason": "killed by the kernel", "step_ms": None, "plan": None}
    [record] = read_records([write(tmp_path / "r.jsonl", line | parts | failed)]).records
    assert (record.outcome, record.reason, record.hardware) == ("does not fit", "killed by the kernel", "h")
    assert record.trial.point == trial["point"] and record.trial.steps == 30 and record.job.launch.threads_per_rank == 2
    assert math.isnan(record.step_ms) and record.loads == ()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ('{"format": 1, "outcome": "o', "no whole line of JSON"),
        ("[1]", "is list, not a record"),
        ({"format": 2}, "format is 2, but this version reads 1"),
        ({"step_ms": {"p10": 1.0, "p50": None, "p90": 2.0}}, "p10, p50 and p90 above 0"),
        ({"step_ms": {"p10": 1.0, "p50": math.nan, "p90": 2.0}}, "above 0"),
        ({"step_ms": {}}, "too few steps behind the warm-up"),
        ({"step_ms": {"p10": 1.0, "p50": -3.0, "p90": 2.0}}, "above 0"),
        ({"outcome": "great"}, "'great'"),
        ({"outcome": "failed", "reason": ""}, "no reason is given"),
        ({"plan": None}, "has no plan"),
        ({"config": {"name": "x"}}, "features: is required"),
        ({"cluster": {"device": "cpu"}}, "its cluster"),
        ({"trial": {"space": "abc", "point": {}, "steps": 0}}, "steps"),
        ({"hardware": {}}, "has no fingerprint"),
    ],
)
def test_a_line_that_cannot_be_used_is_named_and_the_others_are_read(tmp_path, line, change, said):
    bad = change if isinstance(change, str) else line | change
    path = write(tmp_path / "records.jsonl", line, bad, line)
    history = read_records([path])
    [problem] = history.problems
    assert problem.where == f"{path}:2" and said in str(problem), str(problem)
    assert len(history.records) == 2


def test_a_plan_of_other_tables_is_refused(tmp_path, line):
    other = line["plan"] | {"sharding_types": {"user": "row_wise"}}
    [problem] = read_records([write(tmp_path / "r.jsonl", line | {"plan": other})]).problems
    assert "other tables" in problem.reason


def test_a_line_behind_one_that_was_cut_off_is_not_lost(tmp_path, line):
    path = tmp_path / "new" / "records.jsonl"
    append_record(path, line)
    with path.open("a") as file:
        file.write('{"format": 1, "outc')  # its process was killed
    append_record(path, line)
    history = read_records([path])
    assert len(history.records) == 2 and [p.where for p in history.problems] == [f"{path}:2"]


def test_records_of_other_hardware_and_versions_are_kept_apart(tmp_path, line):
    here = line | {"hardware": {"fingerprint": "here"}}
    path = write(
        tmp_path / "r.jsonl",
        here,
        line | {"hardware": None},  # of a version that did not tell
        line | {"hardware": {"fingerprint": "there"}},
        here | {"versions": VERSIONS | {"torch": "3"}},
        here | {"versions": VERSIONS | {"python": "3.12"}},  # not one that times depend on
    )
    split = read_records([path]).split("here", VERSIONS)
    assert (len(split.usable), len(split.prior)) == (2, 3)
    assert split.why == {"hardware not told": 1, "hardware there, here here": 1, "torch 3, here 2": 1}


def test_an_empty_history_says_what_to_do(tmp_path):
    with pytest.raises(ConfigError, match="0 measured runs, but 1 are needed; 0 lines cannot be used"):
        read_records([write(tmp_path / "r.jsonl")]).require()
    with pytest.raises(ConfigError, match="cannot read the records"):
        read_records([tmp_path / "none.jsonl"])


def test_when_all_trials_failed_their_reasons_are_told(tmp_path, line):
    failed = line | {"outcome": "failed", "reason": "rank 1 was ended by SIGKILL", "step_ms": None}
    with pytest.raises(ConfigError, match="2 runs did not fit or failed: rank 1 was ended by SIGKILL"):
        read_records([write(tmp_path / "r.jsonl", failed, failed)]).require()


def test_the_fingerprint_is_of_what_was_measured_in_any_order(tmp_path, line):
    faster = line | {"step_ms": {"p10": 1.0, "p50": 2.0, "p90": 3.0}}
    a, b = (
        read_records([write(tmp_path / f"{i}.jsonl", *rows)]).records
        for i, rows in enumerate(((line, faster), (faster, line)))
    )
    assert records_fingerprint(a) == records_fingerprint(b) != records_fingerprint(a[:1])


def test_hardware_is_told_alike_twice():
    assert hardware_facts() == hardware_facts() and len(hardware_facts()["fingerprint"]) == 12

"""Trials: what they are started with, and what is made of however they end."""

import json
import math
import subprocess
import time

import pytest

from dlrm_scale.config_io import apply_override, parse_config
from dlrm_scale.overrides import load_tuned
from dlrm_scale.tuning.knobs import Point
from dlrm_scale.tuning.launcher import wait_for_earlier
from dlrm_scale.tuning.plans import Plans
from dlrm_scale.tuning.records import append_record, read_records
from dlrm_scale.tuning.space import Space, load_space
from dlrm_scale.tuning.trial import (
    Progress,
    Trial,
    failed_record,
    finished_record,
    overrides_file,
    prepare,
    progress,
    short,
    stopped_record,
    whole,
    why_failed,
)
from tests.support.spaces import write_space
from tools.tune.common import base_job

KNOBS = {
    "ranks": {"kind": "categorical", "key": "launch.num_ranks", "values": [1, 2]},
    "batch": {"kind": "categorical", "key": "train.global_batch_size", "values": [64, 192]},
    "user": {"kind": "sharding", "tables": ["user"], "values": ["any", "row_wise"], "when": {"ranks": [2]}},
}
POINT = {"ranks": 2, "batch": 192, "user": "row_wise"}


@pytest.fixture(scope="module")
def space(tmp_path_factory) -> Space:
    return load_space(write_space(tmp_path_factory.mktemp("space"), KNOBS))


@pytest.fixture(scope="module")
def trial(space) -> Trial:
    job = space.job(space.point(POINT))
    return Trial("trial_0001", space, job, space.point(POINT), Plans().plan(job.config, job.cluster), short(40), 40)


def with_changes(config, changes):
    tree = config.model_dump(mode="json")
    for change in changes:
        apply_override(tree, change)
    return parse_config(tree, "test")


def test_a_trial_is_started_with_its_points_configuration_and_plan(trial, tmp_path):
    folder = tmp_path / "trial"
    arguments = prepare(trial, folder)
    changes = [a for a in arguments if "=" in a and not a.startswith("-")]
    config = load_tuned(trial.space.file.base, folder / "overrides.json", changes)
    assert config.train.global_batch_size == 192 and config.sharding.tables["user"].types == ("row_wise",)
    assert json.loads((folder / "plan.json").read_text())["fingerprint"] == trial.plan.fingerprint
    assert config.sharding.plan == str(folder / "plan.json")
    assert all(str(place).startswith(str(folder)) for place in (config.output.dir, config.output.records))
    assert json.loads((folder / "overrides.json").read_text())["launch"] == {"num_ranks": 2, "threads_per_rank": None}


def test_the_base_configuration_is_overridden_in_nothing(space):
    file = overrides_file(space, None, base_job(space).launch, None)
    assert file.overrides == {} and file.launch.num_ranks == 2


def test_what_was_checked_for_quality_is_what_the_overrides_train(space):
    file = overrides_file(space, None, base_job(space).launch, None, ["train.max_steps=1250"])
    assert file.overrides == {"train.max_steps": 1250}


@pytest.mark.parametrize("steps", [8, 60, 1000])
def test_a_short_trial_has_warm_logs_and_no_data_end(trial, steps):
    config = with_changes(trial.job.config, short(steps))
    logs = [s for s in range(1, steps + 1) if s % config.log.every_steps == 0 and s > config.log.warmup_steps]
    assert config.train.max_steps == steps and len(logs) >= 4
    assert config.train.epochs * config.data.source.num_train >= steps * config.train.global_batch_size


@pytest.mark.parametrize("max_steps", [30, None])
def test_whole_runs_train_on_the_same_samples(space, max_steps):
    base = base_job(space)
    config = base.config.model_copy(update={"train": base.config.train.model_copy(update={"max_steps": max_steps})})
    base = type(base)(config, base.cluster, base.launch)
    large = with_changes(config, ["train.global_batch_size=192", *whole(_with_batch(base, 192), base, seed=3)])
    assert large.seed == 3 and large.train.epochs == config.train.epochs
    assert large.train.max_steps == (None if max_steps is None else 10)


def _with_batch(job, batch):
    train = job.config.train.model_copy(update={"global_batch_size": batch})
    return type(job)(job.config.model_copy(update={"train": train}), job.cluster, job.launch)


# ------------------------------------------------------------ how it goes, how it ended
def write_events(folder, events, cut=""):
    (folder / "run").mkdir(parents=True)
    lines = [
        json.dumps({"kind": kind, "attempt": 0, "time": at, "step": step, "seconds": 0.0}) for kind, at, step in events
    ]
    (folder / "run" / "events.jsonl").write_text("\n".join(lines) + "\n" + cut)


def test_progress_leaves_out_the_warm_up_and_a_line_that_is_being_written(trial, tmp_path):
    logs = [
        ("ready", 0.0, 0),
        ("progress", 9.0, 5),
        ("progress", 10.0, 10),
        ("progress", 10.5, 15),
        ("progress", 12.5, 20),
    ]
    write_events(tmp_path, logs, cut='{"kind": "prog')
    seen = progress(tmp_path, trial)
    assert seen.steps == 20 and seen.step_ms == pytest.approx((100, 400))
    assert progress(tmp_path / "none", trial) == Progress(0, ())


def test_a_stopped_trial_is_a_measured_one(trial, tmp_path):
    append_record(
        tmp_path / "r.jsonl", stopped_record(trial, Progress(20, (100.0, 400.0, 200.0)), "stopped after 20 steps", True)
    )
    (record,) = read_records([tmp_path / "r.jsonl"]).records
    assert (record.outcome, record.step_ms, record.num_steps, record.reason) == (
        "ok",
        200.0,
        20,
        "stopped after 20 steps",
    )
    assert Point(record.trial.point) == trial.point and record.trial.steps == 40 and record.loads == trial.plan.ranks


@pytest.mark.parametrize(
    ("reason", "killed_by_kernel", "outcome"),
    [
        ("error: loss is nan", False, "failed"),
        ("error: a.parquet does not fit the features section; mend either of them", False, "failed"),
        ("error: no sharding plan fits for 3 tables on 2 cpu ranks: ...", False, "does not fit"),
        ("error: no sharding plan was found that fits for 3 tables", False, "does not fit"),
        ("The job failed: rank 1 ended with signal 9 (SIGKILL)", False, "failed"),  # somebody may have killed it
        ("The job failed: rank 1 ended with signal 9 (SIGKILL)", True, "does not fit"),
        ("torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2 GiB", False, "does not fit"),
        (
            "RuntimeError: DefaultCPUAllocator: can't allocate memory: you tried to allocate 80 bytes",
            False,
            "does not fit",
        ),
    ],
)
def test_a_failed_trial_is_a_result_with_its_reason(trial, tmp_path, reason, killed_by_kernel, outcome):
    append_record(tmp_path / "r.jsonl", failed_record(trial, reason, killed_by_kernel, True))
    history = read_records([tmp_path / "r.jsonl"])
    (record,) = history.records
    assert (record.outcome, record.reason) == (outcome, reason) and math.isnan(record.step_ms) and record.hardware


@pytest.mark.parametrize(
    ("lines", "reason"),
    [
        (
            ["config 1234, writing", "error (rank 1): row 7: bad id", "Traceback", "The job failed: rank 1 ended with exit code 1 (...)."],
            "error (rank 1): row 7: bad id | The job failed: rank 1 ended with exit code 1 (...).",
        ),
        (["Traceback", "ValueError: boom", "", "The job failed: rank 0 ended with exit code 70"],
         "ValueError: boom | The job failed: rank 0 ended with exit code 70"),
        (["The job failed: rank 1 ended with signal 9 (SIGKILL)"], "The job failed: rank 1 ended with signal 9 (SIGKILL)"),
        ([], "FAILED, and nothing was printed"),
    ],
)  # fmt: skip
def test_the_reason_is_the_first_ranks_error_and_how_the_job_ended(lines, reason):
    assert why_failed(lines, "FAILED") == reason


@pytest.mark.parametrize("text", [None, "", '{"step_', '{"step_ms": {}}'])
def test_a_trial_without_a_measured_record_has_none(trial, tmp_path, text):
    if text is not None:
        (tmp_path / "records.jsonl").write_text(text)
    assert finished_record(trial, tmp_path) is None


def test_a_run_that_a_killed_tuner_left_is_waited_for(tmp_path, capfd):
    (tmp_path / "run").mkdir()
    holder = subprocess.Popen(["flock", str(tmp_path / "run" / ".lock"), "sleep", "0.6"])
    while subprocess.run(["flock", "--nonblock", str(tmp_path / "run" / ".lock"), "true"]).returncode == 0:
        time.sleep(0.01)
    wait_for_earlier(tmp_path)
    assert "still runs; waiting" in capfd.readouterr().err
    holder.wait(timeout=1)
    wait_for_earlier(tmp_path)
    wait_for_earlier(tmp_path / "never begun")
    assert capfd.readouterr().err == ""

"""The tuner with real trials: interrupted and gone on with, to an overrides file that the trainer takes; and what may fail."""

import copy
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from dlrm_scale.errors import EXIT_INTERRUPTED
from dlrm_scale.tuning.records import read_records
from tests.support.configs import TINY
from tests.support.launch import ROOT, finish, user_environment
from tests.support.spaces import QUICK, write_space

pytestmark = pytest.mark.timeout(900)  # 150 s in all where nothing else runs

BATCH = {"kind": "categorical", "key": "train.global_batch_size", "values": [256, 512]}
PIPELINE = {"kind": "categorical", "key": "train.pipeline", "values": ["sparse_dist", "none"]}
ONE_RANK = {"kind": "categorical", "key": "launch.num_ranks", "values": [1]}  # the base has two
SEARCH = ("--launches", "3", "--steps", "24", "--repeats", "2", "--quality-seeds", "2", "--hopeless", "0")


class Tune:
    """tools.tune as a user calls it, on a space in a folder of its own."""

    def __init__(self, folder: Path, knobs: dict[str, Any], tree: dict[str, Any] = TINY, **train: Any) -> None:
        self.folder = folder / "tune"
        tree = copy.deepcopy(tree)
        tree["train"] |= train
        self.space = write_space(folder, knobs, tree)
        self.process: subprocess.Popen | None = None

    def start(self, command: str, *arguments: str) -> subprocess.Popen:
        places = ["--space", str(self.space), "--folder", str(self.folder)]
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tools.tune", command, *places, *arguments],
            cwd=ROOT, env=user_environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        return self.process

    def call(self, command: str, *arguments: str) -> tuple[int, str, str]:
        process = self.start(command, *arguments)
        output, errors = process.communicate(timeout=800)
        return process.returncode, output, errors

    def records(self) -> dict[str, dict[str, Any]]:
        path = self.folder / "records.jsonl"
        lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
        return {line["tuning"]["name"]: line for line in lines}

    def wait_for_steps(self, trial: str) -> None:
        events = self.folder / "trials" / trial / "run" / "events.jsonl"
        while not (events.exists() and '"progress"' in events.read_text()):
            assert self.process.poll() is None, self.process.communicate()
            time.sleep(0.05)

    def ranks(self) -> dict[int, int]:
        """Process ids of the trainer's ranks that run for this folder, by rank."""
        found = {}
        for process in Path("/proc").iterdir():
            try:
                command = (process / "cmdline").read_bytes()
                if b"dlrm_scale.training.main" not in command or os.fsencode(self.folder) not in command:
                    continue
                variables = (process / "environ").read_bytes().split(b"\0")
            except (OSError, ValueError):
                continue  # no process, or one that has just ended
            ranks = [int(v[5:]) for v in variables if v.startswith(b"RANK=")]
            found |= {rank: int(process.name) for rank in ranks}
        return found


@pytest.fixture(scope="module")
def tuned(tmp_path_factory) -> tuple[Tune, subprocess.CompletedProcess, str]:
    """A run that was interrupted in its first trial, and gone on with: (tune, the interrupted call, the second one's output).

    No learning rate: whatever the batch, the held-out NE is that of the first weights.
    """
    still = {"sparse": {"name": "rowwise_adagrad", "lr": 0.0}, "dense": {"name": "adam", "lr": 0.0}}
    tune = Tune(
        tmp_path_factory.mktemp("tuned"),
        {"ranks": ONE_RANK, "batch": BATCH, "pipeline": PIPELINE},
        max_steps=32,
        **still,
    )
    tune.start("run", *SEARCH)
    tune.wait_for_steps("trial_0001")
    tune.process.send_signal(signal.SIGINT)
    output, errors = tune.process.communicate(timeout=300)
    stopped = subprocess.CompletedProcess([], tune.process.returncode, output, errors)
    assert list(tune.records()) == ["base"], "the interrupted trial has a result"
    tune.ranks_left = tune.ranks()
    tune.base_line = (tune.folder / "records.jsonl").read_text()
    code, output, errors = tune.call("run", *SEARCH)
    assert code == 0, output + errors
    return tune, stopped, output


def test_ctrl_c_ends_the_ranks_and_says_what_to_do(tuned):
    tune, stopped, _ = tuned
    assert stopped.returncode == EXIT_INTERRUPTED
    assert tune.ranks_left == {}
    assert stopped.stderr.endswith("the same command goes on.\n") and "Traceback" not in stopped.stderr


def test_the_next_call_goes_on_and_measures_nothing_twice(tuned):
    tune, _, output = tuned
    assert "going on: 0 of 3 launches have results" in output
    assert (tune.folder / "records.jsonl").read_text().startswith(tune.base_line)
    searched = [name for name in tune.records() if "whole" not in name and "again" not in name]
    assert searched == ["base", "trial_0001", "trial_0002", "trial_0003"]
    assert not list((tune.folder / "trials").glob("*/run/checkpoints"))


def test_a_run_ends_with_the_gain_measured_again_and_the_quality_of_both(tuned):
    tune, _, output = tuned
    result = json.loads((tune.folder / "result.json").read_text())
    best = result["tried"][-1]
    records = tune.records()
    again = [f"{result['accepted']}_again_{repeat}" for repeat in range(2)]
    gains = [records[name]["samples_per_second"] / records[f"{name}_base"]["samples_per_second"] for name in again]
    assert best["speed"]["gain"] == pytest.approx(sum(gains) / 2) and min(gains) > 1
    (quality,) = best["quality"]
    assert quality["base"] == pytest.approx(quality["candidate"]) and len(set(quality["base"])) == 2
    whole = records["base_whole_1"], records[f"{result['accepted']}_whole_1"]
    assert whole[0]["samples_consumed"] == whole[1]["samples_consumed"] == 32 * 64
    assert f"{best['speed']['gain']:.2f} x the base" in output


def test_every_trial_is_a_row_of_the_hparams_table(tuned):
    tune, _, _ = tuned
    assert {folder.name for folder in (tune.folder / "hparams").iterdir()} == set(tune.records())


def test_the_tuner_reads_what_its_trials_left(tuned):
    tune, _, _ = tuned
    history = read_records([tune.folder / "records.jsonl"])
    assert history.problems == () and len(history.records) == len(tune.records())
    searched = [record for record in history.records if record.trial]
    plans = {name: json.loads((tune.folder / "trials" / name / "plan.json").read_text()) for name in ("trial_0002",)}
    assert searched and all(record.hardware and record.loads for record in history.records)
    assert tune.records()["trial_0002"]["plan"]["fingerprint"] == plans["trial_0002"]["fingerprint"]


def test_the_trainer_takes_the_overrides_file(tuned):
    tune, _, output = tuned
    command = output.splitlines()[-1].removeprefix("next: ").split()
    assert command[:2] == ["launchers/torchrun.sh", "--config"] and command[-2] == "--overrides"
    places = [
        f"output.dir={tune.folder / 'final'}",
        f"output.records={tune.folder / 'final.jsonl'}",
        "train.max_steps=2",
    ]
    done = finish([str(ROOT / command[0]), *command[1:], *places], tune.folder, timeout=400)
    assert done.code == 0, done.errors
    record = json.loads((tune.folder / "final.jsonl").read_text())
    best = json.loads((tune.folder / "result.json").read_text())["tried"][-1]["point"]
    assert record["config"]["train"]["global_batch_size"] == best["batch"] and record["num_steps"] == 2
    assert record["plan"]["fingerprint"] == json.loads((tune.folder / "best_plan.json").read_text())["fingerprint"]
    assert record["launch"]["num_ranks"] == 1


def test_a_trial_whose_rank_is_killed_is_recorded_with_its_reason(tmp_path):
    tune = Tune(tmp_path, {"batch": BATCH}, QUICK)
    process = tune.start("collect", "--points", "1", "--steps", "240")
    tune.wait_for_steps("trial_0001")
    os.kill(tune.ranks()[1], signal.SIGKILL)
    _, errors = process.communicate(timeout=300)
    record = tune.records()["trial_0001"]
    assert record["outcome"] == "failed" and "rank 1 ended with signal 9 (SIGKILL)" in record["reason"]
    assert process.returncode == 1 and record["reason"] in errors  # of one trial, none was measured


def test_a_hopeless_trial_is_stopped_early_and_a_search_without_gain_says_so(tmp_path):
    tune = Tune(tmp_path, {"batch": BATCH | {"values": [64]}}, global_batch_size=1024)
    few = ("--launches", "1", "--steps", "120", "--repeats", "2", "--quality-seeds", "0", "--hopeless", "0.9")
    code, output, errors = tune.call("run", *few)
    record = tune.records()["trial_0001"]
    assert record["outcome"] == "ok" and record["reason"].startswith(f"stopped after {record['num_steps']} steps")
    assert 30 < record["num_steps"] < 120 and record["step_ms"]["p10"] > 0
    assert code == 1 and "Nothing measured was faster than the base, in 1 launches." in output, errors


def test_a_trial_that_takes_too_long_is_a_result(tmp_path):
    tune = Tune(tmp_path, {"batch": BATCH}, QUICK)
    code, _, errors = tune.call("collect", "--points", "1", "--time-limit", "2")
    assert code == 1 and tune.records()["trial_0001"]["reason"] == "not done after the time limit of 2 s (--time-limit)"
    assert tune.ranks() == {} and "not done after the time limit" in errors


def test_a_space_whose_trials_all_fail_is_one_clear_message(tmp_path):
    explodes = {"kind": "categorical", "key": "train.dense.lr", "values": [1e30]}
    tune = Tune(tmp_path, {"lr": explodes, "pipeline": PIPELINE})
    code, _, errors = tune.call("collect", "--points", "2", "--steps", "8")
    assert code == 1 and "none of the 2 trials could be measured:" in errors and "Traceback" not in errors
    outcomes = {name: record["outcome"] for name, record in tune.records().items()}
    assert outcomes == {"trial_0001": "failed", "trial_0002": "failed"}
    assert "loss" in tune.records()["trial_0001"]["reason"]


@pytest.mark.parametrize(
    ("scheduler", "code", "says"),
    [
        ("slrum", 2, "there is no scheduler slrum; TorchX has local_docker, local_cwd, slurm"),
        ("slurm", 1, "scheduler slurm did not take the trial"),  # no sbatch here
    ],
)
def test_a_scheduler_that_is_not_there(tmp_path, scheduler, code, says):
    if scheduler == "slurm" and any((Path(p) / "sbatch").exists() for p in os.environ["PATH"].split(":")):
        pytest.skip("slurm is there")
    tune = Tune(tmp_path, {"batch": BATCH}, QUICK)
    ended, _, errors = tune.call("run", *SEARCH, "--scheduler", scheduler)
    assert ended == code and says in errors and "Traceback" not in errors
    assert tune.records() == {}

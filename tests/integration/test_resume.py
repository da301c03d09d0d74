"""A real job that loses a rank to SIGKILL, and the same command again: the end is that of a job nothing happened to."""

import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from dlrm_scale.checkpoint import manifest
from tests.support.configs import TINY
from tests.support.launch import ROOT, Outcome, launch, launch_command
from tools.checkpoint.cli import main as checkpoint_tool

JOB = (
    "data.source.num_train=8000",
    "train.max_steps=120",
    "checkpoint.every_steps=20",
    "checkpoint.keep_last=9",
    "eval.every_steps=50",
)
pytestmark = pytest.mark.timeout(300)  # the fixtures are three jobs
TREE = TINY | {"model": TINY["model"] | {"dropout": 0.2}}


def rank_process(config: Path, rank: int) -> int:
    """The process id of one rank of the job that trains `config`."""
    for process in Path("/proc").iterdir():
        if process.name.isdigit():
            try:
                command = (process / "cmdline").read_bytes().split(b"\0")
                environment = (process / "environ").read_bytes().split(b"\0")
            except OSError:
                continue
            ours = b"dlrm_scale.training.main" in command and str(config).encode() in command
            if (
                ours
                and b"-m" in command
                and f"RANK={rank}".encode() in environment
                and b"--nproc-per-node" not in command
            ):
                return int(process.name)
    raise AssertionError(f"no rank {rank} of {config}")


def killed_after(folder: Path, step: int, rank: int) -> subprocess.Popen:
    command, environment = launch_command(folder, *JOB, tree=TREE)
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    job = subprocess.Popen(command, cwd=ROOT, env=environment, **pipes)
    try:
        deadline = time.monotonic() + 90
        while not (folder / "run" / "checkpoints" / f"step_{step}").exists():
            assert time.monotonic() < deadline and job.poll() is None, "the job did not come that far"
            time.sleep(0.01)
        os.kill(rank_process(folder / "config.yaml", rank), signal.SIGKILL)
        job.communicate(timeout=90)
    finally:
        if job.poll() is None:
            job.terminate()  # the launcher ends its ranks
            job.communicate(timeout=30)
    return job


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory) -> Outcome:
    outcome = launch(tmp_path_factory.mktemp("unbroken"), *JOB, tree=TREE)
    assert outcome.code == 0, outcome.errors
    return outcome


@pytest.fixture(scope="module")
def resumed(tmp_path_factory) -> Outcome:
    folder = tmp_path_factory.mktemp("broken")
    job = killed_after(folder, step=40, rank=1)
    assert job.returncode != 0
    assert not (folder / "run" / "checkpoints" / "step_120").exists(), "it was killed too late to tell anything"
    outcome = launch(folder, *JOB, tree=TREE)
    assert outcome.code == 0, outcome.errors
    assert "resumed from" in outcome.output
    return outcome


def test_the_end_is_the_unbroken_one(unbroken, resumed, capsys):
    assert checkpoint_tool(["diff", str(unbroken.run_dir), str(resumed.run_dir)]) == 0, capsys.readouterr().out
    for figure in ("losses", "metrics", "num_steps", "samples_consumed", "oracle", "mended", "eval_mended"):
        assert resumed.records[0][figure] == unbroken.records[0][figure], figure
    assert len(resumed.records) == 1


def test_each_step_stands_once_in_tensorboard(unbroken, resumed):
    curves = []
    for outcome in (unbroken, resumed):
        events = EventAccumulator(str(outcome.run_dir), size_guidance={"scalars": 0})
        events.Reload()
        curves.append([(e.step, e.value) for e in events.Scalars("train/loss")])
        assert {"checkpoint/stall_s", "checkpoint/write_s", "checkpoint/bytes"} <= set(events.Tags()["scalars"])
        saves = [e.step for e in events.Scalars("checkpoint/bytes")]
        assert saves in ([20, 40, 60, 80, 100, 120], [20, 60, 80, 100, 120])  # killed before it could tell of step 40
    assert curves[0] == curves[1]


def test_a_finished_run_says_so_and_another_configuration_is_refused(resumed):
    folder = resumed.run_dir.parent
    again = launch(folder, *JOB, tree=TREE)
    assert again.code == 0 and "finished" in again.output, again.errors
    assert again.records == resumed.records
    other = launch(folder, *JOB, "train.sparse.lr=0.5", tree=TREE, nproc=None)
    assert other.code == 2 and "train.sparse.lr: 0.02 there, 0.5 now" in other.errors


def test_a_run_older_than_a_setting_resumes(tmp_path):
    """Its config.yaml and its manifest lack keys that have come since."""
    job = ("data.source.num_train=8000", "checkpoint.every_steps=5")
    begun = launch(tmp_path, *job, "train.max_steps=5", nproc=None)
    assert begun.code == 0, begun.errors
    path = begun.run_dir / "checkpoints" / "step_5" / "manifest.json"
    saved = manifest.parse(path.read_bytes(), str(path))
    for key in ("all_reduce", "tf32", "compile"):
        del saved.config["train"][key]
    del saved.config["sharding"]["communication"], saved.plan["request"]["sharding"]["communication"]
    path.write_bytes(manifest.dump(saved))
    (begun.run_dir / "config.yaml").write_text(yaml.safe_dump(saved.config))
    went_on = launch(tmp_path, *job, "train.max_steps=8", nproc=None)
    assert went_on.code == 0, went_on.errors
    assert "resumed from" in went_on.output and went_on.records[-1]["num_steps"] == 8


def test_a_checkpoint_behind_the_last_step_is_refused_and_lost_ones_are_told(tmp_path):
    job = ("model={arch: logistic}", "train.accumulate_steps=1", "checkpoint.every_steps=4")
    begun = launch(tmp_path, *job, "train.max_steps=8", nproc=None)
    assert begun.code == 0, begun.errors
    account = sorted(path.name for path in (begun.run_dir / "account").iterdir())
    shorter = launch(tmp_path, *job, "train.max_steps=5", nproc=None)
    assert shorter.code == 2 and len(shorter.records) == 1
    assert "step_8 is of step 8, but train.max_steps and train.epochs end this run at step 5" in shorter.errors
    assert sorted(path.name for path in (begun.run_dir / "account").iterdir()) == account  # as no attempt began

    shutil.rmtree(tmp_path / "run" / "checkpoints")
    anew = launch(
        tmp_path, *job, "train.max_steps=9", "train.nonfinite=skip", "resilience.watchdog_seconds=400", nproc=None
    )
    assert anew.code == 0, anew.errors
    assert "warning: a save of step 8 was begun here, but" in anew.output and "training begins anew" in anew.output
    assert anew.records[-1]["num_steps"] == 9


def write_clicks(file: Path, price: float) -> None:
    ids = [i % 20 for i in range(640)]
    lists = [[i] for i in ids]
    columns = dict.fromkeys(("user", "item", "category", "user_group"), ids)
    columns |= dict.fromkeys(("tags", "history_item", "history_category"), lists)
    columns |= {"age": [1.0] * 640, "price": [price] * 640, "click": [i % 2 for i in ids]}
    pq.write_table(pa.table(columns), file)


def test_a_checkpoint_of_other_data_is_refused_before_the_folder_says_that_it_goes_on(tmp_path):
    clicks = tmp_path / "clicks.parquet"
    source = f"data.source={{kind: parquet, train: {{paths: [{clicks}]}}}}"
    job = ("model={arch: logistic}", source, "checkpoint.every_steps=4")
    write_clicks(clicks, price=1.0)
    begun = launch(tmp_path, *job, "train.max_steps=8", nproc=None)
    assert begun.code == 0, begun.errors
    account = sorted(path.name for path in (begun.run_dir / "account").iterdir())

    write_clicks(clicks, price=2.0)
    refused = launch(tmp_path, *job, "train.max_steps=9", nproc=None)
    assert refused.code == 1 and "step_8 was trained on other data" in refused.errors
    assert sorted(path.name for path in (begun.run_dir / "account").iterdir()) == account

    write_clicks(clicks, price=1.0)
    went_on = launch(tmp_path, *job, "train.max_steps=9", nproc=None)
    assert went_on.code == 0 and "resumed from" in went_on.output, went_on.errors


def test_the_tool_lists_verifies_and_exports(resumed, tmp_path, capsys):
    assert checkpoint_tool(["list", str(resumed.run_dir)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["step", "120", "100", "80", "60", "40", "20"]
    assert checkpoint_tool(["export", str(resumed.run_dir), "--output", str(tmp_path / "plain")]) == 0
    import torch

    user = torch.load(tmp_path / "plain" / "table_user.pt", weights_only=True)
    assert user.shape == (500, 8) and user.abs().sum() > 0
    damaged = resumed.run_dir / "checkpoints" / "step_100" / "__1_0.distcp"
    data = bytearray(damaged.read_bytes())
    data[len(data) // 2] ^= 1
    damaged.write_bytes(data)
    capsys.readouterr()
    assert checkpoint_tool(["verify", str(resumed.run_dir)]) == 1
    out = capsys.readouterr().out
    assert out.count("BAD") == 1 and str(damaged) in out

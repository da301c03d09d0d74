"""How a job under the real launcher ends: frozen, preempted, killed."""

import copy
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from dlrm_scale.errors import EXIT_HUNG, EXIT_RESUME
from tests.support.configs import TINY
from tests.support.launch import ROOT
from tools import audit_data


class Job:
    """A training of many short steps through launchers/torchrun.sh, in a folder of its own."""

    def __init__(self, folder: Path, *arguments: str) -> None:
        tree = copy.deepcopy(TINY)
        tree["train"] |= {"max_steps": 100_000, "epochs": 100_000}
        (folder / "config.yaml").write_text(yaml.safe_dump(tree))
        self.folder = folder
        places = [f"output.dir={folder}/runs/{{time}}", f"output.records={folder / 'records.jsonl'}"]
        command = [ROOT / "launchers" / "torchrun.sh", "--nproc", "2", "--config", folder / "config.yaml"]
        environment = {**os.environ, "PYTHON": sys.executable, "OMP_NUM_THREADS": "1"}
        self.process = subprocess.Popen(
            [*command, *places, *arguments],
            cwd=ROOT,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def wait_for_step(self) -> None:
        for line in self.process.stdout:
            if line.startswith("step 10/"):
                return
        pytest.fail(f"ended before step 10: {self.process.stderr.read()}")

    def pid_of(self, rank: int) -> int:
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()
        for pid in children:
            if f"RANK={rank}".encode() in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0"):
                return int(pid)
        pytest.fail(f"no rank {rank} among {children}")

    def end(self, timeout: float) -> tuple[int, str, str]:
        output, errors = self.process.communicate(timeout=timeout)
        return self.process.returncode, output, errors

    @property
    def run_dirs(self) -> list[Path]:
        return sorted((self.folder / "runs").iterdir())


@pytest.fixture
def start(tmp_path):
    jobs = []

    def run(*arguments: str) -> Job:
        jobs.append(Job(tmp_path, *arguments))
        return jobs[-1]

    yield run
    for job in jobs:
        job.process.terminate()
        try:
            job.process.communicate(timeout=20)
        except subprocess.TimeoutExpired:
            job.process.kill()


def test_a_frozen_rank_is_named_and_the_job_ends(start):
    job = start("resilience.watchdog_seconds=3")
    job.wait_for_step()
    os.kill(job.pid_of(1), signal.SIGSTOP)
    frozen = time.monotonic()
    code, _, errors = job.end(timeout=30)
    took = time.monotonic() - frozen
    assert code == EXIT_HUNG, errors
    assert took < 3 + 2 * 1.2 + 5 + 3  # the limit, two beats, the launcher's SIGKILL, slack
    assert errors.startswith("error: the job hangs; rank 1 is frozen"), errors
    assert errors.count("the job hangs") == 1 and "->rank 1: " in errors and "rank 0: " in errors
    assert "rank 0 ended with exit code 71" in errors and "SIGKILL" not in errors
    stacks = (job.run_dirs[0] / "hung" / "stacks_0_rank_0.txt").read_text()
    assert "trainer.py" in stacks


def test_sigterm_to_the_launcher_stops_the_job_to_be_started_again(start):
    job = start()
    job.wait_for_step()
    job.process.send_signal(signal.SIGTERM)
    code, output, errors = job.end(timeout=30)
    assert code == EXIT_RESUME, errors
    assert f"; to go on from it: the same command with output.dir={job.run_dirs[0]}\n" in output
    assert errors == "Stopped as asked (exit code 75); rank 0 says how to go on.\n"
    assert not (job.folder / "records.jsonl").read_text()
    assert audit_data.main([str(job.run_dirs[0])]) == 0


def test_a_killed_rank_starts_all_again_and_the_job_ends_well(start):
    job = start("--max-restarts", "1", "train.max_steps=150")
    job.wait_for_step()
    os.kill(job.pid_of(1), signal.SIGKILL)
    code, output, errors = job.end(timeout=100)
    assert code == 0, errors
    assert "rank 1 ended with signal 9" in errors and "0 more restarts left" in errors
    assert "step 150/150" in output
    assert len((job.folder / "records.jsonl").read_text().splitlines()) == 1
    assert audit_data.main([str(job.run_dirs[-1])]) == 0


def test_a_fault_that_would_come_again_is_not_tried_again(start):
    job = start("--max-restarts", "3", "train.dense={name: sgd, lr: 1e30}")
    code, _, errors = job.end(timeout=90)
    assert code == 1 and "the loss is nan" in errors and "Starting all ranks again" not in errors

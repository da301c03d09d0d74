"""launchers/torchrun.sh: what it refuses, and what it hands to Python (here a script that shows its arguments)."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

LAUNCHER = Path(__file__).parents[2] / "launchers" / "torchrun.sh"
SHOW = f"""#!/usr/bin/env bash
[[ $1 == -c ]] && exit 0  # the launcher asks whether torch is there
[[ $2 == dlrm_scale.overrides ]] && exec {sys.executable} "$@"
echo "OMP_NUM_THREADS=$OMP_NUM_THREADS" "$@"
"""


@pytest.fixture
def launch(tmp_path):
    show = tmp_path / "python"
    show.write_text(SHOW)
    show.chmod(0o755)

    def run(*args: str, **variables: str) -> subprocess.CompletedProcess:
        env = {k: v for k, v in os.environ.items() if k != "OMP_NUM_THREADS"} | {"PYTHON": str(show)} | variables
        return subprocess.run([LAUNCHER, *args], env=env, capture_output=True, text=True, timeout=30)

    return run


def test_one_machine(launch):
    done = launch("--nproc", "2", "--config", "a b.yaml", "train.max_steps=3", OMP_NUM_THREADS="5")
    assert done.stdout == (
        "OMP_NUM_THREADS=5 -m launchers.elastic --standalone --nproc-per-node 2 --max-restarts 0 --shutdown-timeout 30 "
        "-m dlrm_scale.training.main --config a b.yaml train.max_steps=3\n"
    )


def test_restarts_and_grace_are_the_launchers(launch):
    done = launch("--max-restarts", "4", "--grace", "0", "--config", "a.yaml")
    assert " --max-restarts 4 --shutdown-timeout 0 -m dlrm_scale" in done.stdout


@pytest.fixture
def tuned(tmp_path) -> str:
    path = tmp_path / "best 1.json"
    made_for = {"config": {}, "space": "0123456789ab"}
    path.write_text(
        json.dumps({"made_for": made_for, "overrides": {}, "launch": {"num_ranks": 4, "threads_per_rank": 3}})
    )
    return str(path)


def test_ranks_and_threads_are_the_overrides_files(launch, tuned):
    done = launch("--config", "a.yaml", "--overrides", tuned, "train.max_steps=3", OMP_NUM_THREADS="5")
    assert done.stdout == (
        "OMP_NUM_THREADS=3 -m launchers.elastic --standalone --nproc-per-node 4 --max-restarts 0 --shutdown-timeout 30 "
        f"-m dlrm_scale.training.main --config a.yaml --overrides {tuned} train.max_steps=3\n"
    )


def test_the_command_line_has_the_last_word_on_ranks_and_threads(launch, tuned):
    done = launch("--config", "a.yaml", "--overrides", tuned, "--nproc", "2", "--threads", "1")
    assert done.stdout.startswith("OMP_NUM_THREADS=1 ") and "--nproc-per-node 2 " in done.stdout


def test_machines_share_the_overrides_files_ranks(launch, tuned):
    machines = ("--node-rank", "0", "--rdzv-endpoint", "node0:29500", "--config", "a.yaml", "--overrides", tuned)
    assert "--nproc-per-node 2 " in launch("--nnodes", "2", *machines).stdout
    uneven = launch("--nnodes", "3", *machines)
    assert uneven.returncode == 2 and "is for 4 ranks, which --nnodes 3 machines cannot share evenly" in uneven.stderr


def test_an_overrides_file_that_is_not_there_ends_the_launch(launch):
    done = launch("--config", "a.yaml", "--overrides", "nowhere.json")
    assert done.returncode == 2 and done.stdout == "" and "cannot read the overrides nowhere.json" in done.stderr


@pytest.mark.parametrize(("node_rank", "is_host"), [("0", "true"), ("1", "false")])
def test_only_machine_0_hosts_the_rendezvous(launch, node_rank, is_host):
    done = launch(
        *("--nnodes", "2", "--node-rank", node_rank, "--rdzv-endpoint", "node0:29500"),
        *("--nproc", "8", "--config", "a.yaml"),
    )
    assert "--nnodes 2 --rdzv-backend c10d --rdzv-endpoint node0:29500" in done.stdout
    assert f"--rdzv-conf is_host={is_host} --nproc-per-node 8" in done.stdout


@pytest.mark.parametrize("nproc", [1, 2, 64])
def test_threads_of_all_ranks_together_do_not_pass_the_cores(launch, nproc):
    done = launch("--nproc", str(nproc), "--config", "a.yaml")
    threads = int(done.stdout.split()[0].removeprefix("OMP_NUM_THREADS="))
    cores = len(os.sched_getaffinity(0))
    assert threads == 1 or threads * nproc <= cores < (threads + 1) * nproc


@pytest.mark.parametrize(
    ("args", "says"),
    [
        ([], "--config is missing"),
        (["--config"], "--config needs a value"),
        (["--config", "a.yaml", "--max-restarts", "-1"], "--max-restarts must be a whole number from 0, but is '-1'"),
        (["--config", "a.yaml", "--threads", "0"], "--threads must be a whole number from 1, but is '0'"),
        (["--config", "a.yaml", "--nproc", "0"], "--nproc must be a whole number from 1, but is '0'"),
        (["--config", "a.yaml", "--nproc", "08"], "--nproc must be a whole number from 1, but is '08'"),
        (["--config", "a.yaml", "--max-steps", "3"], "unknown option --max-steps"),
        (["--config", "a.yaml", "fast"], "'fast' is neither an option nor an override of the form key=value"),
        (["--config", "a.yaml", "--node-rank", "1"], "need --nnodes above 1"),
        (["--config", "a.yaml", "--nnodes", "2"], "--nnodes 2 needs --node-rank"),
        (["--config", "a.yaml", "--nnodes", "2", "--node-rank", "2"], "--node-rank (2) must be below --nnodes (2)"),
        (["--config", "a.yaml", "--nnodes", "2", "--node-rank", "1", "--rdzv-endpoint", "node0"], "HOST:PORT"),
    ],
)
def test_a_wrong_call_is_a_usage_error(launch, args, says):
    done = launch(*args)
    assert done.returncode == 2
    assert done.stdout == ""
    assert says in done.stderr


def test_a_python_without_torch_is_named_before_anything_starts(launch):
    done = launch("--config", "a.yaml", PYTHON="/nowhere/python")
    assert done.returncode == 2
    assert "'/nowhere/python' has no torch" in done.stderr and "make doctor" in done.stderr


def test_help_is_no_error(launch):
    done = launch("--help")
    assert (done.returncode, done.stderr) == (0, "")
    assert "launchers/torchrun.sh --nproc 2 --config configs/quickstart.yaml" in done.stdout

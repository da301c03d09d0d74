"""The TorchX component: TorchX's own linter and argument parser take it, and the request says what was asked for."""

import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from torchx.runner import get_runner
from torchx.specs.file_linter import validate

ROOT = Path(__file__).parents[2]
COMPONENT = ROOT / "launchers" / "torchx_component.py"
ARGS = ["--config", "configs/quickstart.yaml", "--nproc", "4"]


def requests(*args: str) -> list[list[str]]:
    """The command of each machine, as local_cwd would start it."""
    with get_runner() as runner:
        dryrun = runner.dryrun_component(f"{COMPONENT}:train", list(args), "local_cwd")
    return [replica.args for replica in dryrun.request.role_params["trainer"]]


def launcher_args(command: list[str], **variables: str) -> list[str]:
    """What the shell makes of a machine's command: the arguments that the launcher gets."""
    assert command[:2] == ["bash", "-c"]
    shown = command[2].replace("exec launchers/torchrun.sh", "printf '%s\\n'")
    done = subprocess.run(["bash", "-c", shown], env=variables, capture_output=True, text=True, check=True)
    return done.stdout.splitlines()


def test_torchx_accepts_the_component():
    assert validate(str(COMPONENT), "train") == []


def test_one_machine_needs_no_rendezvous():
    (command,) = requests(*ARGS)
    assert launcher_args(command) == [
        *("--nproc", "4", "--nnodes", "1", "--max-restarts", "0"),
        *("--config", "configs/quickstart.yaml"),
    ]


def test_each_of_two_machines_gets_its_rank_and_the_first_ones_address():
    commands = requests(*ARGS, "--nnodes", "2")
    for rank, command in enumerate(commands):
        for host in ("node0", ""):  # empty: schedulers that leave it unset on the first machine
            args = launcher_args(command, TORCHX_RANK0_HOST=host)
            assert args[args.index("--node-rank") + 1] == str(rank)
            assert args[args.index("--rdzv-endpoint") + 1] == f"{host or 'localhost'}:29500"
    assert len(commands) == 2


def test_overrides_reach_the_launcher_untouched():
    overrides = ["train.max_steps=5", "name=a b$HOME'c"]
    (command,) = requests(*ARGS, *overrides)
    assert launcher_args(command)[-2:] == overrides


def test_an_overrides_file_brings_its_ranks_and_threads_unless_they_are_given():
    (command,) = requests("--config", "a.yaml", "--overrides", "my best.json")
    args = launcher_args(command)
    assert args == ["--overrides", "my best.json", "--nnodes", "1", "--max-restarts", "0", "--config", "a.yaml"]
    (command,) = requests("--config", "a.yaml", "--overrides", "best.json", "--nproc", "2", "--threads", "3")
    assert launcher_args(command)[:6] == ["--nproc", "2", "--threads", "3", "--overrides", "best.json"]


@pytest.mark.parametrize("args", [["--nproc", "4"], [*ARGS, "--nproc", "four"]], ids=["no config", "not a number"])
def test_wrong_arguments_are_refused_by_the_command_line(args):
    with pytest.raises(SystemExit) as stopped:
        requests(*args)
    assert stopped.value.code != 0


def test_the_slurm_request_asks_for_the_resources():
    command = f"{sys.executable} -m torchx.cli.main run --dryrun -s slurm {COMPONENT}:train"
    asked = [*ARGS, "--nnodes", "2", "--gpu", "8", "--cpu", "96", "--memMB", "500000"]
    done = subprocess.run([*shlex.split(command), *asked], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("--cpus-per-task=96 --mem=500000 --gpus-per-task=8") == 2

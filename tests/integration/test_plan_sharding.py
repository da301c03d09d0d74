"""The user's path: plan for a cluster that is not here, plan for this machine, train on that plan by the command that was told."""

import copy
import json
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.support.configs import TINY
from tests.support.launch import ROOT, finish


def plan(folder: Path, *arguments: str) -> subprocess.CompletedProcess:
    tree = copy.deepcopy(TINY)
    tree["data"]["lanes"] = 8
    folder.mkdir(exist_ok=True)
    (folder / "config.yaml").write_text(yaml.safe_dump(tree))
    command = [sys.executable, "-m", "tools.plan_sharding", "--config", str(folder / "config.yaml"), *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)


def told_command(output: str) -> list[str]:
    return [word for word in shlex.split(output[output.index("\nnext") :].split(":", 1)[1]) if word.strip()]


@pytest.fixture(scope="module")
def planned(tmp_path_factory) -> tuple[Path, subprocess.CompletedProcess]:
    """A plan for two ranks of this machine that a free search would not choose: user whole, item by rows."""
    folder = tmp_path_factory.mktemp("here")
    rules = "sharding.tables={user: {types: [table_wise], pin: [1]}, item: {types: [row_wise]}}"
    done = plan(folder, "--cluster", "2xcpu", "--out", str(folder / "plan.json"), rules, "train.max_steps=4")
    assert done.returncode == 0, done.stderr
    return folder, done


def test_a_laptop_plans_for_gpus_that_are_not_there(tmp_path):
    done = plan(tmp_path, "--cluster", "8xh100", "--dry-run-rank", "fullest", "--html", str(tmp_path / "report.html"))
    assert done.returncode == 0 and done.stderr == "", done.stderr
    assert max(map(len, done.stdout.splitlines()[:-1])) <= 80
    assert "checks hold" in done.stdout and "WRONG" not in done.stdout
    assert done.stdout.splitlines()[-1] == f"next: open {tmp_path / 'report.html'} in a browser"
    assert "8 cuda ranks" in (tmp_path / "report.html").read_text()


def test_the_command_that_the_planner_tells_trains_on_its_plan(planned):
    folder, done = planned
    command = told_command(done.stdout)
    assert command[:3] == ["launchers/torchrun.sh", "--nproc", "2"]
    outcome = finish([*command, f"output.dir={folder / 'run'}", f"output.records={folder / 'records.jsonl'}"], folder)
    assert outcome.code == 0, outcome.errors
    assert (outcome.run_dir / "plan.json").read_bytes() == (folder / "plan.json").read_bytes()
    record = outcome.records[0]
    assert record["num_steps"] == 4
    assert (
        record["plan"]["sharding_types"]["user"] == "table_wise"
        and record["plan"]["sharding_types"]["item"] == "row_wise"
    )
    assert json.loads((folder / "plan.json").read_text())["tables"]["user"]["ranks"] == [1]

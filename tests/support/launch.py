"""Runs the trainer as a user does, in a folder of its own, and reads what it left."""

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from tests.support.configs import TINY

ROOT = Path(__file__).parents[2]


@dataclass
class Outcome:
    code: int
    output: str
    errors: str
    run_dir: Path
    records: list[dict[str, Any]]


def launch(
    folder: Path, *overrides: str, nproc: int | None = 2, tree: dict[str, Any] = TINY, timeout: float = 100
) -> Outcome:
    """Trains `tree` in `folder` through launchers/torchrun.sh, or (nproc None) as one plain process."""
    command, _ = launch_command(folder, *overrides, nproc=nproc, tree=tree)
    return finish(command, folder, timeout)


def launch_command(
    folder: Path, *overrides: str, nproc: int | None = 2, tree: dict[str, Any] = TINY
) -> tuple[list[str], dict[str, str]]:
    """The command of `launch`, and its environment."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.yaml").write_text(yaml.safe_dump(tree))
    places = [f"output.dir={folder / 'run'}", f"output.records={folder / 'records.jsonl'}"]
    arguments = ["--config", str(folder / "config.yaml"), *places, *overrides]
    if nproc is None:
        return [sys.executable, "-m", "dlrm_scale.training.main", *arguments], user_environment()
    return [str(ROOT / "launchers" / "torchrun.sh"), "--nproc", str(nproc), *arguments], user_environment()


def user_environment() -> dict[str, str]:
    return {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}


def finish(command: list[str], folder: Path, timeout: float = 100) -> Outcome:
    """Runs a command that trains into `folder`."""
    done = subprocess.run(command, cwd=ROOT, env=user_environment(), capture_output=True, text=True, timeout=timeout)
    records = folder / "records.jsonl"
    lines = records.read_text().splitlines() if records.exists() else []
    return Outcome(done.returncode, done.stdout, done.stderr, folder / "run", [json.loads(line) for line in lines])

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
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.yaml").write_text(yaml.safe_dump(tree))
    places = [f"output.dir={folder / 'run'}", f"output.records={folder / 'records.jsonl'}"]
    arguments = ["--config", str(folder / "config.yaml"), *places, *overrides]
    if nproc is None:
        command = [sys.executable, "-m", "dlrm_scale.training.main", *arguments]
    else:
        command = [str(ROOT / "launchers" / "torchrun.sh"), "--nproc", str(nproc), *arguments]
    return finish(command, folder, timeout)


def finish(command: list[str], folder: Path, timeout: float = 100) -> Outcome:
    """Runs a command that trains into `folder`."""
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=timeout)
    records = folder / "records.jsonl"
    lines = records.read_text().splitlines() if records.exists() else []
    return Outcome(done.returncode, done.stdout, done.stderr, folder / "run", [json.loads(line) for line in lines])

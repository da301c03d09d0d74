"""Runs one job through the real launcher, launch after launch, and says how each one ended."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from dlrm_scale.checkpoint.commit import STEP
from tools.chaos.disk import PREFIX
from tools.chaos.faults import Damage
from tools.chaos.ranks import FAULTS
from tools.chaos.schedule import Job, Launch

ROOT = Path(__file__).parents[2]
DISK = "tools.chaos.disk:Disk"


@dataclass(frozen=True)
class Ended:
    """How one launch ended: `problem` is None where it ended as it had to."""

    exit_code: int
    seconds: float
    output: str
    problem: str | None


@dataclass
class Runner:
    """Where jobs run and what they train.

    Attributes:
        overrides: of the configuration, for every job alike.
        launch_seconds: a launch that takes longer is killed, and counts as hanging.
    """

    folder: Path
    config: str
    overrides: tuple[str, ...]
    launch_seconds: float
    tell: Callable[[str], None] = lambda _: None

    def run(self, job: Job, name: str, rng: np.random.Generator) -> list[Ended]:
        """All launches of a job in the folder `name`; stops at the first that ends otherwise than it had to."""
        ended = []
        for i, launch in enumerate(job.launches):
            self.tell(f"{job.name}: launch {i + 1} of {len(job.launches)}")
            if launch.damage is not None:
                problem = self._harm(launch.damage, self.folder / name, rng)
                if problem:
                    return [*ended, Ended(0, 0.0, "", problem)]
            ended.append(self._launch(job, launch, name))
            if ended[-1].problem:
                break
        return ended

    def _harm(self, damage: Damage, run: Path, rng: np.random.Generator) -> str | None:
        steps = [p for p in (run / "checkpoints").iterdir() if STEP.fullmatch(p.name)]
        newest = max(steps, key=lambda p: int(p.name.removeprefix("step_")), default=None)
        if newest is None:
            return f"there is no checkpoint to harm ({damage})"
        damage.do(newest, rng)
        return None

    def _launch(self, job: Job, launch: Launch, name: str) -> Ended:
        run = self.folder / name
        overrides = [*self.overrides, *job.overrides, f"output.dir={run}", f"output.records={self.folder}/{name}.jsonl"]
        if job.on_chaos_disk:
            overrides += [f"checkpoint.dir={PREFIX}{run}/checkpoints", f"checkpoint.path_handlers=[{DISK}]"]
        command = [sys.executable, "-m", "launchers.elastic", "--standalone"]
        command += ["--nproc-per-node", str(launch.num_ranks), "--max-restarts", str(launch.max_restarts)]
        command += ["-m", "tools.chaos.ranks", "--config", self.config, *overrides]
        faults = json.dumps([fault.as_json() for fault in launch.faults])
        env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), FAULTS: faults}
        started = time.monotonic()
        log = self.folder / f"{name}.log"
        with log.open("ab") as f:
            begin = f.tell()
            process = subprocess.Popen(command, cwd=ROOT, env=env, stdout=f, stderr=subprocess.STDOUT)
            try:
                exit_code = process.wait(self.launch_seconds)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
                exit_code = None
        output = log.read_bytes()[begin:].decode(errors="replace")
        problem = None
        if exit_code is None:
            problem = f"did not end within {self.launch_seconds:.0f} s"
        elif exit_code != launch.exit_code:
            problem = f"ended with {exit_code}, not {launch.exit_code}: {_last_line(output)}"
        return Ended(exit_code or 0, time.monotonic() - started, output, problem)


def _last_line(output: str) -> str:
    lines = [line for line in output.splitlines() if line.strip()]
    return lines[-1] if lines else "no output"

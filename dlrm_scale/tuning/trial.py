"""A trial: one launch of the trainer in a folder of its own below the tuning folder, and the record that it leaves.

<tuning folder>/trials/<name>/   overrides.json, plan.json, cluster.yaml: what it is started with
                                 run/: the trainer's own folder; its checkpoints go when it ends
                                 logs/: what it printed, where the scheduler runs on this machine
"""

import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from dlrm_scale.config_io import parse_override
from dlrm_scale.errors import SHORT_OF_MEMORY
from dlrm_scale.overrides import LaunchPart, MadeFor, OverridesFile
from dlrm_scale.record_format import origin
from dlrm_scale.sharding.plan import Plan, save_plan
from dlrm_scale.tuning.knobs import Point
from dlrm_scale.tuning.space import Job, Launch, Space

LOGS_A_TRIAL = 8
# What a step looks like once memory is touched, kernels are chosen and the readers are full.
WARMUP_PART = 0.25
MANY_EPOCHS = 100_000  # a short trial of a large batch must not run out of data


@dataclass(frozen=True)
class Trial:
    """Attributes:
    point: None: the base configuration as it is.
    plan: the one whose time was predicted; None: the trainer plans.
    changes: on top of the point, as section.key=value; see `short` and `whole`.
    steps: its fidelity; 0: as many as the configuration says.
    """

    name: str
    space: Space
    job: Job
    point: Point | None
    plan: Plan | None
    changes: tuple[str, ...]
    steps: int
    seed: int = 0


def short(steps: int) -> tuple[str, ...]:
    """Changes for a trial of speed: no checkpoint but the last, which nobody keeps, and the least evaluation there is."""
    return (
        f"train.max_steps={steps}",
        f"train.epochs={MANY_EPOCHS}",
        "eval.every_steps=0",
        "eval.max_samples=1",
        "checkpoint.every_steps=0",
        f"log.warmup_steps={int(WARMUP_PART * steps)}",
        f"log.every_steps={max(1, steps // LOGS_A_TRIAL)}",
    )


def whole(job: Job, base: Job, seed: int) -> tuple[str, ...]:
    """Changes for a trial of quality."""
    return (f"seed={seed}", "checkpoint.every_steps=0", *as_many_samples(job, base))


def as_many_samples(job: Job, base: Job) -> tuple[str, ...]:
    """Changes after which a job trains on as many samples as the base configuration, whatever the batch size."""
    if base.config.train.max_steps is None:
        return ()
    samples = base.config.train.max_steps * base.config.train.global_batch_size
    return (f"train.max_steps={max(1, round(samples / job.config.train.global_batch_size))}",)


def overrides_file(
    space: Space, point: Point | None, launch: Launch, plan: Path | None, changes: Sequence[str] = ()
) -> OverridesFile:
    """What makes the base configuration that of `point`, with `changes` on top, as `--overrides` takes it.

    Threads are named where a knob has chosen them; else they are left to launchers/torchrun.sh, as a user leaves them.
    """
    overrides = dict(parse_override(override) for override in (*space.overrides(point or Point({})), *changes))
    if plan is not None:
        overrides["sharding.plan"] = str(plan)
    threads = launch.threads_per_rank if space.tunes_threads(point or Point({})) else None
    return OverridesFile(
        made_for=MadeFor(config=space.base.model_dump(mode="json"), space=space.fingerprint),
        overrides=overrides,
        launch=LaunchPart(num_ranks=launch.num_ranks, threads_per_rank=threads),
    )


def prepare(trial: Trial, folder: Path) -> list[str]:
    """Writes the trial's folder anew; the arguments of launchers/torchx_component.py."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    job, plan = trial.job, None
    if trial.plan is not None:
        plan = folder / "plan.json"
        save_plan(trial.plan, plan)
    file = overrides_file(trial.space, trial.point, job.launch, plan)
    (folder / "overrides.json").write_text(file.model_dump_json(indent=1) + "\n")
    (folder / "cluster.yaml").write_text(yaml.safe_dump(job.cluster.model_dump(mode="json", exclude_none=True)))
    arguments = ["--config", trial.space.file.base, "--overrides", str(folder / "overrides.json")]
    arguments += ["--nnodes", str(job.cluster.num_hosts), "--gpu", str(_gpus(job))]
    places = [f"sharding.cluster={folder / 'cluster.yaml'}", f"output.dir={folder / 'run'}"]
    return [*arguments, *places, f"output.records={folder / 'records.jsonl'}", *trial.changes]


def _gpus(job: Job) -> int:
    return job.cluster.ranks_per_host if job.cluster.device == "cuda" else 0


def clean(folder: Path) -> None:
    """Takes away what is large and of no use behind a trial."""
    shutil.rmtree(folder / "run" / "checkpoints", ignore_errors=True)
    shutil.rmtree(folder / "run" / "account", ignore_errors=True)


# ------------------------------------------------------------ progress
@dataclass(frozen=True)
class Progress:
    """From the run's events.jsonl, which each log adds a line to: steps so far, and ms a step between logs behind the warm-up."""

    steps: int
    step_ms: tuple[float, ...]


def progress(folder: Path, trial: Trial) -> Progress:
    try:
        text = (folder / "run" / "events.jsonl").read_text()
    except OSError:  # not begun
        return Progress(0, ())
    events = [json.loads(line) for line in text.split("\n")[:-1]]
    logs = [(e["step"], e["time"]) for e in events if e["kind"] == "progress"]
    warm = [log for log in logs if log[0] >= WARMUP_PART * trial.steps]
    times = [(t1 - t0) * 1e3 / (s1 - s0) for (s0, t0), (s1, t1) in pairwise(warm) if s1 > s0]
    return Progress(logs[-1][0] if logs else 0, tuple(times))


# ------------------------------------------------------------ records
def samples_per_second(record: dict[str, Any]) -> float:
    """What the tuner makes large: global batch over the median step time; 0 for a run that was not measured."""
    if record["outcome"] != "ok":
        return 0.0
    return record["config"]["train"]["global_batch_size"] / record["step_ms"]["p50"] * 1e3


def finished_record(trial: Trial, folder: Path) -> dict[str, Any] | None:
    """The record that the trainer left, as the tuner keeps it; None if it left none."""
    try:
        record = json.loads((folder / "records.jsonl").read_text().splitlines()[-1])
    except (OSError, IndexError, ValueError):
        return None
    if not record["step_ms"]:
        return None
    return {**record, **_of_trial(trial)}


def stopped_record(trial: Trial, seen: Progress, reason: str, ran_here: bool) -> dict[str, Any]:
    """Of a trial that was stopped because it is slow: measured, by fewer steps."""
    p10, p50, p90 = (float(np.percentile(seen.step_ms, q)) for q in (10, 50, 90))
    measured = {"step_ms": {"p10": p10, "p50": p50, "p90": p90}, "num_steps": seen.steps}
    return {**_own_record(trial, "ok", reason, ran_here), **measured}


def failed_record(trial: Trial, reason: str, short_of_memory: bool, ran_here: bool) -> dict[str, Any]:
    """`short_of_memory`: what is known besides the reason's own words."""
    unfit = short_of_memory or SHORT_OF_MEMORY.search(reason)
    return _own_record(trial, "does not fit" if unfit else "failed", reason, ran_here)


def _own_record(trial: Trial, outcome: str, reason: str, ran_here: bool) -> dict[str, Any]:
    """`ran_here`: else the machine is not known."""
    launch = trial.job.launch
    told = origin(launch.num_ranks, launch.threads_per_rank)
    return {
        **(told if ran_here else {**told, "hardware": None}),
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "outcome": outcome,
        "reason": reason,
        "name": trial.job.config.name,
        "config": trial.job.config.model_dump(mode="json"),
        "cluster": trial.job.cluster.model_dump(mode="json"),
        "plan": trial.plan.as_recorded() if trial.plan else None,
        **_of_trial(trial),
    }


def _of_trial(trial: Trial) -> dict[str, Any]:
    """`tuning`: the tuner's own; `trial`: what tuning/records.py reads."""
    part = None
    if trial.point is not None and trial.steps:
        part = {"space": trial.space.fingerprint, "point": dict(trial.point), "steps": trial.steps, "seed": trial.seed}
    return {"tuning": {"name": trial.name}, "trial": part}


def why_failed(lines: Sequence[str], state: str) -> str:
    """The first rank's own error and how the launcher saw the job end, from what a trial printed."""
    said = [line.strip() for line in lines if line.strip()]
    error = next((line for line in said if line.startswith("error")), None)
    ended = next((line for line in reversed(said) if line.startswith("The job failed")), None)
    last = error or next((line for line in reversed(said) if line is not ended), None)
    return " | ".join(filter(None, (last, ended))) or f"{state}, and nothing was printed"


def kernel_kills() -> int:
    """Processes that the kernel of this machine has killed for want of memory, since it started."""
    try:
        with open("/proc/vmstat") as f:
            return next((int(line.split()[1]) for line in f if line.startswith("oom_kill ")), 0)
    except OSError:
        return 0

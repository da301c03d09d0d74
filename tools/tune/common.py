"""What several commands share: their options, and how a point becomes a trial."""

import argparse
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from dlrm_scale.errors import ConfigError
from dlrm_scale.record_format import hardware_facts, software_versions
from dlrm_scale.training.run_folder import decides_learning
from dlrm_scale.tuning.knobs import LAUNCH_PREFIX, Point, Value
from dlrm_scale.tuning.launcher import Launcher, Limits
from dlrm_scale.tuning.plans import Plans
from dlrm_scale.tuning.records import History, Problem, Record
from dlrm_scale.tuning.space import Job, Space, resized
from dlrm_scale.tuning.trial import Trial, short


def add_space(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--space", required=True, metavar="YAML", help="what may be tuned of what: see configs/tuning")


def add_folder(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--folder", required=True, metavar="DIR", help="the tuning folder: new, or one to go on with")


def add_records(parser: argparse.ArgumentParser, required: bool = False) -> None:
    parser.add_argument(
        "--records", nargs="+", default=[], required=required, metavar="FILE", help="records.jsonl of measured runs"
    )


def add_prior(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--prior", action="store_true", help="learn also from records of other hardware, versions or clusters"
    )


def add_launching(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--steps", type=int, default=60, metavar="N", help="optimizer steps of a trial (default 60)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the search (default 0)")
    parser.add_argument("--scheduler", default="local_cwd", metavar="NAME", help="of TorchX (default local_cwd)")
    parser.add_argument(
        "--scheduler-args", default="", metavar="K=V,...", help="settings of the scheduler: partition=gpu"
    )
    parser.add_argument(
        *("--job-arg",),
        action="append",
        default=[],
        metavar="K=V",
        help="argument of launchers/torchx_component.py: memMB=64000",
    )
    parser.add_argument("--parallel", type=int, default=1, metavar="K", help="trials at once, at most (default 1)")
    parser.add_argument("--time-limit", type=float, default=1800, metavar="S", help="of one trial (default 1800)")
    parser.add_argument(
        "--hopeless", type=float, default=0.5, metavar="PART",
        help="stop a trial that is slower than this part of the best so far; 0: never (default 0.5)",
    )  # fmt: skip


def check_launching(args: argparse.Namespace) -> None:
    """Raises ConfigError."""
    rules = {
        "--steps": (args.steps, args.steps >= 8, "8 or more: warm-up and logs are parts of it"),
        "--seed": (args.seed, args.seed >= 0, "0 or more"),
        "--parallel": (args.parallel, args.parallel >= 1, "1 or more"),
        "--time-limit": (args.time_limit, 0 < args.time_limit < math.inf, "seconds above 0"),
        "--hopeless": (args.hopeless, 0 <= args.hopeless < 1, "from 0 up to, not with, 1"),
    }
    for name, (value, holds, rule) in rules.items():
        if not holds:
            raise ConfigError(f"{name} must be {rule}, but is {value}")
    wrong = [arg for arg in args.job_arg if not arg.partition("=")[1] or arg.startswith(("-", "="))]
    if wrong:
        raise ConfigError(f"--job-arg reads name=value, but is {wrong[0]!r}")


def learning_settings(space: Space, point: Point) -> tuple[tuple[str, Value], ...]:
    """The part of a point that decides what is learned: two points that agree in it learn the same, up to rounding."""
    keys = {name: getattr(space.knobs[name], "key", "sharding") for name in point}
    return tuple(
        (name, point[name]) for name, key in keys.items() if not key.startswith(LAUNCH_PREFIX) and decides_learning(key)
    )


def begun_with(args: argparse.Namespace) -> dict[str, Any]:
    """What must stay as it is for the measurements of a folder to compare."""
    facts: dict[str, Any] = {"--steps": args.steps, **software_versions()}
    if args.scheduler.startswith("local"):
        facts["hardware"] = hardware_facts()["fingerprint"]
    return facts


def make_launcher(args: argparse.Namespace, folder: Path) -> Launcher:
    limits = Limits(args.time_limit, args.hopeless, args.parallel)
    return Launcher(folder, limits, args.scheduler, args.scheduler_args, args.job_arg)


def base_job(space: Space) -> Job:
    """The base configuration as it is, started as the space starts what no knob changes."""
    launch = space.launch(Point({}))
    return Job(space.base, resized(space.cluster, launch.num_ranks), launch)


def point_trial(name: str, space: Space, plans: Plans, point: Point, steps: int) -> Trial:
    job = space.job(point)
    return Trial(name, space, job, point, plans.plan(job.config, job.cluster), short(steps), steps)


def base_trial(name: str, space: Space, steps: int) -> Trial:
    return Trial(name, space, base_job(space), None, None, short(steps), steps)


# ------------------------------------------------------------ records to learn from
@dataclass(frozen=True)
class Learnable:
    """`records` can be learned from; `kept_apart`: lines for people on those that cannot, and why."""

    records: tuple[Record, ...]
    prior: tuple[Record, ...]
    kept_apart: tuple[str, ...]


def learnable(history: History) -> Learnable:
    """What was measured on this machine with this software; a failed run says nothing of time or memory."""
    split = history.split(hardware_facts()["fingerprint"], software_versions())
    said = unusable(history)
    if split.prior:
        reasons = "; ".join(f"{count} x {why}" for why, count in Counter(dict(split.why)).most_common(3))
        said.append(f"{len(split.prior)} records are of other hardware or versions, and kept apart: {reasons}")
    return Learnable(of_use(split.usable), of_use(split.prior), tuple(said))


def unusable(history: History) -> list[str]:
    """Each kind of problem once, with where it was met first."""
    first: dict[str, list[Problem]] = {}
    for problem in history.problems:
        first.setdefault(problem.reason, []).append(problem)
    return [
        f"{found[0]}" + (f" (and {len(found) - 1} more lines)" if len(found) > 1 else "") + "; not used"
        for found in first.values()
    ]


def of_use(records: Sequence[Record]) -> tuple[Record, ...]:
    return tuple(r for r in records if r.outcome != "failed")


def tell(console: Console, lines: Sequence[str]) -> None:
    for line in lines:
        console.print(f"note: {line}")

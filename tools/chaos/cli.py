"""Runs real jobs under a schedule of faults and compares how they end with an unbroken run."""

import argparse
import json
import shutil
import sys
import tempfile
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from dlrm_scale.config_io import load_config
from dlrm_scale.errors import UserError
from tools.chaos.job import Runner
from tools.chaos.schedule import Job, Launch, full, small
from tools.chaos.verdict import Verdict, judge

# Small steps, many saves: what is tested is how runs end and begin, not what they learn.
SMALL_STEPS = (
    "device=cpu",
    "train.global_batch_size=128",
    "train.max_steps=64",
    "train.schedule.warmup_steps=8",
    "data.source.num_train=10240",
    "data.source.num_eval=512",
    "eval.every_steps=6",
    "log.every_steps=2",
    "checkpoint.every_steps=4",
    "checkpoint.keep_last=2",
    "resilience.watchdog_seconds=12",
)


class ChaosError(UserError):
    """The unbroken run does not end well: there is nothing to compare with."""


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m tools.chaos",
        description="Run real training jobs on this machine under a schedule of faults (kills in every phase of a save, frozen\n"
        "ranks, damaged files, a full disk, other numbers of ranks) and compare each end with an unbroken run's.",
        epilog="example: python -m tools.chaos --jobs 'load' --seed 3",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--config", default="configs/quickstart.yaml", help="what is trained (default: %(default)s), in few small steps"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the schedule (default 0)")
    parser.add_argument("--small", action="store_true", help="one job with one fault of each sort")
    parser.add_argument("--jobs", metavar="TEXT", help="only jobs whose name holds this")
    parser.add_argument(
        "--folder", type=Path, help="where runs and logs go and stay (default: a temporary one, removed if all holds)"
    )
    parser.add_argument(
        "--launch-seconds", type=float, default=300, help="a launch that takes longer hangs (default 300)"
    )
    parser.add_argument("--json", action="store_true", help="print the verdicts as JSON")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="of the configuration")
    return parser


def main(argv: list[str]) -> int:
    """0: every job lost nothing; 1: one did, or could not run; 2: the command line is not valid."""
    parser = build_parser()
    args = parser.parse_intermixed_args(argv)
    jobs = [job for job in (small if args.small else full)(args.seed) if (args.jobs or "") in job.name]
    if not jobs:
        names = "\n  ".join(job.name for job in (small if args.small else full)(args.seed))
        parser.error(f"no job's name holds '{args.jobs}'; there are\n  {names}")
    console = Console(stderr=args.json)
    folder = args.folder or Path(tempfile.mkdtemp(prefix="chaos-"))
    folder.mkdir(parents=True, exist_ok=True)
    overrides = (*SMALL_STEPS, *args.overrides)
    try:
        load_config(args.config, list(overrides))
        verdicts = run(Runner(folder, args.config, overrides, args.launch_seconds), jobs, args.seed, console)
    except UserError as e:
        print(f"error: {e}", file=sys.stderr)
        return e.exit_code
    except KeyboardInterrupt:
        return 130
    show(verdicts, console)
    if args.json:
        print(json.dumps({"seed": args.seed, "jobs": [verdict.as_json() for verdict in verdicts]}, indent=1))
    if not all(verdict.holds for verdict in verdicts):
        return 1
    if args.folder is None:
        shutil.rmtree(folder)
    return 0


def run(runner: Runner, jobs: list[Job], seed: int, console: Console) -> list[Verdict]:
    """The unbroken run, then each job, told as they end."""
    with console.status("") as status:
        runner.tell = status.update
        (unbroken,) = runner.run(Job("the unbroken run", (Launch(),)), "unbroken", np.random.default_rng(seed))
        if unbroken.problem:
            raise ChaosError(f"the unbroken run {unbroken.problem}; see {runner.folder / 'unbroken.log'}")
        verdicts = []
        for i, job in enumerate(jobs):
            name = f"job_{i}"
            launches = runner.run(job, name, np.random.default_rng([seed, i]))
            verdict = judge(job, launches, runner.folder / name, runner.folder / "unbroken", unbroken.seconds)
            verdicts.append(verdict)
            word = "[green]holds[/green]" if verdict.holds else f"[red]FAILS[/red], see {runner.folder / name}.log"
            console.print(f"{job.name}: {word} ({verdict.num_faults} faults, {verdict.seconds:.0f} s)", highlight=False)
            for problem in verdict.problems[:5]:
                console.print(f"  {problem}", highlight=False, markup=False)
    return verdicts


def show(verdicts: list[Verdict], console: Console) -> None:
    grid = Table(title="ends beside an unbroken run's", title_justify="left")
    for column in ("job", "faults", "launches", "s lost", "largest difference", ""):
        grid.add_column(column, justify="left" if column in ("job", "") else "right")
    for v in verdicts:
        difference = "-" if v.largest_difference is None else f"{v.largest_difference:.2g}"
        word = "holds" if v.holds else "FAILS"
        grid.add_row(v.job, str(v.num_faults), str(v.num_launches), f"{v.seconds_lost:.0f}", difference, word)
    console.print(grid)
    faults, failed = sum(v.num_faults for v in verdicts), sum(not v.holds for v in verdicts)
    console.print(
        f"{faults} faults in {len(verdicts)} job{'s' * (len(verdicts) != 1)}: "
        + (f"{failed} of them ended otherwise" if failed else "nothing was lost but time"),
        highlight=False,
    )

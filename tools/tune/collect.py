"""`collect`: measures points of a space, random ones or those that the analytic model ranks first, to build a history."""

import argparse
from typing import Any

import numpy as np
from rich.console import Console

from dlrm_scale.errors import ConfigError
from dlrm_scale.tuning.featurise import Featuriser
from dlrm_scale.tuning.knobs import Point
from dlrm_scale.tuning.plans import Plans
from dlrm_scale.tuning.searcher import RandomSearcher, TellingSearcher
from dlrm_scale.tuning.space import load_space
from tools.tune.common import add_folder, add_launching, add_space, begun_with, check_launching, make_launcher
from tools.tune.run import Search
from tools.tune.session import RECORDS, Session

POOL = 8  # random points for each that the planner is to choose


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = (
        "example: python -m tools.tune collect --space configs/tuning/quickstart.yaml --folder runs/history --points 30"
    )
    add_space(parser)
    add_folder(parser)
    parser.add_argument("--points", type=int, default=30, metavar="N", help="trials (default 30)")
    parser.add_argument(
        "--choose",
        choices=("random", "planner"),
        default="random",
        help="planner: the analytic model's best of random ones",
    )
    add_launching(parser)


def run(args: argparse.Namespace, console: Console) -> dict[str, Any]:
    check_launching(args)
    if args.points < 1:
        raise ConfigError(f"--points must be 1 or more, but is {args.points}")
    space, plans = load_space(args.space), Plans()
    space.require_feasible(plans, args.seed)
    chooser = {"random": RandomSearcher, "planner": PlannerChosen}[args.choose]
    session = Session(args.folder, space, console)
    session.require_same(**begun_with(args))
    search = Search(
        session, chooser(Featuriser(space, plans), args.seed), plans, args.points, args.steps, with_base=False
    )
    with make_launcher(args, session.folder) as launcher:
        search.go(launcher)
    outcomes = [result.outcome for _, result in search.searcher.told]
    return {
        "records": str(session.folder / RECORDS),
        "measured": outcomes.count("ok"),
        "does_not_fit": outcomes.count("does not fit"),
        "failed": outcomes.count("failed"),
    }


def show(result: dict[str, Any], console: Console) -> None:
    console.print(
        f"{result['measured']} measured, {result['does_not_fit']} do not fit, {result['failed']} failed; all are in {result['records']}"
    )
    console.print(f"next: python -m tools.tune run --records {result['records']} ..., which learns from them")


class PlannerChosen(TellingSearcher):
    kind = "planner"

    def choose(self, k: int) -> list[Point]:
        pool = self.fresh(POOL * k)
        if not pool:
            return []
        table = self.featuriser(pool).table
        return [pool[i] for i in np.argsort(table.analytic_ms_N / table.global_batch_N, kind="stable")[:k].tolist()]

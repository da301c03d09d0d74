"""`run`: search, then re-measure what was found beside the base configuration."""

import argparse
from collections import deque
from typing import Any

import torch
from rich.console import Console

from dlrm_scale.errors import ConfigError, UserError
from dlrm_scale.tuning.featurise import Featuriser
from dlrm_scale.tuning.knobs import Point
from dlrm_scale.tuning.launcher import Ended, Launcher
from dlrm_scale.tuning.model_search import PredictorSearcher, known_runs
from dlrm_scale.tuning.plans import Plans
from dlrm_scale.tuning.records import read_records
from dlrm_scale.tuning.searcher import Result, TellingSearcher
from dlrm_scale.tuning.space import Space, load_space
from dlrm_scale.tuning.trial import Trial, samples_per_second
from tools.tune.common import (
    add_folder,
    add_launching,
    add_records,
    add_space,
    base_trial,
    begun_with,
    check_launching,
    learnable,
    make_launcher,
    point_trial,
    tell,
)
from tools.tune.session import Session
from tools.tune.verify import Verifier, show_verdict

ALL_FAILED = 5  # first trials, after which a search in which nothing runs is given up
MORE_SEARCHES = 2  # each a quarter of the launches, among what is left where all that is fast has failed in quality
BASE = "base"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = "example: python -m tools.tune run --space configs/tuning/quickstart.yaml --folder runs/tune_quickstart --launches 20"
    add_space(parser)
    add_folder(parser)
    add_records(parser)
    parser.add_argument("--launches", type=int, default=20, metavar="N", help="trials of the search (default 20)")
    parser.add_argument(
        "--searcher",
        choices=("evolution", "reinforce"),
        default="evolution",
        help="on the predictor (default evolution)",
    )
    parser.add_argument("--repeats", type=int, default=3, metavar="N", help="of base and best, at the end (default 3)")
    parser.add_argument(
        "--quality-seeds", type=int, default=3, metavar="N",
        help="whole runs of base and best, whose held-out NE is compared; 0: not compared (default 3)",
    )  # fmt: skip
    add_launching(parser)


def run(args: argparse.Namespace, console: Console) -> dict[str, Any]:
    check_launching(args)
    if args.launches < 1 or args.repeats < 2 or args.quality_seeds < 0 or args.quality_seeds == 1:
        raise ConfigError(
            f"--launches must be 1 or more, --repeats 2 or more and --quality-seeds 0, 2 or more (one shows no noise), but they are "
            f"{args.launches}, {args.repeats}, {args.quality_seeds}"
        )
    torch.set_num_threads(1)  # of the predictor, which may be fitted beside a trial
    space, plans = load_space(args.space), Plans()
    featuriser = Featuriser(space, plans)
    space.require_feasible(plans, args.seed)
    session = Session(args.folder, space, console)
    session.require_same(**begun_with(args))
    history = learnable(read_records(session.keep_history(args.records)))
    tell(console, history.kept_apart)
    known = known_runs(history.records, plans, space.base) if history.records else None
    searcher = PredictorSearcher(featuriser, args.seed, args.searcher, args.launches, known)
    with make_launcher(args, session.folder) as launcher:
        search = Search(session, searcher, plans, args.launches, args.steps)
        verifier = Verifier(session, launcher, plans, args)
        searcher.allows = lambda point: not verifier.is_worse(point)
        for more in (0, *[max(1, args.launches // 4)] * MORE_SEARCHES):
            search.more(more)
            search.go(launcher)
            verdict = verifier.go()
            if verdict["accepted"] or not verifier.may_find_more:
                break
        return verdict


def show(result: dict[str, Any], console: Console) -> None:
    show_verdict(result, console)


class Search:
    """The launches of one search, saved after each ask and each result."""

    def __init__(
        self,
        session: Session,
        searcher: TellingSearcher,
        plans: Plans,
        launches: int,
        steps: int,
        with_base: bool = True,
    ) -> None:
        self.session, self.searcher, self.plans = session, searcher, plans
        self.space: Space = searcher.space
        self.launches, self.steps, self.with_base = launches, steps, with_base
        self.asked: dict[str, Point] = {}  # by name of the trial
        self.queue: deque[Trial] = deque()
        self.exhausted = False  # whether the space has no further point
        self._go_on()

    def _go_on(self) -> None:
        """Takes up what an earlier call left: results that were not told, and launches that have none."""
        saved = self.session.saved
        if "searcher" not in saved:
            return
        self.searcher.restore({**saved["searcher"], "budget": self.launches})  # which a later call may raise
        self.asked = {name: self.space.point(point) for name, point in saved["asked"].items()}
        pending = set(self.searcher.pending)
        for name, point in self.asked.items():
            if point in pending and name in self.session.by_name:
                self.searcher.tell(point, result_of(self.session.by_name[name]))
            elif point in pending:
                self.queue.append(self._trial(name, point))
        if self.asked:
            done = len(self.searcher.told)
            self.session.console.print(f"going on: {done} of {self.launches} launches have results")

    def more(self, launches: int) -> None:
        self.launches += launches
        self.searcher.budget = self.launches

    def go(self, launcher: Launcher) -> None:
        """Raises UserError: the base configuration fails, or all trials do."""
        if self.with_base:
            trial, was_there = base_trial(BASE, self.space, self.steps), BASE in self.session.by_name
            record = next(self.session.measure_named(launcher, [trial], "measuring the base configuration"))
            if not was_there:
                self._report(BASE, record)
        if self.with_base and self.session.by_name[BASE]["outcome"] != "ok":
            raise UserError(
                f"the base configuration {self.space.file.base} does not run, and what is gained is measured against it: "
                f"{self.session.by_name[BASE]['reason']}\n  its logs are in {self.session.folder / 'trials' / BASE}; mend it and call again, "
                "in another --folder if the configuration changed"
            )
        self._check_failures()
        self.session.measure(launcher, self._next, self._ended, self._best, self._line)
        self._check_failures(at_end=True)

    def _next(self) -> Trial | None:
        if not self.queue and len(self.asked) < self.launches and not self.exhausted:
            points = self.searcher.ask(1)
            self.exhausted = not points
            for point in points:
                name = f"trial_{len(self.asked) + 1:04}"
                self.asked[name] = point
                self.queue.append(self._trial(name, point))
            self._save()
        return self.queue.popleft() if self.queue else None

    def _trial(self, name: str, point: Point) -> Trial:
        return point_trial(name, self.space, self.plans, point, self.steps)

    def _ended(self, ended: Ended) -> None:
        self.searcher.tell(ended.trial.point, result_of(ended.record))
        self._save()
        self._report(ended.trial.name, ended.record)
        self._check_failures()

    def _save(self) -> None:
        self.session.save(searcher=self.searcher.state(), asked={name: dict(p) for name, p in self.asked.items()})

    def _check_failures(self, at_end: bool = False) -> None:
        told = [result for _, result in self.searcher.told]
        if any(result.outcome == "ok" for result in told) or (len(told) < ALL_FAILED and not at_end):
            return
        if not told:
            raise UserError("the space has no point left to launch; widen its knobs")
        reasons = list(dict.fromkeys(result.reason for result in told))[:3]
        raise UserError(
            f"none of the {len(told)} trials could be measured:\n  " + "\n  ".join(reasons)
            + f"\n  their logs are in {self.session.folder / 'trials'}; narrow the knobs to what can run, and begin anew in another --folder"
        )  # fmt: skip

    def _best(self) -> float:
        return max((samples_per_second(record) for record in self.session.by_name.values()), default=0.0)

    def _line(self) -> str:
        return f"trial {len(self.searcher.told) + 1} of {self.launches}, best {self._best():,.0f} samples/s"

    def _report(self, name: str, record: dict[str, Any]) -> None:
        speed = samples_per_second(record)
        said = f"{speed:,.0f} samples/s" if speed else f"{record['outcome']}: {record['reason']}"
        early = "  (stopped early)" if speed and record.get("reason") else ""
        point = self.asked.get(name)
        knobs = " ".join(f"{k}={v}" for k, v in point.items()) if point else "the base configuration"
        count = f"{len(self.searcher.told)}/{self.launches}" if point else ""
        self.session.console.print(f"{name} {count}  {said}{early}  best {self._best():,.0f}  [{knobs}]")


def result_of(record: dict[str, Any]) -> Result:
    if record["outcome"] == "ok":
        return Result("ok", record["step_ms"]["p50"])
    return Result(record["outcome"], None, record["reason"])

"""`search`: how many launches until a searcher's choice is near the best of its space, beside random search, TPE and the planner alone."""

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from dlrm_scale.cluster import load_cluster
from dlrm_scale.errors import ConfigError
from dlrm_scale.tuning.featurise import Featuriser
from dlrm_scale.tuning.knobs import Point
from dlrm_scale.tuning.model_search import PredictorSearcher
from dlrm_scale.tuning.plans import Plans
from dlrm_scale.tuning.searcher import RandomSearcher, Result, Searcher
from dlrm_scale.tuning.simulator import NOISE
from dlrm_scale.tuning.space import load_space
from tools.benchmark.search_peers import AnalyticSearcher, TPESearcher
from tools.benchmark.tuning_workloads import of_one_kind, random_space, simulate_points, tight_memory
from tools.commands import folded

SEARCHERS: dict[str, Callable[[Featuriser, int, int], Searcher]] = {
    "random": lambda f, seed, budget: RandomSearcher(f, seed),
    "planner": lambda f, seed, budget: AnalyticSearcher(f, seed),
    "tpe": lambda f, seed, budget: TPESearcher(f, seed),
    "reinforce": lambda f, seed, budget: PredictorSearcher(f, seed, "reinforce", budget),
    "evolution": lambda f, seed, budget: PredictorSearcher(f, seed, "evolution", budget),
}
NEAR = (0.01, 0.02, 0.05)
NUM_RESAMPLES = 2000
NOT_MEASURED = "not in the table of measured runs"
LEAST_MEASURED = 0.5  # of the points that the planner does not refuse


@dataclass(frozen=True)
class Replay:
    """Every point of a space that can be launched, with what a launch of it gives. NaN: it does not fit."""

    name: str
    featuriser: Featuriser
    step_ms: dict[Point, float]
    cost: dict[Point, float]  # milliseconds a sample
    repeats_ms: dict[Point, list[float]]  # empty: simulated

    @property
    def best(self) -> float:
        return float(np.nanmin(list(self.cost.values())))

    def launch(self, point: Point, rng: np.random.Generator) -> float:
        """What one launch measures: a repeat, or the truth with the simulator's noise."""
        if point in self.repeats_ms:
            return float(rng.choice(self.repeats_ms[point]))
        return self.step_ms[point] * float(np.exp(NOISE * rng.standard_normal()))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Run searchers on spaces of which every point is known. They see noisy measurements; their regret is what the best point launched so\n"
        "far truly costs a sample, over the best of all, less 1. Without --records, the spaces are simulated (dlrm_scale/tuning/simulator.py): made up,\n"
        "so that no figure is a claim about hardware."
    )
    parser.epilog = "example: python -m tools.benchmark search --workloads 3 --seeds 10 --json > search.json"
    parser.add_argument(
        "--records", nargs="+", metavar="JSONL", help="measured runs of --space, instead of simulated ones"
    )
    parser.add_argument("--space", metavar="YAML", help="of which the records are, each point of it once or more")
    parser.add_argument("--cluster", default="2xcpu", metavar="NAME", help="that is simulated (default 2xcpu)")
    parser.add_argument("--workloads", type=int, default=3, metavar="N", help="simulated models (default 3)")
    parser.add_argument("--seeds", type=int, default=10, metavar="N", help="searches of each (default 10)")
    parser.add_argument("--launches", type=int, default=30, metavar="N", help="of each search (default 30)")
    parser.add_argument("--parallel", type=int, default=2, metavar="N", help="launches at once (default 2)")
    parser.add_argument("--searchers", nargs="+", choices=SEARCHERS, default=list(SEARCHERS))


def run(args: argparse.Namespace, console: Console) -> dict[str, Any]:
    """Raises ConfigError: a table that is not of the space, or of too little of it."""
    if bool(args.records) != bool(args.space):
        raise ConfigError(
            "--records and --space go together: give the space that the records are of, or neither to simulate"
        )
    torch.set_num_threads(1)  # the matrices are small: more threads only wait for each other
    runs = []
    with console.status("planning") as status:
        plans = Plans()
        names = [args.space] if args.space else range(args.workloads)
        replays = [
            _measured(args, plans) if args.space else _simulated(n, args.cluster, plans, status.update) for n in names
        ]
        for name in args.searchers:
            for replay in replays:
                for seed in range(args.seeds):
                    status.update(f"{name}, {replay.name}, seed {seed}")
                    searcher = SEARCHERS[name](replay.featuriser, seed, args.launches)
                    regret = search(searcher, replay, args.launches, args.parallel, seed)
                    runs.append({"searcher": name, "workload": replay.name, "seed": seed, "regret": regret})
    return {
        "source": "measured" if args.space else f"simulated on {args.cluster}",
        "launches": args.launches,
        "parallel": args.parallel,
        "seeds": args.seeds,
        "spaces": [_about(replay) for replay in replays],
        "searchers": {name: _summary([r["regret"] for r in runs if r["searcher"] == name]) for name in args.searchers},
        "runs": runs,
    }


def search(searcher: Searcher, replay: Replay, launches: int, parallel: int, seed: int) -> list[float]:
    """Regret after each launch: the best true cost launched so far over the best of all, less 1. Before one fitted, the median
    point's stands for it."""
    rng = np.random.default_rng([seed, 1])
    best, regret = float(np.nanmedian(list(replay.cost.values()))), []
    while len(regret) < launches:
        points = searcher.ask(min(parallel, launches - len(regret)))
        if not points:
            break
        for point in points:
            if np.isnan(replay.step_ms[point]):
                searcher.tell(point, Result("does not fit", reason="out of memory"))
            else:
                searcher.tell(point, Result("ok", replay.launch(point, rng)))
                best = min(best, replay.cost[point])
            regret.append(best / replay.best - 1)
    return regret + regret[-1:] * (launches - len(regret))


def _simulated(seed: int, cluster: str, plans: Plans, tell: Callable[[str], Any]) -> Replay:
    tell(f"planning every point of workload {seed}")
    space = tight_memory(random_space(seed, load_cluster(cluster)), plans, seed)
    featuriser = Featuriser(space, plans)
    points, runs = simulate_points(f"workload_{seed}", featuriser, list(space.enumerate()))
    cost = runs.step_ms_N / runs.table.global_batch_N
    step_ms = dict(zip(points, runs.step_ms_N.tolist(), strict=True))
    return Replay(runs.name, featuriser, step_ms, dict(zip(points, cost.tolist(), strict=True)), {})


def _measured(args: argparse.Namespace, plans: Plans) -> Replay:
    """The median of a point's repeats is taken for the truth; a launch sees one of them. A point that ever did not fit does not."""
    space, history = load_space(args.space), of_one_kind(args.records)
    times: dict[Point, list[float]] = {}
    for record in history.records:
        if record.trial is not None and record.trial.space == space.fingerprint and record.outcome != "failed":
            times.setdefault(space.point(record.trial.point), []).extend(record.repeats_ms or (record.step_ms,))
    featuriser = Featuriser(space, plans)
    possible = [p for p in space.enumerate() if p in times or not featuriser([p]).reasons]
    if len(times) < LEAST_MEASURED * len(possible):
        raise ConfigError(
            f"{len(times)} of the {len(possible)} points of {args.space} that have a plan were measured (fingerprint {space.fingerprint}), "
            f"but a replay needs {LEAST_MEASURED:.0%}; measure more, or name a smaller space"
        )
    featuriser.refuse({p: NOT_MEASURED for p in possible if p not in times})
    step_ms = {point: float(np.median(ms)) for point, ms in times.items()}
    batch_N = featuriser(list(step_ms)).table.global_batch_N
    cost = {point: ms / float(batch) for (point, ms), batch in zip(step_ms.items(), batch_N, strict=True)}
    return Replay(args.space, featuriser, step_ms, cost, {p: ms for p, ms in times.items() if not np.isnan(ms).any()})


def _about(replay: Replay) -> dict[str, Any]:
    cost = np.array(list(replay.cost.values()))
    return {
        "name": replay.name,
        "points": len(cost),
        "fit": float(np.mean(~np.isnan(cost))),
        "median_over_best": float(np.nanmedian(cost) / replay.best),
        "within_2_percent": int((cost <= 1.02 * replay.best).sum()),
    }


def _summary(regrets: Sequence[Sequence[float]]) -> dict[str, Any]:
    """Over all spaces and seeds: the regret's median by launch, and launches until it is within NEAR."""
    regret_SL = np.array(regrets)
    rng = np.random.default_rng(0)
    drawn = np.median(regret_SL[rng.integers(len(regret_SL), size=(NUM_RESAMPLES, len(regret_SL)))], axis=1)
    low, high = np.percentile(drawn, (2.5, 97.5), axis=0)
    until = {}
    for near in NEAR:
        first = np.array([_launches_until(regret, near) for regret in regret_SL])
        median = float(np.median(first))
        until[f"{near:g}"] = {
            "median": median if np.isfinite(median) else None,
            "reached": float(np.isfinite(first).mean()),
        }
    return {
        "median": np.median(regret_SL, axis=0).tolist(),
        "low": low.tolist(),
        "high": high.tolist(),
        "launches_until": until,
    }


def _launches_until(regret: np.ndarray, near: float) -> float:
    """Infinite if it never gets there."""
    there = np.flatnonzero(regret <= near)
    return float(there[0]) + 1 if len(there) else np.inf


def show(result: dict[str, Any], console: Console) -> None:
    launches = [n for n in (5, 10, 15, 20, 30, 40, 60) if n <= result["launches"]]
    title = (
        f"{result['source']}: median regret after so many launches (95 % of resamples), {len(result['spaces'])} spaces x "
        f"{result['seeds']} seeds, {result['parallel']} at once"
    )
    grid = Table(title=folded(title), title_justify="left")
    for column in ("searcher", *map(str, launches), "launches until 2 %"):
        grid.add_column(column, justify="right")
    for name, found in result["searchers"].items():
        cells = [
            f"{found['median'][n - 1]:.1%} ({found['low'][n - 1]:.1%}..{found['high'][n - 1]:.1%})" for n in launches
        ]
        near = found["launches_until"]["0.02"]
        cells.append(f"{near['median'] or '-'} ({near['reached']:.0%} get there)")
        grid.add_row(name, *cells)
    console.print(grid)
    for space in result["spaces"]:
        console.print(
            f"{space['name']}: {space['points']:,} points, {space['fit']:.0%} fit, median {space['median_over_best']:.2f} x the best, "
            f"{space['within_2_percent']} within 2 % of it"
        )

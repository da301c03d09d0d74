"""`predictor`: how well step times are predicted for a workload that was never seen, at 0 to 300 records of others."""

import argparse
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from dlrm_scale.cluster import load_cluster
from dlrm_scale.errors import ConfigError
from dlrm_scale.tuning.features import FeatureTable
from dlrm_scale.tuning.plans import Plans
from dlrm_scale.tuning.predictor import AnalyticPredictor, Measured, NeuralPredictor, Predictor
from dlrm_scale.tuning.scores import SCORES, scores
from tools.benchmark.predictor_peers import BoostingPredictor, RidgePredictor
from tools.benchmark.tuning_workloads import MeasuredRuns, measured_runs, simulated_workload
from tools.commands import folded

PREDICTORS: dict[str, Callable[[int], Predictor]] = {
    "analytic": lambda seed: AnalyticPredictor(),
    "linear": RidgePredictor,
    "boosting": BoostingPredictor,
    "ours": NeuralPredictor,
}
SHORT = ("tau", "top", "r1", "r5", "r10", "mape", "90 %", "misfit")  # of SCORES, for 80 columns
NUM_RESAMPLES = 1000
LEAST_WORKLOADS = 2
COST_CANDIDATES = 10_000


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Train predictors on records of some workloads and judge them on another, each workload in turn. Without --records, runs are\n"
        "simulated (dlrm_scale/tuning/simulator.py): made up, so that no figure is a claim about hardware."
    )
    parser.epilog = "example: python -m tools.benchmark predictor --workloads 8 --json > predictor.json"
    parser.add_argument("--records", nargs="+", metavar="JSONL", help="measured runs, instead of simulated ones")
    parser.add_argument(
        "--by-row", action="store_true", help="train on other runs of the same workload: tuning a job that has records"
    )
    parser.add_argument("--cluster", default="8xh200", metavar="NAME", help="that is simulated (default 8xh200)")
    parser.add_argument("--workloads", type=int, default=8, metavar="N", help="simulated models (default 8)")
    parser.add_argument("--points", type=int, default=200, metavar="N", help="runs of each (default 200)")
    parser.add_argument("--sizes", type=int, nargs="+", default=[0, 10, 30, 100, 300], metavar="N", help="records")
    parser.add_argument("--seeds", type=int, default=10, metavar="N", help="draws of the records (default 10)")
    parser.add_argument("--predictors", nargs="+", choices=PREDICTORS, default=list(PREDICTORS))


def run(args: argparse.Namespace, console: Console) -> dict[str, Any]:
    """Raises ConfigError: too few workloads, no usable record."""
    torch.set_num_threads(1)  # the matrices are small: more threads only wait for each other
    with console.status("planning") as status:
        if args.records:
            data = measured_runs(args.records, Plans())
        else:
            plans, cluster = Plans(), load_cluster(args.cluster)
            data = []
            for seed in range(args.workloads):
                status.update(f"planning workload {seed + 1} of {args.workloads}")
                data.append(simulated_workload(seed, cluster, plans, args.points))
        if len(data) < LEAST_WORKLOADS and not args.by_row:
            raise ConfigError(
                f"the runs are of {len(data)} workload, but a split by workload needs {LEAST_WORKLOADS}; add records of another model, or "
                "set --by-row"
            )
        rows = []
        for size in args.sizes:
            for seed in range(args.seeds):
                status.update(f"{size} records, seed {seed}")
                rows += _judge(data, size, seed, args.predictors, args.by_row)
    return {
        "source": "measured" if args.records else f"simulated on {args.cluster}",
        "split": "row" if args.by_row else "workload",
        "seeds": args.seeds,
        "workloads": [{"name": d.name, "runs": len(d.table), "fit": float(d.fits_N.mean())} for d in data],
        "cells": [_cell(rows, size, name) for size in args.sizes for name in args.predictors],
        "cost": _cost(data),
    }


def _judge(
    data: Sequence[MeasuredRuns], size: int, seed: int, names: Sequence[str], by_row: bool
) -> list[dict[str, Any]]:
    rows = []
    for held, test in enumerate(data):
        rng = np.random.default_rng([seed, held])
        pool = [(w, i) for w, d in enumerate(data) for i in range(len(d.table)) if (w == held) == by_row]
        picked = [pool[i] for i in rng.permutation(len(pool))[:size].tolist()]
        kept = np.setdiff1d(np.arange(len(test.table)), [i for w, i in picked if w == held])
        if not test.fits_N[kept].any():
            continue
        known = _joined(data, picked, rng) if picked else None
        for name in names:
            predictor = PREDICTORS[name](seed)
            started = time.process_time()
            if known:
                predictor.fit(*known)
            seconds = time.process_time() - started
            table = test.table.take(kept)
            found = scores(predictor.predict(table), table, test.step_ms_N[kept], test.fits_N[kept])
            rows.append({"size": size, "seed": seed, "predictor": name, "fit_cpu_s": seconds, **found})
    return rows


def _joined(
    data: Sequence[MeasuredRuns], picked: Sequence[tuple[int, int]], rng: np.random.Generator
) -> tuple[FeatureTable, Measured]:
    tables = [data[w].table.take(np.array([i])) for w, i in picked]
    step_ms = np.array([data[w].measure(i, rng) for w, i in picked])
    fits = np.array([data[w].fits_N[i] for w, i in picked])
    return FeatureTable.join(tables), Measured(step_ms, fits, np.array([w for w, _ in picked]))


def _cell(rows: list[dict[str, Any]], size: int, name: str) -> dict[str, Any]:
    """Means over workloads and seeds, with the middle 95 % of the mean over resampled seeds."""
    own = [r for r in rows if r["size"] == size and r["predictor"] == name]
    cell: dict[str, Any] = {
        "records": size,
        "predictor": name,
        "fit_cpu_s": float(np.mean([r["fit_cpu_s"] for r in own])),
    }
    rng = np.random.default_rng(0)
    seeds = sorted({r["seed"] for r in own})
    for score in SCORES:
        by_seed = [np.array([r[score] for r in own if r["seed"] == seed]) for seed in seeds]
        means = np.array([np.nan if np.isnan(x).all() else np.nanmean(x) for x in by_seed])
        means = means[~np.isnan(means)]
        if not len(means):
            cell[score] = None
            continue
        drawn = means[rng.integers(len(means), size=(NUM_RESAMPLES, len(means)))].mean(1)
        low, high = np.percentile(drawn, (2.5, 97.5)).tolist()
        cell[score] = {"mean": float(means.mean()), "low": low, "high": high}
    return cell


def _cost(data: Sequence[MeasuredRuns]) -> dict[str, float]:
    """CPU seconds of a refit on 300 records, and of scoring 10,000 rows."""
    table, fits = FeatureTable.join([d.table for d in data]), np.concatenate([d.fits_N for d in data])
    step_ms = np.concatenate([d.step_ms_N for d in data])
    groups = np.repeat(np.arange(len(data)), [len(d.table) for d in data])
    rng = np.random.default_rng(0)
    some, many = rng.integers(len(table), size=300), rng.integers(len(table), size=COST_CANDIDATES)
    predictor, started = NeuralPredictor(), time.process_time()
    predictor.fit(table.take(some), Measured(step_ms[some], fits[some], groups[some]))
    fitted, rows = time.process_time(), table.take(many)
    predictor.predict(rows)
    return {"refit_300_cpu_s": fitted - started, "score_10000_cpu_s": time.process_time() - fitted}


def show(result: dict[str, Any], console: Console) -> None:
    title = f"{result['source']}, split by {result['split']}: means over {len(result['workloads'])} workloads and {result['seeds']} seeds"
    grid = Table(title=folded(title), title_justify="left")
    for column in ("runs", "predictor", *SHORT, "fit s"):
        grid.add_column(column, justify="right")
    for cell in result["cells"]:
        values = ["-" if cell[s] is None else f"{cell[s]['mean']:.2f}" for s in SCORES]
        grid.add_row(str(cell["records"]), cell["predictor"], *values, f"{cell['fit_cpu_s']:.2f}")
    console.print(grid)
    console.print(
        "top: tau among the best 10 %; r1, r5, r10: regret of the first 1, 5, 10; 90 %: coverage of the interval; misfit: runs that do not\n"
        "fit but were expected to"
    )
    cost = result["cost"]
    console.print(
        f"refit on 300 records {cost['refit_300_cpu_s']:.2f} s, score 10,000 rows {cost['score_10000_cpu_s']:.2f} s of one core"
    )

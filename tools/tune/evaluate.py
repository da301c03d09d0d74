"""`evaluate`: how good predictions are of records that the predictor never saw, beside the analytic model alone."""

import argparse
import math
import statistics
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from dlrm_scale.errors import ConfigError
from dlrm_scale.tuning.model_search import KnownRuns, known_runs
from dlrm_scale.tuning.plans import Plans
from dlrm_scale.tuning.predictor import AnalyticPredictor, Measured, NeuralPredictor, Prediction
from dlrm_scale.tuning.records import Record, read_records
from dlrm_scale.tuning.scores import SCORES, scores
from tools.tune.common import add_records, learnable, tell

LEAST = 10
LEAST_OF_WORKLOAD = 3  # measured runs of a workload, for their order to be judged
NUM_FOLDS = 5


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = "example: python -m tools.tune evaluate --records runs/history/records.jsonl"
    add_records(parser, required=True)
    parser.add_argument(
        "--held-out", nargs="+", default=[], metavar="FILE",
        help="score these after learning from --records; without it, each fifth of --records after learning from the rest",
    )  # fmt: skip
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of folds and first weights (default 0)")


def run(args: argparse.Namespace, console: Console) -> dict[str, Any]:
    torch.set_num_threads(1)
    found = learnable(read_records(args.records))
    tell(console, found.kept_apart)
    if args.held_out:
        apart = learnable(read_records(args.held_out))
        tell(console, apart.kept_apart)
        seen = {same_job(record) for record in found.records}
        held = tuple(record for record in apart.records if same_job(record) not in seen)
        if len(held) < len(apart.records):
            tell(
                console,
                [f"{len(apart.records) - len(held)} of the held-out runs are of jobs in --records too, and left out"],
            )
        folds = np.r_[np.full(len(found.records), -1), np.zeros(len(held), dtype=int)]
        records = found.records + held
    else:
        records = found.records
        folds = folds_of(records, args.seed)
    num_held = int((folds >= 0).sum())
    if sum(r.outcome == "ok" for r, fold in zip(records, folds, strict=True) if fold >= 0) < LEAST:
        raise ConfigError(f"{num_held} runs are held out, but {LEAST} measured ones are needed; collect more")
    known = known_runs(records, Plans())
    workloads = known.measured.group_N
    result = {
        "held_out": num_held,
        "workloads": len(np.unique(workloads)),
        "learned_from": int((folds < 0).sum()) if args.held_out else "the other four fifths",
        "ours": _scored(cross_predict(known, folds, args.seed), known, folds >= 0),
        "analytic": _scored(AnalyticPredictor().predict(known.table), known, folds >= 0),
    }
    if result["workloads"] > 1 and not args.held_out:
        result["ours, from other workloads"] = _scored(cross_predict(known, workloads, args.seed), known, folds >= 0)
    return result


def same_job(record: Record) -> tuple[str, str]:
    """What makes two records runs of the same thing: repeats of a run do not test a predictor that saw another repeat."""
    config = record.job.config
    kept = config.model_copy(update={"sharding": config.sharding.model_copy(update={"plan": None, "cluster": None})})
    parts = kept.model_dump(mode="json", exclude={"output", "log", "eval", "checkpoint", "seed", "name"})
    for key in ("max_steps", "epochs"):
        parts["train"].pop(key)
    return str(parts), str(record.job.launch)


def jobs_of(records: Sequence[Record]) -> np.ndarray:
    """(N,) a number for each job."""
    numbers: dict[tuple[str, str], int] = {}
    return np.array([numbers.setdefault(same_job(record), len(numbers)) for record in records], dtype=int)


def folds_of(records: Sequence[Record], seed: int) -> np.ndarray:
    """(N,) fold of each record; runs of the same job share one."""
    jobs_N = jobs_of(records)
    fold_of = np.random.default_rng(seed).permutation(len(set(jobs_N.tolist()))) % NUM_FOLDS
    return fold_of[jobs_N]


def cross_predict(known: KnownRuns, folds_N: np.ndarray, seed: int) -> Prediction:
    """Each row by a predictor that learned from the other folds; fold -1 is learned from alone, and its rows are NaN."""
    measured, parts = known.measured, {}
    for fold in sorted(set(folds_N.tolist()) - {-1}):
        others, own = np.flatnonzero(folds_N != fold), np.flatnonzero(folds_N == fold)
        predictor = NeuralPredictor(seed)
        seen = Measured(measured.step_ms_N[others], measured.fits_N[others], measured.group_N[others])
        predictor.fit(known.table.take(others), seen)
        parts[fold] = own, predictor.predict(known.table.take(own))
    size = len(folds_N)
    log_ms, spread, fits = (np.full(size, math.nan) for _ in range(3))
    for own, prediction in parts.values():
        log_ms[own], spread[own], fits[own] = prediction.log_ms_N, prediction.spread_N, prediction.fits_N
    return Prediction(log_ms[None], log_ms, spread, fits)


def _scored(prediction: Prediction, known: KnownRuns, held_N: np.ndarray) -> dict[str, float | None]:
    """Means over the workloads: of two models, one of which costs ten times as much, any predictor orders the runs well."""
    measured, found = known.measured, []
    for group in np.unique(measured.group_N[held_N]).tolist():
        rows = np.flatnonzero(held_N & known.table.feasible_N & (measured.group_N == group))
        if measured.fits_N[rows].sum() >= LEAST_OF_WORKLOAD:
            taken = Prediction(
                *(getattr(prediction, f)[..., rows] for f in ("log_ms_MN", "log_ms_N", "spread_N", "fits_N"))
            )
            found.append(scores(taken, known.table.take(rows), measured.step_ms_N[rows], measured.fits_N[rows]))
    values = {name: [f[name] for f in found if not math.isnan(f[name])] for name in SCORES}
    return {name: statistics.fmean(of_workloads) if of_workloads else None for name, of_workloads in values.items()}


def show(result: dict[str, Any], console: Console) -> None:
    grid = Table(
        title=f"{result['held_out']} runs of {result['workloads']} workloads, learned from {result['learned_from']}",
        title_justify="left",
    )
    columns = [name for name in ("ours", "ours, from other workloads", "analytic") if name in result]
    grid.add_column("")
    for column in columns:
        grid.add_column(column, justify="right")
    for name in SCORES:
        values = [result[column][name] for column in columns]
        grid.add_row(name, *("-" if value is None else f"{value:.3f}" for value in values))
    console.print(grid)
    console.print("next: more records where tau or mape fall short: python -m tools.tune collect --help")

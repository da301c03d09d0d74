"""`suggest`: the points that promise most, without a launch; for a cluster that is not here, too."""

import argparse
from collections import Counter
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from dlrm_scale.config import check_num_ranks
from dlrm_scale.errors import ConfigError, NoPlanError
from dlrm_scale.record_format import software_versions
from dlrm_scale.tuning.features import derive, run_numbers
from dlrm_scale.tuning.featurise import Featuriser, job_numbers
from dlrm_scale.tuning.knobs import Point
from dlrm_scale.tuning.model_search import known_runs
from dlrm_scale.tuning.plans import Plans
from dlrm_scale.tuning.predictor import NeuralPredictor, Prediction, Predictor
from dlrm_scale.tuning.proposers import evolve
from dlrm_scale.tuning.records import History, Record, read_records
from dlrm_scale.tuning.space import Space, load_space, resized
from tools.tune.common import add_prior, add_records, add_space, base_job, of_use, tell, unusable

ENUMERATED = 2000  # points: a space of so many is looked at whole
LEAST_CHANCE = 0.5  # chance of fitting under which a point is not suggested


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = "example: python -m tools.tune suggest --space configs/tuning/quickstart.yaml --top 3"
    add_space(parser)
    add_records(parser)
    add_prior(parser)
    parser.add_argument("--predictor", metavar="FILE", help="that `fit` saved, instead of --records")
    parser.add_argument("--top", type=int, default=5, metavar="N", help="points to name (default 5)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the search (default 0)")


def run(args: argparse.Namespace, console: Console) -> dict[str, Any]:
    torch.set_num_threads(1)
    if args.predictor and args.records:
        raise ConfigError(
            "--predictor has learned from its records already, so --records would do nothing; leave one out"
        )
    if args.predictor and args.prior:
        raise ConfigError("--predictor has learned already, so --prior would do nothing; leave it out")
    if args.top < 1 or args.seed < 0:
        raise ConfigError(f"--top must be 1 or more and --seed 0 or more, but they are {args.top} and {args.seed}")
    space, plans = load_space(args.space), Plans()
    space.require_feasible(plans, args.seed)
    predictor, basis = _predictor(args, space, plans, console)
    featuriser = Featuriser(space, plans)

    def cost(points: Sequence[Point]) -> np.ndarray:
        table = featuriser(points).table
        prediction = predictor.predict(table)
        cost_N = prediction.log_ms_N - np.log(table.global_batch_N)
        return np.where(table.feasible_N & (prediction.fits_N >= LEAST_CHANCE), cost_N, np.inf)

    with console.status("searching") if console.is_terminal else nullcontext():
        if space.size <= ENUMERATED:
            points = list(space.enumerate())
            scored = dict(zip(points, cost(points).tolist(), strict=True))
        else:
            scored = evolve(space, cost, [], np.random.default_rng(args.seed))
    best = sorted((c, i) for i, (point, c) in enumerate(scored.items()) if np.isfinite(c))[: args.top]
    if not best:
        raise NoPlanError(
            "no point of the space is expected to fit; widen its knobs, or name a cluster with more memory"
        )
    points = [list(scored)[i] for _, i in best]
    base, base_prediction = _base(space, plans, predictor)
    return {
        "space": args.space,
        "cluster": space.file.cluster,
        "basis": basis,
        "points_looked_at": len(scored),
        "base": base,
        "suggestions": _suggestions(points, featuriser, predictor, base_prediction),
    }


def _predictor(args: argparse.Namespace, space: Space, plans: Plans, console: Console) -> tuple[Predictor, str]:
    """And what its figures rest on."""
    if args.predictor:
        return NeuralPredictor.load(args.predictor), f"what {args.predictor} learned"
    history = read_records(args.records)
    tell(console, unusable(history))
    own, others = own_runs(history, space)
    if others and not args.prior:
        tell(
            console,
            [
                f"{len(others)} records are of another cluster than {space.file.cluster}, of other versions, or of machines that most are "
                "not of, and kept apart; --prior learns from them"
            ],
        )
    used = own + (others if args.prior else ())
    predictor = NeuralPredictor(args.seed)
    known = known_runs(used, plans, space.base)
    if not known.measured.fits_N.any():
        return (
            predictor,
            "the analytic model alone: no run was measured. Its order is a guess, its milliseconds are rough",
        )
    predictor.fit(known.table, known.measured)
    elsewhere = (
        f", {len(used) - len(own)} of them on other clusters, machines or versions: trust the order more than the milliseconds"
        if used != own
        else ""
    )
    return predictor, f"the analytic model and {len(used)} measured runs{elsewhere}"


def own_runs(history: History, space: Space) -> tuple[tuple[Record, ...], tuple[Record, ...]]:
    """Runs on the space's cluster, with this software and on the kind of machine that most of them are of; and all others.

    The cluster need not be here, so its machines are not compared with this one.
    """
    of_cluster = [r for r in history.records if is_of(r, space)]
    kinds = Counter(r.hardware for r in of_cluster if r.hardware)
    split = history.split(kinds.most_common(1)[0][0] if kinds else "", software_versions())
    own = of_use([r for r in split.usable if is_of(r, space)])
    mine = {record.where for record in own}
    return own, tuple(r for r in of_use(history.records) if r.where not in mine)


def is_of(record: Record, space: Space) -> bool:
    """Whether a run was made on the space's cluster, by its figures."""
    try:
        return record.job.cluster == resized(space.cluster, record.job.cluster.num_ranks)
    except ConfigError:
        return False


def _base(space: Space, plans: Plans, predictor: Predictor) -> tuple[dict[str, Any], Prediction | None]:
    """Its figures, and what is predicted of it: None on a cluster on which it cannot run, where the figures say why."""
    try:
        job = base_job(space)
        check_num_ranks(job.config, job.launch.num_ranks)
        numbers = job_numbers(job, plans)
    except (ConfigError, NoPlanError) as e:
        return {"cannot_run": str(e).splitlines()[0]}, None
    table = derive(numbers[None], run_numbers(job.config, job.launch.threads_per_rank)[None])
    prediction = predictor.predict(table)
    low, high = prediction.interval()
    return _figures(float(prediction.log_ms_N[0]), low[0], high[0], space.base.train.global_batch_size), prediction


def _figures(log_ms: float, low: float, high: float, batch: int) -> dict[str, Any]:
    ms = float(np.exp(log_ms))
    return {"step_ms": ms, "step_ms_90": [float(low), float(high)], "samples_per_second": batch / ms * 1e3}


def _suggestions(
    points: list[Point], featuriser: Featuriser, predictor: Predictor, base: Prediction | None
) -> list[dict[str, Any]]:
    space, table = featuriser.space, featuriser(points).table
    prediction = predictor.predict(table)
    cost_MN = prediction.log_ms_MN - np.log(table.global_batch_N)
    base_M = base.log_ms_MN[:, 0] - np.log(space.base.train.global_batch_size) if base else []
    low_N, high_N = prediction.interval()
    found = []
    for i, point in enumerate(points):
        figures = _figures(prediction.log_ms_N[i], low_N[i], high_N[i], int(table.global_batch_N[i]))
        # of the ensemble's members, each one way the truth may be; the analytic model has one, and no opinion on chances
        chance = float((cost_MN[:, i] < base_M).mean()) if len(base_M) > 1 else None
        launch = space.launch(point)
        found.append(
            {
                "point": dict(point),
                **figures,
                "fits": float(prediction.fits_N[i]),
                "chance_faster_than_base": chance,
                "overrides": space.overrides(point),
                "launch": {"num_ranks": launch.num_ranks, "threads_per_rank": launch.threads_per_rank},
            }
        )
    return found


def show(result: dict[str, Any], console: Console) -> None:
    grid = Table(
        title=f"predicted for {result['cluster']}, of {result['points_looked_at']:,} points looked at",
        title_justify="left",
    )
    for column in ("", "step ms", "90 % of runs lie in", "samples/s", "fits", "beats base"):
        grid.add_column(column, justify="right")
    if "cannot_run" in result["base"]:
        console.print(f"note: the base configuration cannot run on {result['cluster']}: {result['base']['cannot_run']}")
        rows = result["suggestions"]
    else:
        rows = [result["base"], *result["suggestions"]]
    for number, row in enumerate(rows, start=len(result["suggestions"]) + 1 - len(rows)):
        low, high = row["step_ms_90"]
        chance = row.get("chance_faster_than_base")
        grid.add_row(
            *("base" if number == 0 else str(number), f"{row['step_ms']:.4g}", f"{low:.4g} - {high:.4g}"),
            f"{row['samples_per_second']:,.0f}",
            *(("", "") if number == 0 else (f"{row['fits']:.0%}", "not known" if chance is None else f"{chance:.0%}")),
        )
    console.print(grid)
    for number, row in enumerate(result["suggestions"], start=1):
        console.print(f"{number}: " + " ".join(f"{k}={v}" for k, v in row["point"].items()))
    console.print(f"This rests on {result['basis']}.")
    console.print(
        "next: python -m tools.tune run --space " + result["space"] + " --folder DIR, where the cluster is, measures"
    )

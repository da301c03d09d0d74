"""`report`: what a tuning folder holds, as one self-contained HTML page."""

import argparse
import json
import math
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console

from dlrm_scale.errors import ConfigError
from dlrm_scale.tuning.featurise import Featuriser
from dlrm_scale.tuning.knobs import Point
from dlrm_scale.tuning.model_search import KnownRuns, known_runs
from dlrm_scale.tuning.plans import Plans
from dlrm_scale.tuning.predictor import Measured, NeuralPredictor
from dlrm_scale.tuning.records import read_records
from dlrm_scale.tuning.scores import kendall_tau
from dlrm_scale.tuning.space import Space, load_space
from dlrm_scale.tuning.trial import samples_per_second
from tools.charts import Axis, Dot, bars, chart, page
from tools.tune.common import add_space, of_use
from tools.tune.evaluate import cross_predict, folds_of, jobs_of
from tools.tune.session import RECORDS, read_lines

LEAST = 5  # measured runs, for anything to be drawn
SIZES = (2, 5, 10, 20, 50, 100, 200)
DRAWS = 3  # of the records that a point of the learning curve learns from, and of each knob's permutation


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = "example: python -m tools.tune report --space configs/tuning/quickstart.yaml --folder runs/tune_quickstart --out tuning.html"
    add_space(parser)
    parser.add_argument("--folder", required=True, metavar="DIR", help="the tuning folder")
    parser.add_argument("--out", required=True, metavar="FILE", help="the page to write")


def run(args: argparse.Namespace, console: Console) -> dict[str, Any]:
    torch.set_num_threads(1)
    space, plans, folder = load_space(args.space), Plans(), Path(args.folder)
    history = read_records([folder / RECORDS])
    records = of_use(history.records)
    measured = [r for r in records if r.outcome == "ok"]
    if len(measured) < LEAST:
        history.require(LEAST)
    known = known_runs(records, plans, space.base)
    importance = knob_importance(space, plans, [r for r in read_lines(folder / RECORDS) if r.get("trial")], known)
    curve = learning_curve(known, jobs_of(records))
    parts = [
        f"<h1>Tuning {escape(space.file.base)} on {escape(space.file.cluster)}</h1>",
        f"<p>{len(history.records)} runs: {len(measured)} measured, {len(history.records) - len(records)} failed, the others do not fit. "
        f"{len(history.problems)} lines of the records cannot be used.</p>",
        _verdict(folder),
        "<h2>Predicted against measured</h2><p>Each run by a predictor that never saw it or a repeat of it; orange: the analytic model alone.</p>",
        _predicted(known, folds_of(records, 0)),
        "<h2>Learning curve</h2><p>Kendall's tau (blue) and the mean absolute error as a part (orange) on runs of jobs that were not learned from.</p>",
        _curve(curve),
        "<h2>Which knobs matter</h2><p>How much the prediction of log milliseconds a sample gets worse when the knob's values are swapped "
        "among the runs.</p>",
        bars(importance, "") if importance else "<p>No run of this space was measured.</p>",
        "<h2>Speed against memory</h2><p>The line joins runs that no other beats in both.</p>",
        _frontier([r for r in read_lines(folder / RECORDS) if r.get("outcome") == "ok" and r.get("peak_memory")]),
    ]
    try:
        Path(args.out).write_text(page(f"Tuning {space.file.base}", parts))
    except OSError as e:
        raise ConfigError(f"cannot write {args.out}: {e.strerror}; name another place: --out") from None
    return {"report": args.out, "measured": len(measured), "knob_importance": importance, "learning_curve": curve}


def show(result: dict[str, Any], console: Console) -> None:
    console.print(f"next: open {result['report']} in a browser")


# ------------------------------------------------------------ figures
def learning_curve(known: KnownRuns, jobs_N: np.ndarray) -> list[dict[str, float]]:
    """At each number of jobs learned from: tau and error of log time on the runs of the others, means over draws."""
    usable_N = known.measured.fits_N & known.table.feasible_N
    jobs = np.unique(jobs_N[usable_N])
    curve = []
    for size in (s for s in SIZES if s <= len(jobs) - 3):
        taus, errors = [], []
        for draw in range(DRAWS):
            drawn = np.random.default_rng(draw).permutation(jobs)[:size]
            seen_N = np.isin(jobs_N, drawn)
            seen, rest = np.flatnonzero(usable_N & seen_N), np.flatnonzero(usable_N & ~seen_N)
            predictor, m = NeuralPredictor(draw), known.measured
            predictor.fit(known.table.take(seen), Measured(m.step_ms_N[seen], m.fits_N[seen], m.group_N[seen]))
            table = known.table.take(rest)
            predicted, true = predictor.predict(table).log_ms_N, np.log(m.step_ms_N[rest])
            samples = np.log(table.global_batch_N)
            taus.append(kendall_tau(predicted - samples, true - samples))
            errors.append(float(np.abs(np.exp(predicted - true) - 1).mean()))
        curve.append({"records": size, "tau": float(np.mean(taus)), "mape": float(np.mean(errors))})
    return curve


def knob_importance(space: Space, plans: Plans, lines: list[dict[str, Any]], known: KnownRuns) -> dict[str, float]:
    """Rise of the root mean square error of log milliseconds a sample when a knob's values are swapped among the measured points."""
    points, cost = [], []
    for line in lines:
        if line["outcome"] == "ok" and line["trial"]["space"] == space.fingerprint:
            points.append(space.point(line["trial"]["point"]))
            cost.append(-math.log(samples_per_second(line)))
    if not points:
        return {}
    predictor, featuriser, true_N = NeuralPredictor(), Featuriser(space, plans), np.array(cost)
    predictor.fit(known.table, known.measured)

    def error(changed: list[Point]) -> float:
        table = featuriser(changed).table
        cost_N = predictor.predict(table).log_ms_N - np.log(table.global_batch_N) - math.log(1e3)
        known_N = np.isfinite(cost_N)
        return float(np.sqrt(np.square(cost_N - true_N)[known_N].mean())) if known_N.any() else math.nan

    base, first = error(points), {name: choices[0] for name, choices in space.choices.items()}
    found = {}
    for name in space.knobs:
        rises = []
        for draw in range(DRAWS):
            donors = [points[i] for i in np.random.default_rng(draw).permutation(len(points)).tolist()]
            swapped = [
                space.point({**first, **own, name: donor[name]}) if name in own and name in donor else own
                for own, donor in zip(points, donors, strict=True)
            ]
            rises.append(error(swapped) - base)
        found[name] = float(np.nanmean(rises))
    return found


def frontier(runs: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """Of (bytes, speed): those that no other has both less of and more of, from the smallest on."""
    best: list[tuple[float, float]] = []
    for size, speed in sorted(runs, key=lambda run: (run[0], -run[1])):
        if not best or speed > best[-1][1]:
            best.append((size, speed))
    return best


# ------------------------------------------------------------ parts of the page
def _verdict(folder: Path) -> str:
    path = folder / "result.json"
    if not path.exists():
        return "<p>The search has no verdict yet.</p>"
    result = json.loads(path.read_text())
    if result["accepted"] is None:
        return "<p><b>Nothing faster than the base stood up to being measured again.</b></p>"
    best = result["tried"][-1]
    speed, knobs = (
        best["speed"],
        "".join(f"<tr><td>{escape(k)}</td><td>{escape(str(v))}</td></tr>" for k, v in best["point"].items()),
    )
    quality = "".join(
        f"<p>Held-out NE of {escape(q['label'])}: {q['difference']:+.4f} beside a noise of {q['noise']:.4f}.</p>"
        for q in best["quality"]
    )
    return (
        f"<p><b>{speed['gain']:.2f} x the base</b> ({speed['least']:.2f} to {speed['most']:.2f} in {len(speed['base'])} interleaved "
        f"repeats).</p>{quality}<table>{knobs}</table>"
    )


def _predicted(known: KnownRuns, folds_N: np.ndarray) -> str:
    ours, measured = cross_predict(known, folds_N, 0), known.measured
    rows = [i for i in np.flatnonzero(measured.fits_N).tolist() if np.isfinite(ours.log_ms_N[i])]
    dots = []
    for i in rows:
        true, analytic, mine = measured.step_ms_N[i], known.table.analytic_ms_N[i], math.exp(ours.log_ms_N[i])
        dots.append(Dot(true, analytic, f"measured {true:.4g} ms, analytic {analytic:.4g}", colour=1))
        dots.append(Dot(true, mine, f"measured {true:.4g} ms, predicted {mine:.4g}"))
    if not dots:
        return "<p>Too few runs to hold some out.</p>"
    true = [dot.x for dot in dots]
    x, y = (
        Axis.around("measured ms", true, log=True),
        Axis.around("predicted ms", [*true, *(dot.y for dot in dots)], log=True),
    )
    return chart(x, y, dots, [([(min(true), min(true)), (max(true), max(true))], 2)])


def _curve(curve: list[dict[str, float]]) -> str:
    if len(curve) < 2:
        return "<p>Too few runs to learn from some and hold the others out.</p>"
    sizes = [c["records"] for c in curve]
    lines = [[(c["records"], c[score]) for c in curve] for score in ("tau", "mape")]
    values = [value for line in lines for _, value in line]
    dots = [
        Dot(c["records"], c[s], f"{c['records']} jobs: {s} {c[s]:.3f}", i)
        for i, s in enumerate(("tau", "mape"))
        for c in curve
    ]
    return chart(
        Axis.around("jobs learned from", sizes, log=True),
        Axis.around("tau, error", values),
        dots,
        [(lines[0], 0), (lines[1], 1)],
    )


def _frontier(lines: list[dict[str, Any]]) -> str:
    runs = [
        (
            max(rank.get("gpu_bytes", rank["host_bytes"]) for rank in line["peak_memory"]) / 1e9,
            samples_per_second(line),
            line,
        )
        for line in lines
    ]
    if not runs:
        return "<p>No run told its memory.</p>"
    dots = [
        Dot(
            gb, speed, f"{line.get('tuning', {}).get('name', line['name'])}: {speed:,.0f} samples/s, {gb:.3g} GB a rank"
        )
        for gb, speed, line in runs
    ]
    x = Axis.around("peak GB of the fullest rank (GPU memory, or the process's)", [dot.x for dot in dots])
    y = Axis.around("samples/s", [dot.y for dot in dots])
    return chart(x, y, dots, [(frontier([(gb, speed) for gb, speed, _ in runs]), 3)])

"""`plan`: our planner beside TorchRec's on random problems: time, score, bound, gap; and against exact optima."""

import argparse
import resource
import statistics
import time
from collections.abc import Iterator
from typing import Any

from rich.console import Console
from rich.table import Table

from dlrm_scale.errors import PlanError
from dlrm_scale.sharding.bound import choice_totals, lower_bound
from dlrm_scale.sharding.plan import PlanRequest
from dlrm_scale.sharding.planner import find_plan, prepare
from tools.benchmark.exact import exact_optimum
from tools.benchmark.stock import SETTINGS, stock_plan
from tools.benchmark.workloads import filled, random_request, stock_options
from tools.commands import folded

EXACT_SECONDS = 60.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = __doc__.split(": ", 1)[1]
    parser.epilog = (
        "example: python -m tools.benchmark plan --tables 26 60 --ranks 8 --seeds 10 --fill 0 0.9 --json > planner.json"
    )
    parser.add_argument("--tables", type=int, nargs="+", default=[26, 60], metavar="N")
    parser.add_argument("--ranks", type=int, nargs="+", default=[8], metavar="N")
    parser.add_argument(
        "--fill", type=float, nargs="+", default=[0.0], help="least bytes over HBM of all ranks; 0: ample HBM"
    )
    parser.add_argument(
        "--workload", choices=("even", "skewed"), default="skewed", help="see tools/benchmark/workloads.py"
    )
    parser.add_argument("--seeds", type=int, default=3, help="problems a cell, seeds 0, 1, ... (default 3)")
    parser.add_argument(
        "--stock", nargs="*", default=list(SETTINGS), choices=SETTINGS, help="TorchRec settings to run beside"
    )
    parser.add_argument(
        "--stock-seconds", type=int, default=60, help="TorchRec's search limit; its enumeration has none"
    )
    parser.add_argument(
        "--exact", type=int, metavar="CASES", help="instead: this many small cases against HiGHS's optimum"
    )


def run(args: argparse.Namespace, console: Console) -> dict[str, Any]:
    if args.exact:
        return _exact(args.exact, console)
    rows = []
    cells = [(t, r, f, s) for t in args.tables for r in args.ranks for f in args.fill for s in range(args.seeds)]
    with console.status("planning") as status:
        for i, (num_tables, num_ranks, fill, seed) in enumerate(cells):
            status.update(
                f"{i + 1} of {len(cells)}: {num_tables} tables, {num_ranks} ranks, fill {fill:g}, seed {seed}"
            )
            request = random_request(num_tables, num_ranks, seed, args.workload)
            request = filled(request, fill) if fill else request
            row = {"tables": num_tables, "ranks": num_ranks, "fill": fill, "seed": seed, **_ours(request)}
            for setting in args.stock:
                answer = stock_plan(request, setting, args.stock_seconds)
                row[f"{setting}_ms"], row[f"{setting}_seconds"] = answer.score_ms, answer.seconds
            rows.append(row)
    return {
        "workload": args.workload,
        "rows": rows,
        "cells": list(_cells(rows, args.stock)),
        "peak_rss_bytes": _peak_rss_bytes(),
    }


def _ours(request: PlanRequest) -> dict[str, Any]:
    """Once in TorchRec's own option space, where scores compare, and once with the column widths that we add."""
    row: dict[str, Any] = {}
    for name in ("same", "wide"):
        started = time.monotonic()
        try:
            planned = find_plan(request, options=stock_options(request) if name == "same" else None)
        except PlanError as e:
            row |= {f"{name}_ms": None, f"{name}_bound_ms": None, f"{name}_proven": "no sharding plan fits" in str(e)}
        else:
            plan = planned.plan
            row |= {f"{name}_ms": plan.score_ms, f"{name}_bound_ms": plan.bound_ms, f"{name}_proven": None}
        row[f"{name}_seconds"] = time.monotonic() - started
    row["rss_bytes"] = _peak_rss_bytes()
    return row


def _cells(rows: list[dict[str, Any]], stock: list[str]) -> Iterator[dict[str, Any]]:
    """Medians over seeds; ratios are TorchRec's score over ours in the same space."""
    for key in sorted({(r["tables"], r["ranks"], r["fill"]) for r in rows}):
        cell = [r for r in rows if (r["tables"], r["ranks"], r["fill"]) == key]
        solved = [r for r in cell if r["same_ms"] is not None]
        out: dict[str, Any] = {
            "tables": key[0],
            "ranks": key[1],
            "fill": key[2],
            "seeds": len(cell),
            "solved": len(solved),
        }
        out["proven_impossible"] = sum(bool(r["same_proven"]) for r in cell)
        if solved:
            out["seconds"] = statistics.median(r["same_seconds"] for r in solved)
            gaps = [r["same_ms"] / r["same_bound_ms"] - 1 for r in solved]
            out["gap"], out["largest_gap"] = statistics.median(gaps), max(gaps)
            wide = [r["same_ms"] / r["wide_ms"] for r in solved if r["wide_ms"]]
            out["same_over_wide"] = statistics.median(wide) if wide else None
        for name in stock:
            both = [r[f"{name}_ms"] / r["same_ms"] for r in solved if r[f"{name}_ms"] is not None]
            out[name] = {
                "solved": sum(r[f"{name}_ms"] is not None for r in cell),
                "seconds": statistics.median(r[f"{name}_seconds"] for r in cell),
                "ratio": statistics.median(both) if both else None,
                "least_ratio": min(both) if both else None,
                "largest_ratio": max(both) if both else None,
            }
        yield out


def _exact(num_cases: int, console: Console) -> dict[str, Any]:
    """Small cases, memory loose and tight in turn."""
    rows = []
    with console.status("solving exactly") as status:
        for seed in range(num_cases):
            status.update(f"case {seed + 1} of {num_cases}")
            request = random_request(num_tables=4 + seed % 9, num_ranks=(2, 4, 8)[seed % 3], seed=1000 + seed)
            request = filled(request, 0.85) if seed % 2 else request
            prepared = prepare(request)
            bound = lower_bound(prepared.problem, choice_totals(prepared.problem, prepared.cutter))
            exact = exact_optimum(prepared.problem, EXACT_SECONDS)
            try:
                ours = find_plan(request).plan.score_ms
            except PlanError:
                ours = None
            rows.append(
                {"seed": seed, "tables": len(request.tables), "ranks": request.cluster.num_ranks, "ours_ms": ours,
                 "exact_ms": exact.score_ms, "is_proven": exact.is_proven, "proven_bound_ms": exact.bound_ms, "bound_ms": bound.ms}
            )  # fmt: skip
    known = [r for r in rows if r["is_proven"] and r["exact_ms"] is not None]
    return {
        "rows": rows,
        "proven": len(known),
        "impossible": sum(r["is_proven"] and r["exact_ms"] is None for r in rows),
        "found_where_one_exists": sum(r["ours_ms"] is not None for r in known),
        "within_1_percent": sum(r["ours_ms"] is not None and r["ours_ms"] <= 1.01 * r["exact_ms"] for r in known),
        "bound_above_optimum": sum(r["bound_ms"] > r["exact_ms"] * (1 + 1e-6) for r in known),
    }


def show(result: dict[str, Any], console: Console) -> None:
    if "cells" not in result:
        console.print(
            f"{result['proven']} cases with a proven optimum: within 1 % of it in {result['within_1_percent']}, bound above it in "
            f"{result['bound_above_optimum']}; {result['impossible']} cases proven to have no plan"
        )
        return
    stock = [name for name in SETTINGS if name in result["cells"][0]]
    title = f"{result['workload']}: medians over seeds; x: TorchRec's score over ours, same options"
    grid = Table(title=folded(title), title_justify="left")
    for column in ("tables", "ranks", "fill", "s", "gap", *(f"{name} x (s)" for name in stock)):
        grid.add_column(column, justify="right")
    for cell in result["cells"]:
        ours = (
            (f"{cell['seconds']:.1f}", f"{cell['gap']:.1%}")
            if cell["solved"]
            else ("-", f"none ({cell['proven_impossible']} proven)")
        )
        theirs = [
            f"{cell[name]['ratio']:.2f} ({cell[name]['seconds']:.0f})"
            if cell[name]["ratio"]
            else f"none ({cell[name]['seconds']:.0f})"
            for name in stock
        ]
        grid.add_row(str(cell["tables"]), str(cell["ranks"]), f"{cell['fill']:g}", *ours, *theirs)
    console.print(grid)


def _peak_rss_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

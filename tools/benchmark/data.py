"""`data`: rows a second of the loader alone, a core, and where its time goes; beside a plain loop over the same files."""

from __future__ import annotations

import argparse
import time
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import numpy as np
from rich.console import Console

from dlrm_scale.config import check_num_ranks
from dlrm_scale.config_io import load_config
from dlrm_scale.data.open import open_source
from dlrm_scale.libraries import loading_libraries
from tools.benchmark.tables import table_of
from tools.benchmark.timing import Case, Spread, spread, time_interleaved
from tools.commands import positive

if TYPE_CHECKING:
    from tools.benchmark.data_reading import Pass

PARTS = {"read": "read, decode, check", "shuffle": "windows, shuffle", "batch": "cut into batches"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Read a configuration's training data as one of its ranks does, without training: rows a second of CPU time (of all threads), and the part\n"
        "of each stage. Files of Parquet and .npy are also read in turn by a plain loop that checks and shuffles nothing."
    )
    parser.epilog = "example: python -m tools.benchmark data --config configs/quickstart.yaml --consumed 20000"
    parser.add_argument("--config", required=True, metavar="YAML")
    parser.add_argument("changes", nargs="*", metavar="KEY=VALUE", help="to the configuration")
    parser.add_argument("--nproc", type=positive, default=2, metavar="N", help="ranks; the first is read (default 2)")
    parser.add_argument(
        "--rows", type=positive, default=1_000_000, metavar="N", help="of all ranks, at most (default 1000000)"
    )
    parser.add_argument("--seconds", type=positive, default=20, metavar="S", help="to measure (default 20)")
    parser.add_argument("--consumed", type=positive, metavar="N", help="rows a second that a rank's training consumes")


def run(args: argparse.Namespace, console: Console) -> dict[str, Any]:
    """Raises ConfigError or DataError, as training does."""
    config = load_config(args.config, args.changes)
    check_num_ranks(config, args.nproc)
    with loading_libraries():  # takes seconds, which a wrong key need not wait for
        from tools.benchmark.data_reading import read_once, read_plainly
        from tools.benchmark.plain_reading import plain_batches
    begun = time.perf_counter()
    source = open_source(config.data, config.features, "train", config.seed)
    open_seconds = time.perf_counter() - begun
    passes: dict[str, list[Pass]] = {"loader": []}
    calls = {"loader": lambda: passes["loader"].append(read_once(config, source, args.nproc, args.rows))}
    num_rows = read_once(config, source, args.nproc, args.rows).rows
    if plain_batches(config) is not None:
        passes["plain loop"] = []
        calls["plain loop"] = lambda: passes["plain loop"].append(read_plainly(config, num_rows))
    with console.status("reading"):
        time_interleaved({name: Case(call) for name, call in calls.items()}, args.seconds)
    counted = {name: found[1:] for name, found in passes.items()}  # the first round only warms up
    return {
        "config": args.config,
        "changes": args.changes,
        "rows": num_rows,
        "rounds": len(counted["loader"]),
        "open_seconds": open_seconds,
        "consumed_rows_per_s": args.consumed,
        "readings": {name: summary(found, counted["loader"]) for name, found in counted.items()},
    }


def summary(passes: list[Pass], loader: list[Pass]) -> dict[str, Any]:
    """`over_loader`: rows a core of each round, over the loader's in that round."""

    def per_core(of: Pass) -> float:
        return of.rows / of.cpu_seconds

    return {
        "rows_per_core_s": asdict(spread([per_core(p) for p in passes])),
        "rows_per_s": asdict(spread([p.rows / p.wall_seconds for p in passes])),
        "over_loader": asdict(spread([per_core(p) / per_core(own) for p, own in zip(passes, loader, strict=True)])),
        "parts_ns_per_row": {
            part: float(np.median([p.parts[part] / p.rows for p in passes]) * 1e9) for part in passes[0].parts
        },
    }


# ------------------------------------------------------------ to read
def show(result: dict[str, Any], console: Console) -> None:
    title = f"{result['config']}: {result['rows']:,} rows a round, {result['rounds']} rounds: median (p10..p90)"
    grid = table_of(title, "rows/s a core", "wall clock", "over loader")
    for name, found in result["readings"].items():
        of_loader = _range(Spread(**found["over_loader"]), ".2f") if name != "loader" else ""
        wall = f"{found['rows_per_s']['median']:,.0f}"
        grid.add_row(name, _range(Spread(**found["rows_per_core_s"]), ",.0f"), wall, of_loader)
    console.print(grid)
    loader = result["readings"]["loader"]
    for part, ns in loader["parts_ns_per_row"].items():
        console.print(f"{PARTS[part]}: {ns:,.0f} ns a row")
    console.print(f"opening the source took {result['open_seconds']:.2f} s")
    if result["consumed_rows_per_s"]:
        times = loader["rows_per_core_s"]["median"] / result["consumed_rows_per_s"]
        console.print(f"a core loads {times:.1f} times what a rank consumes")


def _range(of: Spread, form: str) -> str:
    return f"{of.median:{form}} ({of.p10:{form}}..{of.p90:{form}})"

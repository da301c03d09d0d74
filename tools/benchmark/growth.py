"""`growth`: samples a second as the batch, the tables, their rows or the sequences grow; one plot each."""

import argparse
import json
import time
from collections.abc import Callable, Collection, Iterable, Sequence
from html import escape
from pathlib import Path
from typing import Any

from rich.console import Console

from dlrm_scale.config import RunConfig, check_num_ranks
from dlrm_scale.config_io import apply_override, parse_config, read_tree
from dlrm_scale.errors import ConfigError, NoPlanError
from dlrm_scale.host import host_bytes
from dlrm_scale.tuning.trial import short
from dlrm_scale.whole_files import write_whole
from tools.benchmark.ranks import NoMemoryError
from tools.benchmark.tables import counted, table_of, with_range
from tools.benchmark.train import Variant, measure_here, spread, telling
from tools.charts import Axis, Dot, chart, page
from tools.commands import is_positive, positive

Tree = dict[str, Any]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Train a configuration for some steps at several sizes of one thing at a time, all sizes in turn, several times. A size that does not\n"
        "fit into memory is told as such, with the limit, and the others go on. After each, the result of all so far is written."
    )
    parser.epilog = "example: python -m tools.benchmark growth --config configs/quickstart.yaml --axis batch 256 1024 4096 --html growth.html"
    parser.add_argument("--config", required=True, metavar="YAML")
    parser.add_argument("changes", nargs="*", metavar="KEY=VALUE", help="to the configuration")
    parser.add_argument(
        "--axis", nargs="+", action="append", metavar=("NAME", "SIZE"),
        help=f"{', '.join(AXES)}, and sizes; can be given several times (default: all, at sizes of their own)",
    )  # fmt: skip
    parser.add_argument("--nproc", type=positive, default=2, metavar="N", help="ranks (default 2)")
    parser.add_argument("--threads", type=positive, default=1, metavar="N", help="of each rank (default 1)")
    parser.add_argument(
        "--steps", type=positive, default=16, metavar="N", help="a quarter of them warm-up (default 16)"
    )
    parser.add_argument("--repeats", type=positive, default=3, metavar="N", help="(default 3)")
    parser.add_argument("--out", metavar="FILE", help="the result as JSON (default runs/growth_TIME.json)")
    parser.add_argument("--html", metavar="FILE", help="the plots")


# ------------------------------------------------------------ what grows
def _batch(tree: Tree, size: int) -> None:
    tree["train"]["global_batch_size"] = size


def _tables(tree: Tree, size: int) -> None:
    """So many categorical features, each with a table like the first one's; sequences keep theirs."""
    features = tree["features"]
    first = features["categorical"][0]
    of_sequences = {field["table"] for sequence in features.get("sequences", []) for field in sequence["fields"]}
    kept = {name: table for name, table in features["tables"].items() if name in of_sequences}
    grown = {f"grown_{i}": features["tables"][first["table"]] for i in range(size)}
    features["tables"] = {**kept, **grown}
    features["categorical"] = [{**first, "name": name, "table": name} for name in grown]
    rules = tree.get("sharding", {}).get("tables", {})
    for name in [name for name in rules if name not in features["tables"]]:
        del rules[name]


def _rows(tree: Tree, size: int) -> None:
    for table in tree["features"]["tables"].values():
        table["num_embeddings"] = size


def _sequence(tree: Tree, size: int) -> None:
    sequences = tree["features"].get("sequences", [])
    if not sequences:
        raise ConfigError(
            "--axis sequence: the configuration has no sequence; take one that has, as configs/quickstart.yaml, or name the other axes: "
            "--axis batch --axis tables --axis rows"
        )
    for sequence in sequences:
        sequence["max_length"] = size
        sequence["pooling_factor"] = max(1, size / 2)


AXES: dict[str, tuple[Callable[[Tree, int], None], str, tuple[int, ...]]] = {
    "batch": (_batch, "global batch size, samples", (256, 1024, 4096, 16_384, 32_768)),
    "tables": (_tables, "tables, one for each categorical feature", (8, 32, 128, 512)),
    "rows": (_rows, "rows of each table", (10_000, 100_000, 1_000_000, 10_000_000, 100_000_000)),
    "sequence": (_sequence, "events of a sequence at most", (10, 30, 100, 300, 1000)),
}


# ------------------------------------------------------------ measuring
def run(args: argparse.Namespace, console: Console) -> dict[str, Any]:
    """Raises ConfigError; else as `run_on_ranks`, but for memory that runs out."""
    cells = [(axis, size, _variant(args, axis, size)) for axis, sizes in axes_of(args) for size in sizes]
    found: dict[tuple[str, int], list[dict[str, Any]]] = {(axis, size): [] for axis, size, _ in cells}
    unfit: dict[tuple[str, int], str] = {}
    out = args.out or f"runs/growth_{time.strftime('%Y%m%d-%H%M%S')}.json"

    def so_far() -> dict[str, Any]:
        return {
            "config": args.config,
            "changes": args.changes,
            "steps": args.steps,
            "repeats": args.repeats,
            "cells": [_cell(axis, size, found[axis, size], unfit.get((axis, size))) for axis, size, _ in cells],
            "out": out,
            "html": args.html,
        }

    _save(so_far())  # that it cannot be must not show after hours
    console.print(f"the result so far is always in {' and '.join(filter(None, (out, args.html)))}")
    with console.status("") as status:
        for repeat in range(args.repeats):
            for number, (axis, size, variant) in enumerate(cells, start=1):
                if (axis, size) in unfit:
                    continue
                what = f"{axis} {size:,}, {repeat + 1} of {args.repeats}"
                tell = telling(status, what)
                tell("starting")
                try:
                    found[axis, size].append(measure_here(variant, tell))
                    told = f"{found[axis, size][-1]['samples_per_s']:,.0f} samples/s"
                except (NoPlanError, NoMemoryError) as e:
                    unfit[axis, size] = _limit(e)
                    told = "does not fit"
                done = repeat * len(cells) + number
                console.print(f"{done} of {args.repeats * len(cells)}: {what}: {told}")
                _save(so_far())
    return so_far()


def _limit(e: NoPlanError | NoMemoryError) -> str:
    """What is short, and of how much."""
    if isinstance(e, NoPlanError):
        return "; ".join(line.strip() for line in str(e).splitlines()[:2])  # the rest is how to make it fit
    return f"{e}; the machine has {host_bytes() / 1e9:.1f} GB of host memory"


def axes_of(args: argparse.Namespace) -> list[tuple[str, tuple[int, ...]]]:
    """Raises ConfigError: no such axis, one given twice, or a size that is no number."""
    if not args.axis:
        return [(name, sizes) for name, (_, _, sizes) in AXES.items()]
    return [(name, sizes or AXES[name][2]) for name, sizes in parse_axes(args.axis, AXES)]


def parse_axes(given: Iterable[Sequence[str]], known: Collection[str]) -> list[tuple[str, tuple[int, ...]]]:
    """(name, sizes) of each `--axis`. Raises ConfigError: no such axis, one given twice, or a size that is no number."""
    found: dict[str, tuple[int, ...]] = {}
    for name, *sizes in given:
        if name not in known:
            raise ConfigError(f"--axis has no {name!r}; it has {', '.join(known)}")
        if name in found:
            raise ConfigError(f"--axis {name} is given twice; name all of its sizes behind one")
        wrong = [size for size in sizes if not is_positive(size)]
        if wrong:
            raise ConfigError(f"--axis {name}: a size is a whole number above 0, but one is {wrong[0]!r}")
        found[name] = tuple(dict.fromkeys(map(int, sizes)))
    return list(found.items())


def _variant(args: argparse.Namespace, axis: str, size: int) -> Variant:
    tree = read_tree(args.config, RunConfig, "configuration")
    for change in (*args.changes, *short(args.steps)):
        apply_override(tree, change)
    AXES[axis][0](tree, size)
    config = parse_config(tree, f"{args.config} at {axis} {size}")
    check_num_ranks(config, args.nproc)
    return Variant(f"{axis} {size}", config, args.nproc, args.threads, measure_here)


def _cell(axis: str, size: int, runs: list[dict[str, Any]], unfit: str | None) -> dict[str, Any]:
    cell: dict[str, Any] = {"axis": axis, "size": size, "does_not_fit": unfit, "repeats": len(runs)}
    if runs:
        cell["samples_per_s"] = spread([run["samples_per_s"] for run in runs])
        cell["host_gb_a_rank"] = max(m["host_bytes"] for run in runs for m in run["peak_memory"]) / 1e9
    return cell


# ------------------------------------------------------------ to read
def plots(result: dict[str, Any]) -> list[str]:
    """Parts of a page: for each axis one plot, and which sizes do not fit."""
    parts = [
        f"<h1>{escape(result['config'])} {escape(' '.join(result['changes']))}: samples a second as it grows</h1>",
        "<p>Dots are medians of the repeats, bars reach from the least to the most. Both axes are logarithmic.</p>",
    ]
    for axis, (_, name, _) in AXES.items():
        cells = [cell for cell in result["cells"] if cell["axis"] == axis]
        measured = [cell for cell in cells if "samples_per_s" in cell]
        if cells:
            parts.append(f"<h2>{name}</h2>")
        if measured:
            parts.append(_plot(name, sorted(measured, key=lambda cell: cell["size"])))
        parts += [
            f"<p>{cell['size']:,} does not fit: {escape(cell['does_not_fit'])}</p>"
            for cell in cells
            if cell["does_not_fit"]
        ]
    return parts


def _plot(name: str, cells: Sequence[dict[str, Any]]) -> str:
    sizes, speeds = [cell["size"] for cell in cells], [cell["samples_per_s"] for cell in cells]
    medians = [(size, speed["median"]) for size, speed in zip(sizes, speeds, strict=True)]
    bars = [([(size, speed["least"]), (size, speed["most"])], 1) for size, speed in zip(sizes, speeds, strict=True)]
    dots = [
        Dot(
            size,
            median,
            f"{size:,}: {median:,.0f} samples/s, {cell['host_gb_a_rank']:.2f} GB a rank, {counted(cell['repeats'], 'repeat')}",
        )
        for (size, median), cell in zip(medians, cells, strict=True)
    ]
    ends = [speed[end] for speed in speeds for end in ("least", "most")]
    x, y = Axis.around(name, sizes, log=True, marked=sizes), Axis.around("samples/s", ends, log=True)
    return chart(x, y, dots, [(medians, 0), *bars])


def _save(result: dict[str, Any]) -> None:
    """Raises ConfigError."""
    _write("--out", result["out"], json.dumps(result, indent=1) + "\n")
    if result["html"]:
        _write("--html", result["html"], page("Growth", plots(result)))


def _write(option: str, path: str, text: str) -> None:
    try:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        write_whole(Path(path), text)
    except OSError as e:
        raise ConfigError(f"cannot write {path}: {e.strerror}; name another place: {option}") from None


def show(result: dict[str, Any], console: Console) -> None:
    repeats = result["repeats"]
    medians = ": median (least to most)" if repeats > 1 else ""
    grid = table_of(f"{result['config']}, {counted(repeats, 'repeat')}{medians}", "size", "samples/s", "GB a rank")
    for cell in result["cells"]:
        speed = cell.get("samples_per_s")
        told = with_range(speed, ",.0f", cell["repeats"]) if speed else ""
        if cell["does_not_fit"]:
            told += " does not fit"  # it may have, in an earlier repeat
        grid.add_row(cell["axis"], f"{cell['size']:,}", told, f"{cell['host_gb_a_rank']:.2f}" if speed else "")
    console.print(grid)
    for cell in result["cells"]:
        if cell["does_not_fit"]:
            console.print(f"{cell['axis']} {cell['size']:,} does not fit: {cell['does_not_fit']}")
    console.print(f"the result is in {result['out']}")
    console.print(
        f"next: open {result['html']} in a browser" if result["html"] else "next: the same with --html FILE draws it"
    )

"""`model`: the dense arch alone on its inputs, in one process: what its forward and backward pass take, and how far that is from the limit."""

import argparse
import itertools
import os
from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.table import Table

from dlrm_scale.allocator import SETTING, VARIABLE
from dlrm_scale.libraries import loading_libraries
from tools.benchmark.model_cells import AXES, BASE, cells_of
from tools.benchmark.peaks import GPU_CLASSES
from tools.benchmark.tables import in_digits, table_of
from tools.commands import positive

LIMITS = ("matrix", "kept", "op\nby op")  # as dense_work.limits_ms gives them


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Time the dense arch of a configuration without tables, data or other ranks, in turn with variants of it, at every combination of sizes;\n"
        "the machine's peaks are measured in the same rounds. Or count what it has to do, and tell how long a GPU of a class would take at its peaks."
    )
    parser.epilog = (
        "example: python -m tools.benchmark model --config configs/benchmark/interformer_t100.yaml --variant bf16 train.precision=bf16\n"
        "         ... --axis dim 128 256 --axis sequence 200 1000 --axis batch 1024 train.precision=bf16 --expected H200"
    )
    parser.add_argument("--config", required=True, metavar="YAML", help="its global batch is one rank's here")
    parser.add_argument("changes", nargs="*", metavar="KEY=VALUE", help="of the base and all variants")
    parser.add_argument(
        "--variant", nargs="+", action="append", default=[], metavar=("NAME", "KEY=VALUE"),
        help="beside the base; can be given several times",
    )  # fmt: skip
    parser.add_argument(
        "--axis", nargs="+", action="append", default=[], metavar=("NAME", "SIZE"),
        help=f"{', '.join(AXES)}, and sizes; can be given several times",
    )  # fmt: skip
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="(default auto)")
    parser.add_argument(
        "--threads", type=positive, metavar="N", help="of a CPU (default: as many as PyTorch takes by itself)"
    )
    parser.add_argument("--seconds", type=positive, default=10, metavar="N", help="of each combination (default 10)")
    parser.add_argument(
        "--profile", action="store_true", help="tell each variant's costliest operations at the first sizes"
    )
    parser.add_argument(
        "--expected", nargs="+", choices=sorted(GPU_CLASSES), metavar="GPU",
        help=f"measure nothing, and compute for these classes: {', '.join(GPU_CLASSES)}",
    )  # fmt: skip


# ------------------------------------------------------------ measuring
def run(args: argparse.Namespace, console: Console) -> dict[str, Any]:
    """Raises ConfigError."""
    by_sizes = cells_of(args)
    with loading_libraries():  # takes seconds, which a wrong key need not wait for
        from tools.benchmark.model_timing import Built, chosen_device, expected, measured, name_of
    result: dict[str, Any] = {"config": args.config, "changes": args.changes, "device": None, "rows": []}
    if args.expected:
        with console.status("counting"):
            for cell in itertools.chain.from_iterable(by_sizes):
                result["rows"] += expected(cell, args.expected)
        return result
    device = chosen_device(args.device, args.threads, list(itertools.chain.from_iterable(by_sizes)))
    result |= {"device": name_of(device), "costliest": {}}
    with console.status("") as status:
        for number, cells in enumerate(by_sizes):
            status.update(f"{number + 1} of {len(by_sizes)} combinations of sizes")
            built = [Built(cell, device) for cell in cells]
            result["rows"] += measured(cells, built, device, args.seconds)
            if args.profile and number == 0:
                result["costliest"] = {cell.name: each.costliest() for cell, each in zip(cells, built, strict=True)}
    return result


# ------------------------------------------------------------ to read
def show(result: dict[str, Any], console: Console) -> None:
    if result["device"] is None:
        _show_expected(result, console)
        return
    about = f"on {result['device']}: ms p50, of a step p10..p90 too"
    times = _grid(result, about, "forward", "step", "p10..p90", "speed over\nbase", "MFU")
    limits = _grid(result, "ms of a step at the machine's peaks", *LIMITS, "GB\nkept", "GB\npeak")
    for row in result["rows"]:
        peak, mfu, step = row["peak_bytes"], row["mfu"], row["step_ms"]
        over = "" if row["variant"] == BASE else f"{1 / row['step_over_base']['median']:.2f}"
        times.add_row(
            *_what(row),
            in_digits(row["forward_ms"]["median"]),
            in_digits(step["median"]),
            f"{in_digits(step['p10'])}..{in_digits(step['p90'])}",
            over,
            "-" if mfu is None else f"{mfu:.1%}",
        )
        kept = in_digits(row["work"]["activation_bytes"] / 1e9)
        limits.add_row(*_what(row), *_limits(row), kept, "-" if peak is None else in_digits(peak / 1e9))
    console.print(times)
    console.print(limits)
    peaks = result["rows"][-1]["peaks"]
    flops = ", ".join(f"{precision} {rate / 1e12:,.2f} TFLOP/s" for precision, rate in peaks["flops_per_s"].items())
    console.print(f"measured in the same rounds: {flops}, copy {peaks['copy_bytes_per_s'] / 1e9:,.1f} GB/s")
    if result["device"] == "cpu" and VARIABLE not in os.environ:
        console.print(f"note: training keeps freed memory; to do so here too, put in front: {VARIABLE}={SETTING}")
    for name, table in result["costliest"].items():
        console.print(f"{name}, {table}")
    console.print("next: add --profile, or --expected H200")


def _show_expected(result: dict[str, Any], console: Console) -> None:
    about = "ms of a step by data sheets' peaks; nothing of it is measured"
    grid = _grid(result, about, "GPU", "TFLOP", "GB\nkept", *LIMITS)
    for row in result["rows"]:
        work = row["work"]
        tflop, kept = (work["forward_flops"] + work["backward_flops"]) / 1e12, work["activation_bytes"] / 1e9
        grid.add_row(*_what(row), row["gpu"], in_digits(tflop), in_digits(kept), *_limits(row))
    console.print(grid)
    console.print("next: the same without --expected on such a GPU measures it")


def _grid(result: Mapping[str, Any], about: str, *columns: str) -> Table:
    return table_of(f"{result['config']}, {about}", *result["rows"][0]["sizes"], *columns)


def _what(row: Mapping[str, Any]) -> list[str]:
    return [f"{row['variant']}, {row['precision']}", *(f"{size:,}" for size in row["sizes"].values())]


def _limits(row: Mapping[str, Any]) -> list[str]:
    return ["-" if ms is None else in_digits(ms) for ms in row["limits_ms"].values()]

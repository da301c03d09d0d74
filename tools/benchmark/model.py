"""`model`: the dense arch alone on its inputs, in one process: what its forward and backward pass take, and how far that is from the limit."""

import argparse
import itertools
import os
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch.profiler import ProfilerActivity, profile

from dlrm_scale.allocator import SETTING, VARIABLE
from dlrm_scale.config import RunConfig
from dlrm_scale.config_io import apply_override, parse_config, read_tree
from dlrm_scale.errors import ConfigError
from dlrm_scale.models.compiled import compile_arch
from dlrm_scale.models.dense_trace import Inputs, input_tensors, lookups
from dlrm_scale.models.kernels import choose_kernels
from dlrm_scale.models.ranking_model import DensePart, build_arch
from dlrm_scale.training.device import check_device, set_product_precision
from dlrm_scale.training.ranks import this_rank
from tools.benchmark.bandwidth import finish_of
from tools.benchmark.cluster import positive
from tools.benchmark.dense_work import GPU_CLASSES, DenseWork, count_dense, limits_ms
from tools.benchmark.growth import AXES as GROWTH
from tools.benchmark.growth import Tree, parse_axes
from tools.benchmark.roofline import peak_cases, peaks_of, precision_of
from tools.benchmark.tables import in_digits, table_of
from tools.benchmark.timing import Case, spread, time_interleaved
from tools.benchmark.train import refuse_equal_names

BASE = "base"
PROFILED_STEPS, ROWS_OF_PROFILE = 5, 20
LIMITS = ("matrix", "kept", "op\nby op")  # as dense_work.limits_ms gives them


def _dim(tree: Tree, size: int) -> None:
    """Of the tokens and of all tables."""
    tree["model"]["dim"] = size
    for table in tree["features"]["tables"].values():
        table["embedding_dim"] = size


AXES = {"dim": _dim, "sequence": GROWTH["sequence"][0], "batch": GROWTH["batch"][0]}


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


# ------------------------------------------------------------ what is timed
@dataclass(frozen=True)
class Cell:
    """One variant at one combination of sizes."""

    name: str
    sizes: dict[str, int]
    config: RunConfig

    @property
    def batch_size(self) -> int:
        return self.config.train.global_batch_size // self.config.train.accumulate_steps


def cells_of(args: argparse.Namespace) -> list[list[Cell]]:
    """By combination of sizes, each with the base first. Raises ConfigError."""
    variants = [(BASE, []), *((name, changes) for name, *changes in args.variant)]
    refuse_equal_names([name for name, _ in variants])
    axes = parse_axes(args.axis, AXES)
    if empty := [name for name, sizes in axes if not sizes]:
        raise ConfigError(f"--axis {empty[0]} names no size; give at least one, as --axis {empty[0]} 128")
    combinations = [
        dict(zip((n for n, _ in axes), each, strict=True)) for each in itertools.product(*(s for _, s in axes))
    ]
    return [[_cell(args, name, changes, sizes) for name, changes in variants] for sizes in combinations]


def _cell(args: argparse.Namespace, name: str, changes: Sequence[str], sizes: dict[str, int]) -> Cell:
    tree = read_tree(args.config, RunConfig, "configuration")
    for change in (*args.changes, *changes):
        apply_override(tree, change)
    for axis, size in sizes.items():  # last: what a row is called, it is
        AXES[axis](tree, size)
    return Cell(name, sizes, parse_config(tree, f"{args.config}, {name}"))


class Built:
    """The dense arch of a cell on a device, as training builds it, and random inputs."""

    def __init__(self, cell: Cell, device: torch.device) -> None:
        self.train, self.device = cell.config.train, device
        arch = build_arch(cell.config).to(device)
        choose_kernels(arch, cell.config, device)
        if self.train.compile:
            compile_arch(arch, on_cpu=device.type == "cpu")
        self.dense = DensePart(arch, self.train.precision)
        with torch.device(device):
            self.inputs: Inputs = lookups(cell.config.features, cell.batch_size)
        self.leaves = [*self.dense.parameters(), *(t for t in input_tensors(self.inputs) if t.is_floating_point())]
        with torch.no_grad():  # a GPU multiplies zeros faster than numbers
            for values in self.leaves[len(list(self.dense.parameters())) :]:
                values.normal_()

    def forward(self) -> torch.Tensor:
        set_product_precision(self.train, self.device)
        return self.dense(*self.inputs)

    def step(self) -> None:
        for leaf in self.leaves:
            leaf.grad = None
        self.forward().sum().backward()

    def peak_bytes(self) -> int | None:
        """Of one step, above parameters and inputs; None on a CPU, whose allocator does not count."""
        if self.device.type != "cuda":
            return None
        self.step()
        for leaf in self.leaves:
            leaf.grad = None
        before = torch.cuda.memory_allocated(self.device)
        torch.cuda.reset_peak_memory_stats(self.device)
        self.step()
        return torch.cuda.max_memory_allocated(self.device) - before

    def costliest(self) -> str:
        on_cuda = self.device.type == "cuda"
        self.step()
        with profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_cuda else [])]) as profiler:
            for _ in range(PROFILED_STEPS):
                self.step()
            finish_of(self.device)()
        sort = "self_cuda_time_total" if on_cuda else "self_cpu_time_total"
        return profiler.key_averages().table(sort_by=sort, row_limit=ROWS_OF_PROFILE, max_name_column_width=50)


# ------------------------------------------------------------ measuring
def run(args: argparse.Namespace, console: Console) -> dict[str, Any]:
    """Raises ConfigError."""
    by_sizes = cells_of(args)
    result: dict[str, Any] = {"config": args.config, "changes": args.changes, "device": None, "rows": []}
    if args.expected:
        with console.status("counting"):
            for cell in itertools.chain.from_iterable(by_sizes):
                result["rows"] += _expected(cell, args.expected)
        return result
    if args.threads:
        torch.set_num_threads(args.threads)
    device = this_rank(args.device).device
    result |= {"device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu", "costliest": {}}
    for cell in itertools.chain.from_iterable(by_sizes):
        check_device(cell.config, device)
    with console.status("") as status:
        for number, cells in enumerate(by_sizes):
            status.update(f"{number + 1} of {len(by_sizes)} combinations of sizes")
            built = [Built(cell, device) for cell in cells]
            result["rows"] += _measured(cells, built, device, args.seconds)
            if args.profile and number == 0:
                result["costliest"] = {cell.name: each.costliest() for cell, each in zip(cells, built, strict=True)}
    return result


def _expected(cell: Cell, classes: Sequence[str]) -> list[dict[str, Any]]:
    work, precision = count_dense(cell.config, cell.batch_size, "cuda"), precision_of(cell.config.train)
    return [
        {**_told(cell, work), "gpu": name, "limits_ms": limits_ms(work, GPU_CLASSES[name], precision)}
        for name in classes
    ]


def _told(cell: Cell, work: DenseWork) -> dict[str, Any]:
    return {
        "variant": cell.name,
        "sizes": cell.sizes,
        "batch_size": cell.batch_size,
        "precision": precision_of(cell.config.train),
        "work": asdict(work),
    }


def _measured(
    cells: Sequence[Cell], built: Sequence[Built], device: torch.device, seconds: float
) -> list[dict[str, Any]]:
    cases: dict[tuple[str, str], Case] = {}
    for cell, each in zip(cells, built, strict=True):
        each.step()  # compiles
        cases[cell.name, "forward"] = Case(each.forward, finish=finish_of(device))
        cases[cell.name, "step"] = Case(each.step, finish=finish_of(device))
    cases |= {("machine", name): case for name, case in peak_cases(device).items()}
    times = time_interleaved(cases, seconds)
    # as in `train`, peaks are of the best round
    machine = {name: min(s) for (of, name), s in times.items() if of == "machine"}
    peaks = peaks_of(machine, device, num_ranks=1)
    rows = []
    for cell, each in zip(cells, built, strict=True):
        work, precision = count_dense(cell.config, cell.batch_size, device.type), precision_of(cell.config.train)
        ratios = [own / base for own, base in zip(times[cell.name, "step"], times[BASE, "step"], strict=True)]
        flops_per_s = peaks.flops_per_s.get(precision)
        rows.append(
            {
                **_told(cell, work),
                "forward_ms": _ms(times[cell.name, "forward"]),
                "step_ms": _ms(times[cell.name, "step"]),
                "step_over_base": asdict(spread(ratios)),
                "mfu": work.flops / statistics.median(times[cell.name, "step"]) / flops_per_s if flops_per_s else None,
                "peak_bytes": each.peak_bytes(),
                "peaks": asdict(peaks),
                "limits_ms": limits_ms(work, peaks, precision),
            }
        )
    return rows


def _ms(seconds: Sequence[float]) -> dict[str, float]:
    return {name: value * 1e3 for name, value in asdict(spread(seconds)).items()}


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
        console.print(f"{name}, {PROFILED_STEPS} steps\n{table}")
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

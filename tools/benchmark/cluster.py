"""`cluster`: measures memory and collectives of this machine's ranks and writes them as a cluster file."""

import argparse
import math
import os
import platform
import re
import shlex
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import yaml
from rich.console import Console
from rich.table import Table

from dlrm_scale.cluster import CLUSTERS, ClusterSpec, CostCoefficients, Figure, bytes_per_ms, this_cluster
from dlrm_scale.errors import ConfigError
from dlrm_scale.host import available_bytes
from dlrm_scale.sharding.cost import plain_all_reduce_ms
from tools.benchmark.bandwidth import MIB, RANK_BYTES, Samples, Thing, measure
from tools.benchmark.ranks import run_on_ranks
from tools.benchmark.timing import Spread, spread
from tools.commands import positive

LARGE_BYTES = 8 * MIB  # figures are fitted to the messages above this: the cost model has no latency term
EXCHANGES = ("all-to-all", "reduce-scatter", "all-gather")  # for which the cost model has one bandwidth


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Measure memory and collectives of ranks on this machine, all ranks at once, and write the cluster file that\n"
        "planning takes. Use it on an idle machine."
    )
    parser.epilog = "example: python -m tools.benchmark cluster --nproc 2 --out configs/clusters/mine.yaml"
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto: cuda if there is one")
    parser.add_argument("--nproc", type=positive, metavar="N", help="ranks (default: one a GPU; 2 on cpu)")
    parser.add_argument(
        "--ranks-per-host", type=positive, metavar="N", help="pretend that ranks are on several hosts (default: one)"
    )
    parser.add_argument(
        "--seconds", type=_seconds, default=20.0, help="begin no round later (default 20; least: 3 rounds)"
    )
    parser.add_argument(
        "--out", type=Path, default=CLUSTERS / "mine.yaml", metavar="YAML", help="default: %(default)s; must be new"
    )


def _seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"must be a number above 0, but is {text}")
    return value


def run(args: argparse.Namespace, console: Console) -> dict[str, Any]:
    """Raises ConfigError for what does not fit this machine; else as `run_on_ranks`."""
    device, num_ranks, ranks_per_host = _ranks(args)
    _check_out(args.out)
    load = os.getloadavg()[0]
    with console.status(f"starting {num_ranks} ranks") as status:

        def told(progress: tuple[int, float]) -> None:
            status.update(f"round {progress[0] + 1}, {progress[1]:.0f} of {args.seconds:g} s")

        samples, spec = measure_cluster(device, num_ranks, ranks_per_host, args.seconds, told)
    tree = spec.model_dump(mode="json", exclude_defaults=True)
    try:
        with args.out.open("x", encoding="utf-8") as file:
            yaml.safe_dump(tree, file, sort_keys=False, width=120)
    except OSError as e:
        raise ConfigError(f"cannot write {args.out}: {e.strerror}") from None
    rows = [
        {"what": s.thing.name, "ranks": s.thing.of, "bytes": s.thing.num_bytes, "num_rounds": len(s.seconds)}
        | {f"{name}_gb_per_s": value for name, value in asdict(_gb_per_s([s])).items()}
        for s in samples
    ]
    return {"rows": rows, "cluster": tree, "out": str(args.out), "load_average": load}


def measure_cluster(
    device: str, num_ranks: int, ranks_per_host: int, seconds: float, told: Callable[[tuple[int, float]], None]
) -> tuple[Sequence[Samples], ClusterSpec]:
    """What ranks of this machine measured, and the cluster that it makes. Raises as `run_on_ranks`."""
    load = os.getloadavg()[0]
    samples = run_on_ranks(measure, (device, seconds), num_ranks, ranks_per_host, told)[0]
    command = ["python", "-m", "tools.benchmark", "cluster", "--device", device, "--nproc", str(num_ranks)]
    command += ["--ranks-per-host", str(ranks_per_host), "--seconds", f"{seconds:g}"]
    backend = "gloo over loopback" if device == "cpu" else "NCCL"
    how = f"{shlex.join(command)} ({_machine(device)}, load average {load:.1f} when it began; {backend})"
    return samples, fit(samples, device, num_ranks, ranks_per_host, how)


def _ranks(args: argparse.Namespace) -> tuple[str, int, int]:
    """Device, number of ranks, and ranks of a host. Raises ConfigError."""
    num_gpus = torch.cuda.device_count()
    device = args.device if args.device != "auto" else "cuda" if num_gpus else "cpu"
    num_ranks = args.nproc or (num_gpus if device == "cuda" else 2)
    if device == "cuda" and not num_gpus:
        raise ConfigError("--device is cuda, but no GPU is usable here; python -m tools.doctor says why")
    if device == "cuda" and num_ranks > num_gpus:
        raise ConfigError(f"--nproc is {num_ranks}, but {num_gpus} GPU(s) are usable here; take that, or --device cpu")
    check_room(num_ranks)
    ranks_per_host = args.ranks_per_host or num_ranks
    if num_ranks % ranks_per_host:
        fits = [n for n in range(1, num_ranks + 1) if num_ranks % n == 0]
        raise ConfigError(
            f"--ranks-per-host {ranks_per_host} does not divide --nproc {num_ranks}, but hosts are equal; take one of "
            f"{', '.join(map(str, fits))}"
        )
    return device, num_ranks, ranks_per_host


def check_room(num_ranks: int) -> None:
    """Raises ConfigError: less host memory than so many ranks take to measure."""
    room = available_bytes()
    if num_ranks * RANK_BYTES > room:
        raise ConfigError(
            f"--nproc is {num_ranks}, and each rank takes {RANK_BYTES / 1e9:.1f} GB of host memory to measure, but "
            f"{room / 1e9:.1f} GB are available; take at most {room // RANK_BYTES}"
        )


def _check_out(out: Path) -> None:
    """Before the measurement, which would be lost."""
    if out.suffix not in (".yaml", ".yml"):
        raise ConfigError(f"--out is {out}, but a cluster file's name ends in .yaml; take {out.with_suffix('.yaml')}")
    if out.exists():
        raise ConfigError(f"{out} is there already and is not replaced; remove it, or name another with --out")
    if not out.parent.is_dir() or not os.access(out.parent, os.W_OK):
        raise ConfigError(f"cannot write into the folder {out.parent}; make it, or name another file with --out")


def fit(samples: Sequence[Samples], device: str, num_ranks: int, ranks_per_host: int, how: str) -> ClusterSpec:
    """The cluster whose figures make the cost model's bytes / figure the median time that was measured.

    One bandwidth stands for all-to-all, reduce-scatter and all-gather together, as in TorchRec's cost model; how far each
    is from it stands in `cost_coefficients`. `how` names command and machine in the sources.
    """
    num_hosts = num_ranks // ranks_per_host
    where = f"{how}: {len(samples[0].seconds)} rounds"
    figures = {"host_memory_gb_per_s": _figure(samples, ("host lookup, 512 B rows",), 1, where)}
    if device == "cuda":
        figures["hbm_gb_per_s"] = _figure(samples, ("HBM lookup, 512 B rows",), 1, where)
        figures["host_link_gb_per_s"] = _figure(samples, ("host to HBM", "HBM to host"), 1, where)
    figures["intra_host_gb_per_s"] = _figure(samples, EXCHANGES, ranks_per_host, where)
    if num_hosts == 1:
        note = (
            f"over {num_ranks}, since the cost model takes an all-reduce at inter-host x ranks of a host; "
            "there is no second host here, so measure this anew for several"
        )
        figures["inter_host_gb_per_s"] = _figure(
            samples, ("all-reduce",), num_ranks, f"{where}; {note}", over=num_ranks
        )
    else:
        note = f"the {num_hosts} hosts are pretended, so this is no network"
        figures["inter_host_gb_per_s"] = _figure(samples, EXCHANGES, num_ranks, f"{where}; {note}")
    reported = this_cluster(num_ranks, ranks_per_host, device)
    memory = reported.host_memory_gb
    if num_hosts > 1:
        memory = Figure(value=memory.value / num_hosts, source=f"{memory.source}, over {num_hosts} pretended hosts")
    fitted = reported.model_copy(update={**figures, "host_memory_gb": memory})
    return fitted.model_copy(update={"cost_coefficients": _collective_factors(samples, fitted)})


def _collective_factors(samples: Sequence[Samples], cluster: ClusterSpec) -> CostCoefficients:
    """Of each collective: the median times of its large messages, summed, over what `cluster`'s bandwidths give."""
    factors = {}
    for name in (*EXCHANGES, "all-reduce"):
        used = [s for s in samples if s.thing.name == name and s.thing.num_bytes >= LARGE_BYTES]
        if name == "all-reduce":  # the cost model knows no all-reduce within one of several hosts
            used = [s for s in used if s.thing.of == cluster.num_ranks]
        predicted_ms = sum(_predicted_ms(s.thing, cluster) for s in used)
        measured_ms = sum(1e3 * spread(s.seconds).median for s in used)
        factors[name.replace("-", "_")] = float(f"{measured_ms / predicted_ms:.3g}")
    return CostCoefficients(**factors)


def _predicted_ms(thing: Thing, cluster: ClusterSpec) -> float:
    if thing.name == "all-reduce":
        return plain_all_reduce_ms(thing.num_bytes, cluster)
    within = thing.of == cluster.ranks_per_host
    return thing.num_bytes / bytes_per_ms(cluster.intra_host_gb_per_s if within else cluster.inter_host_gb_per_s)


def _figure(samples: Sequence[Samples], names: Sequence[str], of: int, where: str, over: int = 1) -> Figure:
    """Bytes over median time, both summed over the large messages of all of `names`; then over `over`."""
    used = [s for s in samples if s.thing.name in names and s.thing.of == of and s.thing.num_bytes >= LARGE_BYTES]
    value = sum(s.thing.num_bytes for s in used) / sum(spread(s.seconds).median for s in used) / 1e9 / over
    parts = []
    for name in names:
        same = [s for s in used if s.thing.name == name]
        sizes, speed = " and ".join(f"{s.thing.num_bytes / 1e6:.0f}" for s in same), _gb_per_s(same)
        parts.append(f"{name} of {sizes} MB {speed.median:.3g} GB/s (p10..p90 {speed.p10:.3g}..{speed.p90:.3g})")
    return Figure(value=float(f"{value:.3g}"), source=f"measured: {where}: {'; '.join(parts)}")


def _gb_per_s(samples: Sequence[Samples]) -> Spread:
    return spread([s.thing.num_bytes / seconds / 1e9 for s in samples for seconds in s.seconds])


def _machine(device: str) -> str:
    if device == "cuda":
        return torch.cuda.get_device_name(0)
    found = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    return f"{len(os.sched_getaffinity(0))} cores {found[1] if found else platform.machine()}"


def show(result: dict[str, Any], console: Console) -> None:
    grid = Table(title="one rank's GB/s, all ranks at once", title_justify="left")
    for column in ("what", "ranks", "KiB", "GB/s", "p10..p90"):
        grid.add_column(column, justify="left" if column == "what" else "right")
    for row in result["rows"]:
        spread_text = f"{row['p10_gb_per_s']:.3g}..{row['p90_gb_per_s']:.3g}"
        size = f"{row['bytes'] / 1024:,.0f}"
        grid.add_row(row["what"], str(row["ranks"]), size, f"{row['median_gb_per_s']:.3g}", spread_text)
    console.print(grid)
    for name, figure in result["cluster"].items():
        if name.endswith("_gb_per_s"):
            console.print(f"{name:<22} {figure['value']:g}", highlight=False)
    factors = result["cluster"].get("cost_coefficients", {})
    if factors:
        said = ", ".join(f"{name.replace('_', '-')} {factor:g}" for name, factor in factors.items())
        console.print(f"time over the exchanges' common figure: {said}", highlight=False)
    if result["load_average"] > 0.5 * len(os.sched_getaffinity(0)):
        busy = f"other work kept this machine busy (load average {result['load_average']:.1f} when it began)"
        console.print(f"note: {busy}; measure again when it is idle", highlight=False)
    console.print(f"written to {result['out']}, each number with its source", highlight=False, soft_wrap=True)
    next_step = f"python -m tools.plan_sharding --config configs/quickstart.yaml --cluster {result['out']}"
    console.print(f"next: {next_step}", highlight=False, soft_wrap=True)

"""`checkpoint`: what a save costs a run: how long training stands still, beside a plain write of the same bytes."""

import argparse
import os
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from rich.console import Console
from rich.table import Table

from dlrm_scale.config import RunConfig
from dlrm_scale.config_io import parse_config
from dlrm_scale.errors import ConfigError
from tools.benchmark.checkpoint_ranks import SavedOnRank, measure
from tools.benchmark.ranks import run_on_ranks
from tools.benchmark.timing import spread
from tools.commands import positive

NUM_TABLES, DIM = 6, 64
ROOM = 4  # times the state: two checkpoints are kept while a third is written, and the plain file


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Save one model's state again and again on gloo ranks: at once (sync), from a copy while the ranks go on computing\n"
        "(async), and its bytes as one plain file a rank (write and fsync), in turn."
    )
    parser.epilog = "example: python -m tools.benchmark checkpoint --gb 1.5 --json > checkpoint.json"
    parser.add_argument("--nproc", type=positive, default=2, metavar="N", help="ranks (default 2)")
    parser.add_argument("--gb", type=float, default=1.5, metavar="GB", help="of state, on all ranks (default 1.5)")
    parser.add_argument("--rounds", type=positive, default=5, metavar="N", help="saves of each kind (default 5)")
    parser.add_argument("--folder", metavar="DIR", help="on the disk to measure (default: the temporary folder's)")


def run(args: argparse.Namespace, console: Console) -> dict[str, Any]:
    """Raises ConfigError: no room on the disk; else as `run_on_ranks`."""
    if not args.gb > 0:
        raise ConfigError(f"--gb must be above 0, but is {args.gb:g}")
    if args.folder is not None and not os.path.isdir(args.folder):
        raise ConfigError(f"--folder {args.folder} is no folder; make it, or name another")
    folder = tempfile.mkdtemp(prefix="checkpoint-", dir=args.folder)
    try:
        free = shutil.disk_usage(folder).free
        if free < ROOM * args.gb * 1e9:
            raise ConfigError(
                f"{folder} has {free / 1e9:.1f} GB left, but this needs {ROOM * args.gb:.1f}: take less --gb, or another --folder"
            )
        load_before = os.getloadavg()[0]
        with console.status("building the model") as status:
            by_rank = run_on_ranks(
                measure,
                (workload(args.gb, args.nproc), folder, args.rounds),
                args.nproc,
                args.nproc,
                lambda done: status.update(f"round {done} of {args.rounds}"),
            )
    finally:
        shutil.rmtree(folder)
    return summary(by_rank) | {
        "setup": {
            "num_ranks": args.nproc,
            "rounds": args.rounds,
            "num_cores": len(os.sched_getaffinity(0)),
            "load_average": [load_before, os.getloadavg()[0]],
        }
    }


def workload(gb: float, num_ranks: int) -> RunConfig:
    """Equal tables, sharded by the row and by the column and whole, with row-wise Adagrad; hardly anything dense."""
    rows = max(num_ranks, round(gb * 1e9 / (NUM_TABLES * 4 * (DIM + 1))))
    names = [f"table_{i}" for i in range(NUM_TABLES)]
    types = ("row_wise", "column_wise", "table_wise")
    tree = {
        "name": "checkpoint",
        "device": "cpu",
        "features": {
            "tables": {name: {"num_embeddings": rows, "embedding_dim": DIM} for name in names},
            "dense": [{"name": "age"}],
            "categorical": [{"name": name, "table": name} for name in names],
        },
        "data": {"source": {"kind": "synthetic", "num_train": 4096, "num_eval": 1}, "lanes": num_ranks},
        "model": {"arch": "logistic"},
        "train": {"global_batch_size": 64 * num_ranks},
        "sharding": {"tables": {name: {"types": [types[i % len(types)]]} for i, name in enumerate(names)}},
    }
    return parse_config(tree, origin="the benchmark's model")


def summary(by_rank: Sequence[SavedOnRank]) -> dict[str, Any]:
    """Seconds of a round are its slowest rank's; ratios are taken round by round."""

    def slowest(name: str) -> list[float]:
        return [max(values) for values in zip(*(getattr(rank, name) for rank in by_rank), strict=True)]

    sync, stall, written, plain = (slowest(name) for name in ("sync_s", "stall_s", "async_s", "plain_s"))
    return {
        "state_bytes": sum(rank.state_bytes for rank in by_rank),
        "seconds": {
            name: asdict(spread(values))
            for name, values in (
                ("sync", sync),
                ("async_stall", stall),
                ("async_written", written),
                ("plain_write", plain),
            )
        },
        "first_async_stall_seconds": max(rank.first_stall_s for rank in by_rank),
        "stall_over_sync": asdict(spread([a / b for a, b in zip(stall, sync, strict=True)])),
        "sync_over_plain_write": asdict(spread([a / b for a, b in zip(sync, plain, strict=True)])),
        "compute_speed_during_async_write": asdict(
            spread([min(values) for values in zip(*(rank.compute_speed for rank in by_rank), strict=True)])
        ),
        "extra_memory_over_state": {
            name: sum(getattr(rank, f"{name}_extra_bytes") for rank in by_rank) / sum(r.state_bytes for r in by_rank)
            for name in ("sync", "async")
        },
    }


def show(result: dict[str, Any], console: Console) -> None:
    setup, gb = result["setup"], result["state_bytes"] / 1e9
    grid = Table(title=f"{gb:.2f} GB of state on {setup['num_ranks']} ranks", title_justify="left")
    for column in ("", "median", "p10", "p90"):
        grid.add_column(column, justify="right" if column else "left")
    for name, label in (
        ("sync", "synchronous save, s"),
        ("plain_write", "plain write and fsync, s"),
        ("async_stall", "asynchronous save: training stands still, s"),
        ("async_written", "asynchronous save: until committed, s"),
    ):
        grid.add_row(label, *(f"{result['seconds'][name][part]:.3f}" for part in ("median", "p10", "p90")))
    for name, label in (
        ("sync_over_plain_write", "synchronous save / plain write"),
        ("stall_over_sync", "asynchronous stall / synchronous save"),
        ("compute_speed_during_async_write", "compute speed while it is written (alone: 1)"),
    ):
        grid.add_row(label, *(f"{result[name][part]:.3f}" for part in ("median", "p10", "p90")))
    console.print(grid)
    extra = result["extra_memory_over_state"]
    console.print(
        f"peak extra memory: {extra['sync']:.2f} times the state during a synchronous save, {extra['async']:.2f} with asynchronous ones; "
        f"the first asynchronous save, which makes its buffers, stood still for {result['first_async_stall_seconds']:.2f} s\n"
        f"{setup['num_cores']} cores, load {setup['load_average'][0]:.1f} before and {setup['load_average'][1]:.1f} after",
        highlight=False,
        soft_wrap=True,
    )

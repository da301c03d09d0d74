"""`communication`: the collectives of a configuration's step, one by one: bytes and ms in each precision, and their share of the step."""

import argparse
from dataclasses import asdict
from typing import Any

from rich.console import Console
from rich.table import Table

from dlrm_scale.config import check_num_ranks
from dlrm_scale.config_io import load_config
from dlrm_scale.libraries import loading_libraries
from dlrm_scale.tuning.trial import short
from tools.benchmark.ranks import TRAIN_SILENCE_SECONDS, run_on_ranks
from tools.commands import positive

STEPS = 16  # of the training run whose step the exchanges are a share of


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Run the collectives of a configuration's step alone, by its plan, in fp32, fp16 and bf16, with the casts there and back; then\n"
        "train some steps to say which share of a step they would be if nothing overlapped them."
    )
    parser.epilog = "example: python -m tools.benchmark communication --config configs/benchmark/dlrm_dcnv2.yaml"
    parser.add_argument("--config", required=True, metavar="YAML")
    parser.add_argument("changes", nargs="*", metavar="KEY=VALUE", help="of the configuration")
    parser.add_argument("--nproc", type=positive, default=2, metavar="N", help="ranks, all of one host (default 2)")
    parser.add_argument("--seconds", type=positive, default=10, metavar="N", help="begin no round later (default 10)")


def run(args: argparse.Namespace, console: Console) -> dict[str, Any]:
    """Raises ConfigError; else as `run_on_ranks`."""
    config = load_config(args.config, (*short(STEPS), *args.changes))
    check_num_ranks(config, args.nproc)
    with loading_libraries():  # takes seconds, which a wrong key need not wait for
        from tools.benchmark.communication_ranks import measure
    arguments, num_ranks = (config, args.seconds), args.nproc
    with console.status("starting") as status:
        found, step_ms = run_on_ranks(
            measure, arguments, num_ranks, num_ranks, status.update, silence_seconds=TRAIN_SILENCE_SECONDS
        )[0]
    rows = [{**asdict(m.exchange), "num_bytes": m.num_bytes, "ms": m.ms} for m in found]
    micro_batches = config.train.accumulate_steps  # each makes all of them, the all-reduces too
    alone_ms = micro_batches * sum(m.ms[m.exchange.used or "int64"] for m in found)
    return {
        "config": args.config,
        "rows": rows,
        "micro_batches": micro_batches,
        "step_ms": step_ms,
        "alone_ms": alone_ms,
        "share": alone_ms / step_ms,
    }


def show(result: dict[str, Any], console: Console) -> None:
    grid = Table(title="one rank's exchanges of a micro-batch, each alone; ms with casts", title_justify="left")
    precisions = [p for p in dict.fromkeys(p for row in result["rows"] for p in row["ms"]) if p != "int64"]
    for column in ("what", "collective", "MB now", "in", *precisions):
        grid.add_column(column, justify="left" if column in ("what", "collective") else "right")
    for row in result["rows"]:
        used = row["used"] or "int64"
        shown = [f"{row['ms'][p]:.2f}" if p in row["ms"] else "" for p in precisions]
        if row["used"] is None:
            shown[0] = f"{row['ms']['int64']:.2f}"
        grid.add_row(row["what"], row["collective"], f"{row['num_bytes'][used] / 1e6:.2f}", used, *shown)
    console.print(grid)
    count = result["micro_batches"]
    console.print(
        f"together {result['alone_ms']:.1f} ms in {count} micro-batch{'es' * (count != 1)}, {result['share']:.0%} of a step of "
        f"{result['step_ms']:.1f} ms if nothing overlapped them",
        highlight=False,
    )
    console.print(
        "next, where 16 bits take less: sharding.communication={forward: fp16, backward: bf16} train.all_reduce.precision=bf16"
    )

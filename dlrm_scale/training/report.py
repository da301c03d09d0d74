"""What a run leaves behind: the final table on the console and one line in records.jsonl."""

import json
import math
import os
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from dlrm_scale.cluster import ClusterSpec
from dlrm_scale.config import RunConfig
from dlrm_scale.config_io import fingerprint
from dlrm_scale.record_format import origin
from dlrm_scale.resilience.goodput import Goodput
from dlrm_scale.sharding.plan import Plan
from dlrm_scale.training.clock import STAGES
from dlrm_scale.training.monitor import Metrics, percentiles
from dlrm_scale.training.result import TrainResult

SHOWN = ("ne", "auc", "gauc", "calibration", "log_loss")


def print_start(console: Console, config: RunConfig, plan: Plan, run_dir: Path, num_steps: int) -> None:
    """The plan, one line a table, and where the run writes."""
    table = Table(
        title=f"{config.name}: sharding plan {plan.fingerprint} on {len(plan.ranks)} ranks", title_justify="left"
    )
    for column in ("table", "rows x dim", "sharding", "on ranks"):
        table.add_column(column)
    rows = plan.summary_rows()
    for row in rows[:40]:
        table.add_row(*row)
    console.print(table)
    if len(rows) > 40:
        console.print(f"... and {len(rows) - 40} more tables in {run_dir / 'plan.json'}")
    console.print(f"config {fingerprint(config)}, writing to {run_dir}", highlight=False)
    train = config.train
    if train.max_steps and train.max_steps > num_steps:
        console.print(f"note: train.max_steps is {train.max_steps}, but {train.epochs} epoch(s) have {num_steps} steps")
    if train.schedule.warmup_steps >= num_steps:
        console.print(
            f"note: train.schedule.warmup_steps ({train.schedule.warmup_steps}) last all {num_steps} steps: "
            "the learning rates never reach their values"
        )


def print_end(
    console: Console, config: RunConfig, result: TrainResult, oracle: Metrics | None, run_dir: Path, goodput: Goodput
) -> None:
    """Held-out metrics beside the oracle's (the best any model can do, where the data knows it), speed, and what next."""
    if result.eval_metrics:
        table = Table(title=f"{config.name}: held-out after {result.samples_consumed:,} samples", title_justify="left")
        table.add_column("")
        for column in ("NE", "AUC", "GAUC", "calibration", "log loss"):
            table.add_column(column, justify="right")
        for label, metrics in result.eval_metrics.items():
            table.add_row(f"{label}: {config.model.arch}", *(_number(metrics.get(name)) for name in SHOWN))
            if oracle:
                table.add_row(f"{label}: oracle", *(_number(oracle[label].get(name)) for name in SHOWN))
        console.print(table)
        for label, metrics in result.eval_metrics.items():
            if why := _why_undefined(metrics["base_rate"]):
                console.print(f"note: {label} has no NE and AUC: {why}", highlight=False, markup=False)
    step_ms = percentiles([ms["step"] for ms in result.step_ms])
    if result.samples_per_second and step_ms:
        stages = ", ".join(f"{s} {_median(result, s):.1f}" for s in STAGES)
        console.print(
            f"{result.samples_per_second:,.0f} samples/s without the first {config.log.warmup_steps} steps, logging and evaluation\n"
            f"  step ms p10/p50/p90 "
            f"{step_ms['p10']:.1f}/{step_ms['p50']:.1f}/{step_ms['p90']:.1f}\n  median ms: {stages}",
            highlight=False,
        )
    lost = {cause: seconds for cause, seconds in asdict(goodput).items() if cause != "useful" and seconds >= 0.05}
    console.print(
        f"goodput {goodput.fraction:.0%} of {goodput.total:,.0f} s over all attempts; the rest, s: "
        + (", ".join(f"{cause} {seconds:,.1f}" for cause, seconds in lost.items()) or "none"),
        highlight=False,
    )
    _print_mended(console, config, "training", result.mended)
    _print_mended(console, config, "held-out", result.eval_mended)
    console.print(f"next: tensorboard --logdir {run_dir}", highlight=False)


def _why_undefined(base_rate: float) -> str | None:
    if math.isnan(base_rate):
        return "no held-out sample has a weight above 0, or a logit is no number"
    return f"it is {base_rate:.0f} in all held-out samples" if base_rate in (0, 1) else None


def _print_mended(console: Console, config: RunConfig, split: str, mended: dict[str, int]) -> None:
    most = sorted(mended.items(), key=lambda item: -item[1])
    if most:
        console.print(f"{split} rows read in the last epoch (some ahead of the last step):", highlight=False)
    for what, count in most[:6]:
        console.print(f"  {what}: {count:,}", highlight=False)
    if len(most) > 6:
        console.print(f"  ... and {len(most) - 6} more kinds, in {config.output.records}", highlight=False)


def run_record(
    config: RunConfig,
    cluster: ClusterSpec,
    plan: Plan,
    result: TrainResult,
    peak_memory: list[dict[str, int]],
    oracle: Metrics | None,
    goodput: Goodput,
) -> dict[str, Any]:
    """One run as the tuner reads it: what it was asked for, on what, how fast, how good."""
    return {
        **origin(cluster.num_ranks, torch.get_num_threads()),
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "outcome": "ok",
        "name": config.name,
        "config_fingerprint": fingerprint(config),
        "config": config.model_dump(mode="json"),
        "cluster": cluster.model_dump(mode="json"),
        "plan": plan.as_recorded(),
        "num_steps": result.num_steps,
        "samples_consumed": result.samples_consumed,
        "samples_per_second": result.samples_per_second,
        "step_ms": percentiles([ms["step"] for ms in result.step_ms]),
        "stage_ms": {stage: percentiles([ms[stage] for ms in result.step_ms]) for stage in STAGES},
        "peak_memory": peak_memory,
        "losses": result.losses,
        "metrics": result.eval_metrics,
        "oracle": oracle,
        "mended": result.mended,
        "eval_mended": result.eval_mended,
        "skipped_micro_batches": result.skipped_micro_batches,
        "goodput": goodput.as_json(),
    }


def record_line(record: dict[str, Any]) -> str:
    """A record as a line of JSON."""
    return json.dumps(_as_json(record), allow_nan=False) + "\n"


def append_line(path: str | Path, line: str) -> None:
    """Adds one line, in one write, so that runs that end together do not mix their lines."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        os.write(descriptor, line.encode())
    finally:
        os.close(descriptor)


def _as_json(value: Any) -> Any:
    """JSON has no NaN and no infinity; a figure that does not exist is null."""
    if isinstance(value, dict):
        return {k: _as_json(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_as_json(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _median(result: TrainResult, stage: str) -> float:
    return percentiles([ms[stage] for ms in result.step_ms])["p50"]


def _number(value: float | None) -> str:
    return "-" if value is None or value != value else f"{value:.4f}"

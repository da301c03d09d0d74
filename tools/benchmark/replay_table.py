"""`replay_table`: many points of tuning spaces, each really measured several times, for searchers and predictors to be compared on."""

import argparse
import gzip
import json
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from dlrm_scale.cluster import load_cluster
from dlrm_scale.config import RunConfig
from dlrm_scale.config_io import apply_override, parse_config
from dlrm_scale.errors import ConfigError
from dlrm_scale.record_format import hardware_facts, origin, software_versions
from dlrm_scale.sharding.plan import Plan
from dlrm_scale.tuning.featurise import Featuriser
from dlrm_scale.tuning.knobs import Point
from dlrm_scale.tuning.plans import Plans
from dlrm_scale.tuning.records import append_record
from dlrm_scale.tuning.searcher import RandomSearcher
from dlrm_scale.tuning.space import Job, Launch, Space, load_space
from dlrm_scale.tuning.trial import short
from tools.benchmark.ranks import run_on_ranks
from tools.benchmark.replay_ranks import train_points
from tools.benchmark.search import LEAST_MEASURED
from tools.benchmark.truth_ranks import DRAIN_STEPS
from tools.benchmark.tuning_workloads import random_space
from tools.commands import positive

PERCENTILES = ("p10", "p50", "p90")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Draw random points of a tuning space, or of those of some random models, train each on this machine for a few steps, several times,\n"
        "many in the same processes, and write one record a point. Repeats are rounds over all points, so that a slow hour hits all alike.\n"
        "An interrupted call goes on from FILE.part."
    )
    parser.epilog = (
        "example: python -m tools.benchmark replay_table --space docs/results/replay/criteo_80k.yaml --out replay.jsonl.gz\n"
        "         python -m tools.benchmark replay_table --workloads 8 --points 20 --repeats 2 --out workloads.jsonl.gz"
    )
    of_what = parser.add_mutually_exclusive_group(required=True)
    of_what.add_argument("--space", metavar="YAML", help="see configs/tuning")
    of_what.add_argument("--workloads", type=positive, metavar="N", help="so many random models, on --cluster")
    parser.add_argument("--cluster", default="2xcpu", metavar="NAME", help="of --workloads (default 2xcpu)")
    parser.add_argument("--points", type=positive, default=200, metavar="N", help="of each space (default 200)")
    parser.add_argument("--repeats", type=positive, default=3, metavar="R", help="runs of each point (default 3)")
    parser.add_argument(
        "--steps", type=positive, default=12, metavar="S", help="of a run, a quarter of them warm-up (default 12)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the points and their order (default 0)")
    parser.add_argument("--out", required=True, metavar="FILE", help="records, compressed if it ends in .gz")


@dataclass(frozen=True)
class Row:
    space: Space
    point: Point
    job: Job
    plan: Plan


class Part:
    """What was measured so far, a line for each run: a call that goes on skips those."""

    def __init__(self, path: Path, made_for: dict[str, Any]) -> None:
        self.path, self.times = path, {}
        if not path.exists():
            append_record(path, made_for)
            return
        lines = list(_whole_lines(path.read_text()))
        if lines[:1] != [made_for]:
            raise ConfigError(f"{path} is of another table than {made_for}: {lines[:1]}; finish that one, or remove it")
        self.times = {(line["repeat"], line["index"]): line["step_ms"] for line in lines[1:]}

    def add(self, repeat: int, index: int, step_ms: dict[str, float]) -> None:
        append_record(self.path, {"repeat": repeat, "index": index, "step_ms": step_ms})
        self.times[repeat, index] = step_ms


def run(args: argparse.Namespace, console: Console) -> dict[str, Any]:
    """Raises ConfigError; else as `run_on_ranks`."""
    spaces = spaces_of(args)
    named = [space.fingerprint for space in spaces]
    made_for = {"spaces": named, "points": args.points, "steps": args.steps, "seed": args.seed, **software_versions()}
    made_for["hardware"] = hardware_facts()["fingerprint"]
    part = Part(Path(f"{args.out}.part"), made_for)
    with console.status("planning") as status:
        rows = [row for space in spaces for row in draw(space, args.points, args.seed)]
        for repeat in range(args.repeats):
            for launch in dict.fromkeys(row.job.launch for row in rows):
                left = [i for i, r in enumerate(rows) if r.job.launch == launch and (repeat, i) not in part.times]
                order = [left[i] for i in np.random.default_rng([args.seed, repeat]).permutation(len(left)).tolist()]
                if order:

                    def told(message: tuple[int, dict[str, float]], repeat: int = repeat) -> None:
                        part.add(repeat, *message)
                        status.update(f"{len(part.times)} of {args.repeats * len(rows)} runs")

                    jobs = [(configured(row, args.steps), row.plan) for row in rows]
                    timed = args.steps - jobs[0][0].log.warmup_steps
                    arguments = (jobs, order, launch.threads_per_rank, timed)
                    run_on_ranks(
                        train_points, arguments, launch.num_ranks, rows[order[0]].job.cluster.ranks_per_host, told
                    )
    records = [
        record(row, [part.times[repeat, i] for repeat in range(args.repeats)], args) for i, row in enumerate(rows)
    ]
    _write(Path(args.out), records)
    part.path.unlink()
    found = summary(args.out, records)
    return {"space": args.space, "part_of_space": len(rows) / sum(s.size for s in spaces), **found}


def spaces_of(args: argparse.Namespace) -> list[Space]:
    if args.space:
        spaces = [load_space(args.space)]
    else:
        cluster = load_cluster(args.cluster)
        spaces = [random_space(number, cluster) for number in range(args.workloads)]
    cluster = spaces[0].cluster
    if cluster.num_hosts > 1:
        raise ConfigError(f"the cluster has {cluster.num_hosts} hosts, but this measures on one; name another cluster")
    return spaces


def _whole_lines(text: str) -> Iterator[dict[str, Any]]:
    """Without those that a kill cut short; the next append has ended them."""
    for line in text.splitlines():
        try:
            yield json.loads(line)
        except ValueError:
            continue


def draw(space: Space, num_points: int, seed: int) -> list[Row]:
    plans = Plans()
    points = RandomSearcher(Featuriser(space, plans), seed).ask(num_points)
    if not points:
        space.require_feasible(plans, seed)
    jobs = [space.job(point) for point in points]
    return [
        Row(space, point, job, plans.plan(job.config, job.cluster)) for point, job in zip(points, jobs, strict=True)
    ]


def configured(row: Row, steps: int) -> RunConfig:
    """For `steps` steps that are alike: more follow, so that to the last of them batches are read and ids exchanged ahead, and
    nothing is logged in between."""
    tree = row.job.config.model_dump(mode="json")
    total = steps + max(DRAIN_STEPS, row.job.config.data.prefetch_batches)
    for change in (*short(steps), f"train.max_steps={total}", f"log.every_steps={total}"):
        apply_override(tree, change)
    return parse_config(tree, "a point of the space")


def record(row: Row, times: Sequence[dict[str, float]], args: argparse.Namespace) -> dict[str, Any]:
    """Percentiles are medians over the repeats; `repeats_ms` are the medians of each."""
    launch: Launch = row.job.launch
    return {
        **origin(launch.num_ranks, launch.threads_per_rank),
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "outcome": "ok",
        "name": row.job.config.name,
        "config": row.job.config.model_dump(mode="json"),
        "cluster": row.job.cluster.model_dump(mode="json"),
        "plan": row.plan.as_recorded(),
        "num_steps": args.steps,
        "step_ms": {p: statistics.median(t[p] for t in times) for p in PERCENTILES},
        "repeats_ms": [t["p50"] for t in times],
        "trial": {"space": row.space.fingerprint, "point": dict(row.point), "steps": args.steps, "seed": args.seed},
    }


def summary(path: str, records: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """`noise`: median over the points of the repeats' spread, (highest - lowest) / median."""
    speeds = [r["config"]["train"]["global_batch_size"] / r["step_ms"]["p50"] * 1e3 for r in records]
    spreads = [(max(r["repeats_ms"]) - min(r["repeats_ms"])) / statistics.median(r["repeats_ms"]) for r in records]
    return {
        "table": path,
        "points": len(records),
        "samples_per_second": {"least": min(speeds), "median": statistics.median(speeds), "most": max(speeds)},
        "noise": statistics.median(spreads) if len(records[0]["repeats_ms"]) > 1 else None,
    }


def _write(path: Path, records: Sequence[dict[str, Any]]) -> None:
    text = "".join(json.dumps(r, separators=(",", ":")) + "\n" for r in records).encode()
    try:
        path.write_bytes(gzip.compress(text, mtime=0) if path.suffix == ".gz" else text)
    except OSError as e:
        raise ConfigError(
            f"cannot write {path}: {e.strerror}; the runs are kept in {path}.part: name another place, and move that"
        ) from None


def show(result: dict[str, Any], console: Console) -> None:
    speed = result["samples_per_second"]
    noise = (
        "of one repeat, so that nothing is known of the noise"
        if result["noise"] is None
        else f"repeats differ by {result['noise']:.1%}"
    )
    console.print(
        f"{result['table']}: {result['points']} points, {speed['least']:,.0f} to {speed['most']:,.0f} samples/s (median {speed['median']:,.0f}); {noise}",
        highlight=False,
    )
    if result["space"] and result["part_of_space"] >= LEAST_MEASURED:
        judge = f"search --space {result['space']}"
    else:  # too little of the space for searchers
        judge = "predictor --by-row" if result["space"] else "predictor"
    console.print(f"next: python -m tools.benchmark {judge} --records {result['table']}", highlight=False)

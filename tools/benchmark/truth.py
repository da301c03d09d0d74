"""`truth`: does the planner's order of plans hold when they train? Random plans of one model, each trained for real."""

import argparse
import os
import statistics
from collections import Counter
from dataclasses import asdict
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from dlrm_scale.cluster import ClusterSpec, load_cluster
from dlrm_scale.config import RunConfig
from dlrm_scale.config_io import parse_config
from dlrm_scale.errors import ConfigError
from dlrm_scale.meta import META
from dlrm_scale.models.ranking_model import build_model
from dlrm_scale.sharding.plan import plan_request
from tools.benchmark.cluster import check_room, measure_cluster
from tools.benchmark.random_plans import OBJECTIVES, ScoredPlan, draw_plans
from tools.benchmark.rank_correlation import agreement, repeat_agreement
from tools.benchmark.ranks import run_on_ranks
from tools.benchmark.truth_ranks import NUM_BATCHES, WARMUP_STEPS, PlanRun, train_plans
from tools.commands import positive

CLUSTER_SECONDS = 5.0
LEAST_PLANS, LEAST_REPEATS = 3, 2
BLOCK_ROWS = 4096  # of the synthetic source; a batch is the beginning of one

# name: rows, dim, ids a sample; one feature each
BAGS = {
    "user": (40_000, 64, 1),
    "tag": (20_000, 64, 20),
    "word": (50_000, 32, 30),
    "topic": (2_000, 128, 5),
    "page": (10_000, 128, 1),
    "region": (500, 32, 1),
}
SEQUENCES = {"item": (100_000, 64), "shop": (10_000, 64)}  # name: rows, dim
MAX_EVENTS, MEAN_EVENTS = 40, 22


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Draw random plans of one model, predict their step times with this machine's measured cluster, train each for real\n"
        "on gloo ranks, and say how far the two orders agree: Kendall's tau (1: the same order, 0: none, -1: reversed)."
    )
    parser.epilog = "example: python -m tools.benchmark truth --nproc 2 --json > truth.json"
    parser.add_argument("--nproc", type=positive, default=2, metavar="N", help="ranks (default 2)")
    parser.add_argument("--plans", type=positive, default=30, metavar="N", help="random plans (default 30)")
    parser.add_argument("--repeats", type=positive, default=3, metavar="N", help="runs of each plan (default 3)")
    parser.add_argument("--steps", type=positive, default=6, metavar="N", help="timed steps of a run (default 6)")
    parser.add_argument(
        "--local-batch", type=positive, default=1024, metavar="N", help="samples of a rank (default 1024)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of plans, data and order (default 0)")
    parser.add_argument("--cluster", metavar="YAML", help="of `cluster`, for cpu (default: measure it now)")


def run(args: argparse.Namespace, console: Console) -> dict[str, Any]:
    """Raises ConfigError for what does not fit; else as `run_on_ranks`."""
    _check(args)
    with console.status("measuring the cluster") as status:
        cluster = _cluster(args.cluster, args.nproc)
        config = workload(args.nproc, args.local_batch, args.seed)
        request = plan_request(config, cluster, build_model(config, dense_device=META).num_dense_parameters)
        scored = draw_plans(request, args.plans, args.seed)
        rng = np.random.default_rng(args.seed)
        order = [i for _ in range(args.repeats) for i in rng.permutation(args.plans).tolist()]
        load_before = os.getloadavg()[0]

        def told(done: int) -> None:
            status.update(f"training: {done} of {len(order)} runs")

        arguments = (config, [s.plan for s in scored], order, args.steps)
        by_rank = run_on_ranks(train_plans, arguments, args.nproc, cluster.ranks_per_host, told)
    ms_RP = repeat_ms(by_rank, order, args.plans)
    rows = [_row(i, s, ms_RP[:, i], _types_of(by_rank, order.index(i))) for i, s in enumerate(scored)]
    measured = [row["measured_ms"] for row in rows]
    objectives = {}
    for name in OBJECTIVES:
        predicted = [s.predicted_ms[name] for s in scored]
        regret = measured[int(np.argmin(predicted))] / min(measured) - 1
        objectives[name] = asdict(agreement(predicted, measured, args.seed)) | {"regret": regret}
    return {
        "setup": {
            "num_ranks": args.nproc,
            "local_batch_size": args.local_batch,
            "pipeline": config.train.pipeline,
            "repeats": args.repeats,
            "steps": args.steps,
            "seed": args.seed,
            "num_cores": len(os.sched_getaffinity(0)),
            "load_average": [load_before, os.getloadavg()[0]],
            "cluster": cluster.model_dump(mode="json", exclude_defaults=True),
        },
        "plans": rows,
        "objectives": objectives,
        "noise": {
            "repeat_tau": repeat_agreement(ms_RP),
            "median_spread": statistics.median(row["spread"] for row in rows),
        },
    }


def _check(args: argparse.Namespace) -> None:
    for name, least, why in (
        ("plans", LEAST_PLANS, "an order needs some"),
        ("repeats", LEAST_REPEATS, "without a second run of each plan nothing is known of the noise"),
    ):
        if getattr(args, name) < least:
            raise ConfigError(f"--{name} is {getattr(args, name)}, but must be at least {least}: {why}")
    if args.nproc < 2:
        raise ConfigError("--nproc is 1, but on one rank all plans are the same; take 2 or more")
    if args.local_batch > BLOCK_ROWS:
        raise ConfigError(f"--local-batch is {args.local_batch}, but must be at most {BLOCK_ROWS}")
    if args.seed < 0:
        raise ConfigError(f"--seed is {args.seed}, but must be 0 or more")


def _cluster(name: str | None, num_ranks: int) -> ClusterSpec:
    """The file's, or measured now. Raises ConfigError: it is not of so many cpu ranks; too little memory to measure."""
    if name is None:
        check_room(num_ranks)
        return measure_cluster("cpu", num_ranks, num_ranks, CLUSTER_SECONDS, lambda progress: None)[1]
    cluster = load_cluster(name)
    if (cluster.device, cluster.num_ranks) != ("cpu", num_ranks):
        raise ConfigError(
            f"--cluster {name} has {cluster.num_ranks} {cluster.device} ranks, but {num_ranks} cpu ranks train here; set --nproc to its "
            "ranks, name another, or leave it out to measure one"
        )
    return cluster


def workload(num_ranks: int, local_batch_size: int, seed: int) -> RunConfig:
    """Tables of different rows, dims and pooling under a logistic regression, so that little else takes time."""
    tables = {name: {"num_embeddings": rows, "embedding_dim": dim} for name, (rows, dim, _) in BAGS.items()}
    tables |= {name: {"num_embeddings": rows, "embedding_dim": dim} for name, (rows, dim) in SEQUENCES.items()}
    tree = {
        "name": "truth",
        "seed": seed,
        "device": "cpu",
        "features": {
            "tables": tables,
            "dense": [{"name": "age"}],
            "categorical": [
                {"name": name, "table": name, "multi_hot": ids > 1, "pooling_factor": ids}
                for name, (_, _, ids) in BAGS.items()
            ],
            "sequences": [
                {
                    "name": "history",
                    "max_length": MAX_EVENTS,
                    "pooling_factor": MEAN_EVENTS,
                    "fields": [{"name": f"past_{name}", "table": name} for name in SEQUENCES],
                }
            ],
        },
        "data": {
            "source": {"kind": "synthetic", "num_train": BLOCK_ROWS * NUM_BATCHES * num_ranks, "num_eval": 1},
            "lanes": num_ranks,
        },
        "model": {"arch": "logistic"},
        "train": {"global_batch_size": local_batch_size * num_ranks},
    }
    return parse_config(tree, origin="the benchmark's model")


def repeat_ms(by_rank: list[list[PlanRun]], order: list[int], num_plans: int) -> np.ndarray:
    """(repeats, plans): the median over a run's steps of its slowest rank's milliseconds."""
    step_ms_RNS = np.array([[run.step_ms for run in runs] for runs in by_rank])  # ranks, runs, steps
    run_ms_N = np.median(step_ms_RNS.max(axis=0), axis=1)
    ms_RP = np.empty((len(order) // num_plans, num_plans))
    for run, plan in enumerate(order):
        ms_RP[run // num_plans, plan] = run_ms_N[run]
    return ms_RP


def _types_of(by_rank: list[list[PlanRun]], run: int) -> dict[str, str]:
    return {table: kind for runs in by_rank for table, kind in runs[run].types.items()}


def _row(index: int, scored: ScoredPlan, ms_R: np.ndarray, built: dict[str, str]) -> dict[str, Any]:
    """`spread`: between a plan's slowest and fastest run, over their median."""
    median = float(np.median(ms_R))
    return {
        "plan": index,
        "tables": {
            name: {"sharding_type": t.sharding_type, "built_type": built[name], "ranks": list(t.ranks)}
            for name, t in scored.plan.tables.items()
        },
        "predicted_ms": scored.predicted_ms,
        "measured_ms": median,
        "repeat_ms": ms_R.tolist(),
        "spread": float((ms_R.max() - ms_R.min()) / median),
    }


def show(result: dict[str, Any], console: Console) -> None:
    setup, noise = result["setup"], result["noise"]
    grid = Table(title="fastest first; ms a step", title_justify="left")
    for column in ("plan", "types", *OBJECTIVES, "measured", "spread"):
        grid.add_column(column, justify="left" if column == "types" else "right")
    for row in sorted(result["plans"], key=lambda row: row["measured_ms"]):
        types = Counter(table["sharding_type"] for table in row["tables"].values())
        grid.add_row(
            str(row["plan"]),
            ", ".join(f"{count} {kind}" for kind, count in sorted(types.items())),
            *(f"{row['predicted_ms'][name]:.2f}" for name in OBJECTIVES),
            f"{row['measured_ms']:.1f}",
            f"{row['spread']:.0%}",
        )
    console.print(grid)
    for name, found in result["objectives"].items():
        console.print(
            f"{name:<13} tau {found['tau']:+.2f} (95 % of resamples {found['low']:+.2f}..{found['high']:+.2f}; p {found['p_value']:.2g}); "
            f"its first plan takes {found['regret']:.0%} more than the fastest",
            highlight=False,
            soft_wrap=True,
        )
    console.print(
        f"{'noise':<13} tau {noise['repeat_tau']:+.2f} between single repeats of the measurement; a plan's repeats lie "
        f"{noise['median_spread']:.0%} apart (median)",
        highlight=False,
        soft_wrap=True,
    )
    console.print(
        f"{setup['num_ranks']} gloo ranks of one thread on {setup['num_cores']} cores, load {setup['load_average'][0]:.1f} before and "
        f"{setup['load_average'][1]:.1f} after; local batch {setup['local_batch_size']}, pipeline {setup['pipeline']}; "
        f"{setup['repeats']} runs of {setup['steps']} steps after {WARMUP_STEPS} of warm-up",
        highlight=False,
        soft_wrap=True,
    )

"""`python -m tools.plan_sharding`: the sharding plan of least step time for a model on a cluster, with a bound on how near it is."""

import argparse
import difflib
import json
import math
import os
import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from dlrm_scale.cluster import ClusterSpec, load_cluster
from dlrm_scale.config import TableSharding
from dlrm_scale.config_io import load_config
from dlrm_scale.errors import ConfigError, NoPlanError, UserError
from dlrm_scale.sharding.explain import changes, explain
from dlrm_scale.sharding.fit import ways_to_fit
from dlrm_scale.sharding.plan import Plan, PlanRequest, load_plan, save_plan
from dlrm_scale.sharding.planner import Planned, find_plan, prepare
from dlrm_scale.sharding.search import Found
from tools.plan_sharding import show
from tools.plan_sharding.html import write_html
from tools.plan_sharding.jobs import Job, config_job, tables_job
from tools.plan_sharding.sweep import read_sweep, sweep_row

EPILOG = """examples:
  python -m tools.plan_sharding --config configs/quickstart.yaml \\
    --cluster 8xh100 --out plan.json
  python -m tools.plan_sharding --tables tables.csv --local-batch-size 4096 \\
    --cluster 128xh200 --html report.html
  python -m tools.plan_sharding --config C --cluster K --plan plan.json \\
    --explain user

A table's line in --tables: name, num_embeddings, embedding_dim, pooling_factor;
and, if not 1, bags, fp32, sum: num_features, collection, data_type, pooling.
Without a model, section.key=value sets sharding.*, sparse_optimizer and
num_dense_parameters. docs/planner.md says what is optimised and counted."""
FULLEST = "fullest"
PLAIN = {"markup": False, "emoji": False, "highlight": False}  # names and overrides may hold brackets


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m tools.plan_sharding",
        description="Find the sharding plan of least step time for a model on a cluster,\nand a bound on how near to the best it is.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--config", metavar="YAML", help="a run configuration: see configs/")
    what.add_argument("--tables", metavar="FILE", help="tables alone, without a model: CSV or JSON")
    parser.add_argument("--cluster", required=True, metavar="K", help="a file, or a name in configs/clusters/")
    parser.add_argument(
        "overrides", nargs="*", metavar="section.key=value", help="replaces one value of the configuration"
    )
    parser.add_argument("--local-batch-size", type=int, metavar="N", help="samples a rank and step (with --tables)")
    parser.add_argument(
        "--time-limit", type=float, metavar="S", help="sharding.search_seconds: the search is cut short there"
    )
    parser.add_argument("--seed", type=int, metavar="N", help="of the search (default 0)")
    parser.add_argument("--out", metavar="FILE", help="write plan.json, which the trainer takes as sharding.plan=FILE")
    parser.add_argument("--html", metavar="FILE", help="write a report to look at, in one self-contained file")
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    parser.add_argument("--plan", metavar="FILE", help="look at this plan instead of searching")
    parser.add_argument("--compare", metavar="FILE", help="say how this plan differs from another, earlier one")
    parser.add_argument("--explain", metavar="TABLE", help="say what each way to shard a table would cost")
    parser.add_argument(
        "--sweep", metavar="WHAT=A,B,...", help="plan for several: ranks=8,16,32 or local_batch=512,1024"
    )
    parser.add_argument(
        "--dry-run-rank",
        metavar="R",
        help="build rank R's (or the fullest's) real modules from the plan and check them",
    )
    return parser


def main(argv: list[str] | None = None) -> int:
    """0: done; 1: nothing fits, or a check failed; 2: the command line or a file is not valid."""
    args = build_parser().parse_intermixed_args(argv)
    try:
        return _run(args, Console(stderr=args.json), Console(quiet=args.json, **PLAIN))
    except UserError as e:
        print(f"error: {e}", file=sys.stderr, flush=True)
        return e.exit_code
    except KeyboardInterrupt:
        return 130


def _run(args: argparse.Namespace, console: Console, report: Console) -> int:
    """`console` shows what is going on, `report` what was found unless JSON says it."""
    _check_options(args)
    with _busy(console, "reading tables" if args.tables else "tracing the dense arch"):
        job = _job(args, load_cluster(args.cluster))
    _check_names(args, job.request)
    if args.sweep:
        return _sweep(args, console, report, job)
    earlier = load_plan(args.compare, job.request) if args.compare else None
    started = time.monotonic()
    try:
        planned = _plan(args, job.request, console)
    except NoPlanError as e:
        return _tell_no_plan(args, console, job.request, e)
    seconds = time.monotonic() - started
    plan = planned.plan
    result = show.summary(planned, seconds)
    show.plan_tables(report, planned, seconds)
    if args.plan:
        result["made_for"] = show.other_request(plan.request, job.request)
        show.other_request_note(report, args.plan, result["made_for"])
    if args.explain:
        costs = explain(prepare(job.request), plan, args.explain)
        result["explain"] = show.as_json(costs)
        narrowed = job.request.sharding.tables.get(args.explain, TableSharding()).types
        show.explain_table(report, args.explain, costs, narrowed)
    if earlier:
        result["compare"] = _compare(earlier, plan)
        show.compare_table(report, args.compare, earlier, plan)
    exit_code = _dry_run(args, console, report, job, plan, result) if args.dry_run_rank else 0
    if args.out:
        _write(args.out, lambda path: save_plan(plan, path))
    if args.html:
        _write(args.html, lambda path: write_html(plan, planned.found, seconds, path))
    if args.json:
        print(json.dumps(result, indent=1))
    show.next_step(report, args, job)
    return exit_code


def _check_options(args: argparse.Namespace) -> None:
    """What can be known before anything is read: that no option is ignored, that files can be written."""
    if args.tables and args.local_batch_size is None:
        raise ConfigError("--tables needs --local-batch-size: the samples that a rank looks up in a step")
    if args.config and args.local_batch_size is not None:
        raise ConfigError(
            "--local-batch-size goes with --tables; with --config set train.global_batch_size, which the ranks share"
        )
    if args.time_limit is not None and not 0 < args.time_limit < math.inf:
        raise ConfigError(f"--time-limit must be seconds above 0, but is {args.time_limit:g}")
    if args.seed is not None and args.seed < 0:
        raise ConfigError(f"--seed must be 0 or more, but is {args.seed}")
    given = {name for name, value in vars(args).items() if value not in (None, False)}
    for option, others in (
        ("sweep", ("out", "html", "plan", "compare", "explain", "dry_run_rank")),
        ("plan", ("time_limit", "seed")),
    ):
        ignored = [f"--{other.replace('_', '-')}" for other in others if option in given and other in given]
        if ignored:
            raise ConfigError(
                f"--{option} does not go with {', '.join(ignored)}, which would do nothing; leave one out"
            )
    for path in filter(None, (args.out, args.html)):
        folder = Path(path).parent
        if Path(path).is_dir() or not folder.is_dir() or not os.access(folder, os.W_OK):
            fault = "it is a folder" if Path(path).is_dir() else f"{folder} is not a folder that can be written to"
            raise ConfigError(f"cannot write {path}: {fault}; name a file in another place")


def _job(args: argparse.Namespace, cluster: ClusterSpec) -> Job:
    limit = [] if args.time_limit is None else [f"sharding.search_seconds={args.time_limit}"]
    if args.tables:
        return tables_job(args.tables, args.overrides + limit, cluster, args.local_batch_size)
    return config_job(load_config(args.config, args.overrides + limit), cluster)


def _check_names(args: argparse.Namespace, request: PlanRequest) -> None:
    """Before the search, which takes seconds. Raises ConfigError: no such rank or table."""
    last = request.group.num_ranks - 1
    rank = args.dry_run_rank
    if rank not in (None, FULLEST) and not (rank.isdecimal() and int(rank) <= last):
        raise ConfigError(f"--dry-run-rank is {rank}, but the plan has ranks 0 to {last}; name one, or {FULLEST}")
    if args.explain is not None and args.explain not in request.tables:
        near = difflib.get_close_matches(args.explain, request.tables, n=3, cutoff=0.0)
        raise ConfigError(f"--explain {args.explain}: there is no such table; the nearest names are {', '.join(near)}")


def _sweep(args: argparse.Namespace, console: Console, report: Console, job: Job) -> int:
    rows = []
    for num_ranks, local_batch_size in read_sweep(args.sweep, job):
        with _busy(console, f"planning for {num_ranks} ranks at {local_batch_size:,} samples each"):
            rows.append(sweep_row(job, num_ranks, local_batch_size, args.seed or 0))
    if args.json:
        print(json.dumps(rows, indent=1))
    show.sweep_table(report, rows)
    return 0 if any(row["fits"] for row in rows) else 1


def _plan(args: argparse.Namespace, request: PlanRequest, console: Console) -> Planned:
    if args.plan:
        return Planned(load_plan(args.plan, request), Found(from_start=args.plan), 0)
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[best]}"), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("searching", total=1.0, best="")

        def progress(done: float, found: Found) -> None:
            best = f"best {show.ms(found.score_ms)} ms" if found.fits else "nothing fits yet"
            bar.update(task, completed=done, best=best)

        return find_plan(request, seed=args.seed or 0, progress=progress)


def _tell_no_plan(args: argparse.Namespace, console: Console, request: PlanRequest, error: NoPlanError) -> int:
    print(f"error: {error}", file=sys.stderr, flush=True)
    with _busy(console, "looking for what would make it fit"):
        ways = list(ways_to_fit(request))
    if args.json:
        print(json.dumps({"fits": False, "reason": str(error), "ways_to_fit": ways}, indent=1))
    for way in ways:
        print(f"  would fit: {way}", file=sys.stderr)
    if not ways:
        print(
            "  no single change tried makes it fit: types, kernels, fp16, more hosts; try two at once", file=sys.stderr
        )
    return error.exit_code


def _compare(earlier: Plan, plan: Plan) -> dict[str, Any]:
    return {
        "score_ms": earlier.score_ms,
        "made_for": show.other_request(earlier.request, plan.request),
        "changes": show.as_json(changes(earlier, plan)),
    }


def _dry_run(
    args: argparse.Namespace, console: Console, report: Console, job: Job, plan: Plan, result: dict[str, Any]
) -> int:
    rank = show.fullest_rank(plan) if args.dry_run_rank == FULLEST else int(args.dry_run_rank)
    with _busy(console, f"building rank {rank} without its memory"):
        from tools.plan_sharding.dry_run import dry_run

        done = dry_run(job.config, plan, rank)
    result["dry_run"] = show.as_json(done) | {"ok": done.ok}
    show.dry_run_table(report, done)
    return 0 if done.ok else 1


def _busy(console: Console, what: str) -> AbstractContextManager[Any]:
    return console.status(what) if console.is_terminal else nullcontext()


def _write(path: str, write: Callable[[Path], None]) -> None:
    try:
        write(Path(path))
    except OSError as e:
        raise ConfigError(f"cannot write {path}: {e.strerror}; name a file in another place") from None

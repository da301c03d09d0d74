"""What the planner prints: tables that fit a terminal of 80 columns, and the same as JSON."""

import argparse
import dataclasses
import shlex
from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from dlrm_scale.sharding.explain import OptionCost, changes
from dlrm_scale.sharding.options import STAGES
from dlrm_scale.sharding.plan import Plan, PlanRequest, RankLoad, rule_differences
from dlrm_scale.sharding.planner import Planned
from tools.plan_sharding.jobs import Job

SHOWN_TABLES = 20
SHOWN_RANKS = 8
SHOWN_OPTIONS = 12
SHOWN_CHECKS = 30
LINE = 78
BYTE_UNITS = ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB"))


def ms(value: float) -> str:
    """To the microsecond, or to three digits where that shows too little."""
    return f"{value:.3f}" if value >= 0.1 or value == 0 else f"{value:.3g}"


def size(num_bytes: float) -> str:
    unit, name = next(((unit, name) for unit, name in BYTE_UNITS if num_bytes >= unit), (1, "B"))
    return f"{num_bytes / unit:.4g} {name}"


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def as_json(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        return {f.name: as_json(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, list | tuple):
        return [as_json(item) for item in value]
    return value


def busiest(plan: Plan) -> list[int]:
    """Ranks, the most milliseconds first."""
    return sorted(range(len(plan.ranks)), key=lambda r: (-_rank_ms(plan.ranks[r]), r))


def fullest_rank(plan: Plan) -> int:
    return max(range(len(plan.ranks)), key=lambda r: (plan.ranks[r].total_device_bytes, -r))


def _rank_ms(load: RankLoad) -> float:
    """What TorchRec's score counts: all stages but the exchange of ids."""
    return sum(ms for stage, ms in load.step_ms.items() if stage != "input_dist_comms")


def summary(planned: Planned, seconds: float) -> dict[str, Any]:
    plan, found = planned.plan, planned.found
    return {
        "fits": True,
        "fingerprint": plan.fingerprint,
        "objective": plan.request.sharding.objective,
        "score_ms": plan.score_ms,
        "bound_ms": plan.bound_ms,
        "gap": plan.gap,
        "seconds": seconds,
        "search": {
            "rounds": found.num_rounds,
            "cut_short": found.cut_short,
            "seconds_to_best": found.seconds_to_best,
            "start": found.from_start,
            "num_options": planned.num_options,
        },
        "sharding_types": {name: table.sharding_type for name, table in plan.tables.items()},
        "kernels": {name: table.compute_kernel for name, table in plan.tables.items()},
        "fullest_rank": {"rank": fullest_rank(plan), "device_bytes": plan.ranks[fullest_rank(plan)].total_device_bytes},
        "ranks": [load.model_dump(mode="json") for load in plan.ranks],
    }


def plan_tables(console: Console, planned: Planned, seconds: float) -> None:
    plan, found = planned.plan, planned.found
    cluster, sharding = plan.request.cluster, plan.request.sharding
    _tables(console, plan)
    _ranks(console, plan)
    weights = sum(t.num_embeddings * t.embedding_dim for t in plan.request.tables.values())
    objective = sharding.objective.replace("_", " ")
    groups = replica_groups_said(plan)
    lines = [
        f"{_count(len(plan.tables), 'table')}, {weights:.4g} parameters, on {_count(cluster.num_ranks, f'{cluster.device} rank')} of "
        f"{_count(cluster.num_hosts, 'host')}",
        *([groups] if groups else []),
        f"{_count(plan.request.local_batch_size, 'sample')} a rank and step",
        f"{objective}: {ms(plan.score_ms)} ms a step for tables",
        f"no plan can be under {ms(plan.bound_ms)} ms: this one is at most {plan.gap:.1%} above the best",
    ]
    if planned.num_options:
        lines.append(
            f"{planned.num_options:,} options searched in {seconds:.1f} s, best found after {found.seconds_to_best:.1f} s"
        )
    if found.cut_short:
        lines.append(f"cut short by the time limit of {sharding.search_seconds:g} s, after {found.num_rounds} rounds")
    for line in lines:
        console.print(line, style="bold" if line.startswith(objective) else None)


def replica_groups_said(plan: Plan) -> str | None:
    groups, steps = plan.request.sharding.replica_groups, plan.request.sharding.replica_sync_steps
    if groups == 1:
        return None
    return (
        f"{groups} replica groups of {_count(plan.request.group.num_ranks, 'rank')} with a copy of the tables each, averaged every "
        f"{_count(steps, 'step')}; rank r here is ranks {groups} x r to {groups} x r + {groups - 1}"
    )


def _tables(console: Console, plan: Plan) -> None:
    grid = Table(title=f"sharding plan {plan.fingerprint}", title_justify="left")
    for column in ("table", "rows x dim", "sharding", "kernel", "on ranks"):
        grid.add_column(column, overflow="fold")
    largest = sorted(
        plan.tables, key=lambda n: -plan.request.tables[n].num_embeddings * plan.request.tables[n].embedding_dim
    )
    for name in largest[:SHOWN_TABLES]:
        spec, table = plan.request.tables[name], plan.tables[name]
        kernel = table.compute_kernel + (f" {table.cache_load_factor:g}" if table.cache_load_factor else "")
        grid.add_row(
            name,
            f"{spec.num_embeddings:,} x {spec.embedding_dim}",
            table.sharding_type,
            kernel,
            ranks_said(plan, name),
        )
    console.print(grid)
    if len(largest) > SHOWN_TABLES:
        counts: dict[str, int] = {}
        for name in largest[SHOWN_TABLES:]:
            counts[plan.tables[name].sharding_type] = counts.get(plan.tables[name].sharding_type, 0) + 1
        rest = ", ".join(f"{count} {kind}" for kind, count in sorted(counts.items(), key=lambda item: -item[1]))
        console.print(f"  and {len(largest) - SHOWN_TABLES} smaller tables: {rest}")


def ranks_said(plan: Plan, name: str) -> str:
    ranks = plan.tables[name].ranks
    if len(ranks) == plan.request.group.num_ranks and len(ranks) > 1:
        return "all"
    runs: list[list[int]] = []
    for rank in sorted(ranks):
        if runs and rank == runs[-1][1] + 1:
            runs[-1][1] = rank
        else:
            runs.append([rank, rank])
    said = [str(a) if a == b else f"{a}-{b}" for a, b in runs]
    return ", ".join(said[:6]) + (f" and {len(said) - 6} more" if len(said) > 6 else "")


def _ranks(console: Console, plan: Plan) -> None:
    on_cpu = plan.request.cluster.device == "cpu"
    grid = Table(title="ranks, the busiest first", title_justify="left")
    replicas = plan.request.sharding.replica_groups > 1
    columns = ("rank", "ms", "compute", "exchange", *(("sync",) if replicas else ()), "tables", "all")
    columns += () if on_cpu else ("host",)
    for column in columns:
        grid.add_column(column, justify="right")
    order = busiest(plan)
    shown = order if len(order) <= SHOWN_RANKS else [*order[: SHOWN_RANKS - 2], *order[-1:]]
    if fullest_rank(plan) not in shown:
        shown.insert(-1, fullest_rank(plan))
    for rank in shown:
        load = plan.ranks[rank]
        compute = sum(load.step_ms[s] for s in STAGES if s.endswith("compute"))
        dense = sum(b for kind, b in load.device_bytes.items() if kind.startswith("dense"))
        sync = load.step_ms["replica_sync"]
        cells = [str(rank), ms(_rank_ms(load)), ms(compute), ms(_rank_ms(load) - compute - sync)]
        cells += [ms(sync)] if replicas else []
        cells += [size(load.total_device_bytes - dense), size(load.total_device_bytes)]
        grid.add_row(*cells, *([] if on_cpu else [size(sum(load.host_bytes.values()))]))
    console.print(grid)
    cluster = plan.request.cluster
    usable = cluster.table_bytes_per_rank * (1 - plan.request.sharding.storage_reserve)
    console.print(
        f"a rank has {size(cluster.table_bytes_per_rank)}, {size(usable)} without the reserve; rank {fullest_rank(plan)} is the fullest",
    )


def explain_table(console: Console, table: str, costs: list[OptionCost], types: Sequence[str] | None) -> None:
    """`types`: what the configuration narrows the table to; None: nothing."""
    grid = Table(title=f"table {table}: each way to shard it, all else as it is", title_justify="left")
    for column in ("", "sharding, kernel", "shards", "one takes", "ms of one", "score ms"):
        grid.add_column(column, justify="left" if column in ("", "sharding, kernel") else "right")
    for cost in costs[:SHOWN_OPTIONS]:
        score = "no place" if cost.score_ms is None else ms(cost.score_ms) + ("" if cost.fits else ", too full")
        grid.add_row("*" if cost.is_chosen else "", _way(cost), str(cost.num_shards),
                     size(cost.largest_shard_bytes), ms(cost.largest_shard_ms), score)  # fmt: skip
    console.print(grid)
    if types:
        console.print(f"sharding.tables.{table}.types leaves it {', '.join(types)} only")
    if len(costs) > SHOWN_OPTIONS:
        console.print(f"  and {len(costs) - SHOWN_OPTIONS} worse ways: see --json")
    chosen = next(cost for cost in costs if cost.is_chosen)
    other = next((cost for cost in costs if not cost.is_chosen and cost.fits), None)
    if other is None:
        console.print(f"{_way(chosen)}: no other way fits")
        return
    loss = other.score_ms - chosen.score_ms
    told = f"makes the plan {ms(loss)} ms slower" if loss > 1e-9 else "is no slower: the busiest rank does not change"
    console.print(
        f"{_way(chosen)} in {chosen.num_shards} because the next best, {_way(other)} in {other.num_shards}, {told}",
    )


def _way(cost: OptionCost) -> str:
    kernel = "" if cost.compute_kernel in ("fused", "dense") else f", {cost.compute_kernel}"
    return f"{cost.sharding_type}{kernel}" + (f" {cost.cache_load_factor:g}" if cost.cache_load_factor else "")


def compare_table(console: Console, path: str, earlier: Plan, plan: Plan) -> None:
    differences = changes(earlier, plan)
    grid = Table(title=f"from {path} to this plan", title_justify="left")
    for column in ("table", "was", "is", "moved"):
        grid.add_column(column, justify="right" if column == "moved" else "left", overflow="fold")
    for change in differences[:SHOWN_TABLES]:
        grid.add_row(change.table, change.before, change.after, size(change.moved_bytes))
    if differences:
        console.print(grid)
    more = f" ({len(differences) - SHOWN_TABLES} not shown)" if len(differences) > SHOWN_TABLES else ""
    console.print(
        f"{len(differences)} of {_count(len(plan.tables), 'table')} differ{more}, {size(sum(c.moved_bytes for c in differences))} move",
    )
    console.print(f"score {ms(earlier.score_ms)} -> {ms(plan.score_ms)} ms")
    other_request_note(console, path, other_request(earlier.request, plan.request))


def other_request(made_for: PlanRequest, asked: PlanRequest) -> list[str]:
    """How two requests for the same tables and ranks differ in what a plan's milliseconds and bytes depend on."""
    pairs = [
        (name, getattr(made_for, name), getattr(asked, name))
        for name in PlanRequest.model_fields
        if name not in ("tables", "cluster", "sharding")
    ]
    for name in type(made_for.cluster).model_fields:
        values = [getattr(request.cluster, name) for request in (made_for, asked)]
        pairs.append((f"cluster.{name}", *(getattr(value, "value", value) for value in values)))
    said = [f"{name} is {had} there, {has} here" for name, had, has in pairs if had != has]
    return (
        said
        + rule_differences(made_for, asked)
        + (["its tables' ids, types or pooling differ"] if made_for.tables != asked.tables else [])
    )


def other_request_note(console: Console, path: str, differences: Sequence[str]) -> None:
    if differences:
        console.print(f"note: {path} was made for another request, and its figures are of that one:")
    for difference in differences:
        console.print(f"  {difference}")


def sweep_table(console: Console, rows: list[dict[str, Any]]) -> None:
    grid = Table(title="one plan each", title_justify="left")
    for column in ("ranks", "local batch", "global batch", "score ms", "gap", "samples/s", "fullest"):
        grid.add_column(column, justify="right")
    for row in rows:
        head = [str(row["num_ranks"]), f"{row['local_batch_size']:,}", f"{row['global_batch_size']:,}"]
        if row["fits"]:
            grid.add_row(*head, ms(row["score_ms"]), f"{row['gap']:.1%}", f"{row['samples_per_second']:,.0f}",
                         size(row["fullest_device_bytes"]))  # fmt: skip
        else:
            grid.add_row(*head, "no plan", "", "", "")
    console.print(grid)
    fitting = [row for row in rows if row["fits"]]
    if fitting:
        console.print("score and samples/s are of tables alone: the dense arch takes its own time")
        best = max(fitting, key=lambda row: row["samples_per_second"])
        console.print(
            f"next: plan for the one you want: {best['num_ranks']} ranks at {best['local_batch_size']:,} samples look up most a second",
        )
    else:
        console.print("next: plan for one of them without --sweep, which says what would make it fit")


def dry_run_table(console: Console, done: Any) -> None:
    grid = Table(title=f"dry run of {done.subject}", title_justify="left")
    for column in ("check", "predicted", "built", ""):
        grid.add_column(column, overflow="fold")
    wrong = [row for row in done.rows if not row.ok]
    shards = [row for row in done.rows if row.ok and row.what.startswith("table ")]
    for row in [*wrong, *(row for row in done.rows if row.ok and row not in shards)][:SHOWN_CHECKS]:
        grid.add_row(row.what, str(row.predicted), str(row.built), "ok" if row.ok else "WRONG")
    console.print(grid)
    if shards:
        console.print(f"{_count(len(shards), 'shard')} of this rank built as planned, as one check each")
    console.print(f"{len(done.rows) - len(wrong)} of {len(done.rows)} checks hold")


def next_step(console: Console, args: argparse.Namespace, job: Job) -> None:
    if args.out and job.config is not None and job.request.sharding.replica_groups > 1:
        said = "next: the trainer does not run replica groups yet, and refuses this plan; it is for TorchRec's DMPCollection"
    elif args.out and job.config is not None:
        said = _launch(args, job)
    elif args.html:
        said = f"next: open {args.html} in a browser"
    elif args.out:
        said = f"next: look at it later with --plan {args.out}, or at what changed with --compare {args.out}"
    else:
        said = "next: --out FILE keeps the plan, --html FILE draws it, --explain TABLE says why"
    console.print(said, soft_wrap=True)


def _launch(args: argparse.Namespace, job: Job) -> str:
    """The command that trains on the plan, cut so that it can be copied from a narrow terminal."""
    cluster = job.request.cluster
    words = ["launchers/torchrun.sh"]
    if cluster.num_hosts > 1:
        words += [f"--nnodes {cluster.num_hosts}", "--node-rank N", "--rdzv-endpoint HOST0:29400"]
    words += [f"--nproc {cluster.ranks_per_host}", f"--config {shlex.quote(args.config)}"]
    words += map(shlex.quote, [*args.overrides, f"sharding.plan={args.out}"])
    lines = ["next, on each host:" if cluster.num_hosts > 1 else "next:"]
    for word in words:
        if len(lines[-1]) + len(word) + 3 > LINE:
            lines[-1] += " \\"
            lines.append(" ")
        lines[-1] += f" {word}"
    return "\n".join(lines)

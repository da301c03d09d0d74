"""Finds the sharding plan of least score for a request: options, search, bound, plan.

Needs no process group, no GPU and no model: tables are described by the request. Scores and bytes are TorchRec's own (see
cost.py and storage.py), so its planner and this one can be compared; the search, the bound and the proof that nothing fits
are ours.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from dlrm_scale.config_io import fingerprint
from dlrm_scale.errors import NoPlanError
from dlrm_scale.sharding.bound import Bound, choice_totals, lower_bound
from dlrm_scale.sharding.memory import dense_bytes, table_capacity
from dlrm_scale.sharding.options import BYTE_KINDS, STAGES, OptionSet, enumerate_options
from dlrm_scale.sharding.plan import Plan, PlanRequest, RankLoad, load_plan
from dlrm_scale.sharding.problem import Churn, Cutter, Problem, Unit, demands
from dlrm_scale.sharding.rules import check_rules, make_units
from dlrm_scale.sharding.search import Found, Search

Progress = Callable[[float, Found], None]


@dataclass(frozen=True)
class Planned:
    """A plan, and what is told of how it was found but not kept in plan.json."""

    plan: Plan
    found: Found
    num_options: int


@dataclass(frozen=True)
class Prepared:
    """A request made ready for the search."""

    options: OptionSet
    cutter: Cutter
    problem: Problem


def prepare(request: PlanRequest, options: OptionSet | None = None) -> Prepared:
    """Raises ConfigError, NoPlanError: rules that contradict each other, or leave a table no option."""
    check_rules(request)
    options = enumerate_options(request) if options is None else options
    cutter = Cutter(request, options, demands(request, options))
    units = make_units(request, cutter)
    problem = Problem(
        num_ranks=cutter.num_ranks,
        ranks_per_host=cutter.ranks_per_host,
        num_channels=cutter.demand_GK.shape[1] - 2,
        capacity=np.array(table_capacity(request)),
        units=units,
        churn=_churn(request, cutter),
    )
    return Prepared(options, cutter, problem)


def find_plan(
    request: PlanRequest,
    seed: int = 0,
    num_rounds: int | None = None,
    progress: Progress | None = None,
    options: OptionSet | None = None,
) -> Planned:
    """The same request, seed and rounds give the same plan, unless `sharding.search_seconds` cuts the search short.

    Raises:
        NoPlanError: no plan fits (with the proof, or that none was found), or rules leave a table no option.
        ConfigError: rules that contradict each other. PlanError: `sharding.keep_close_to` is no plan of these tables.
    """
    prepared = prepare(request, options)
    problem = prepared.problem
    totals = choice_totals(problem, prepared.cutter)
    bound = lower_bound(problem, totals)
    if bound.impossible:
        subject = "" if bound.unit is None else _names(problem.units[bound.unit], prepared) + " "
        raise NoPlanError(_no_plan(request, subject + bound.impossible, proven=True))
    search = Search(problem, totals, bound, seed, request.sharding.search_seconds, progress)
    found = search.run(rounds_for(problem) if num_rounds is None else num_rounds)
    if not found.fits:
        raise NoPlanError(_no_plan(request, _overfull(problem, found), proven=False))
    return Planned(make_plan(request, prepared, found, bound), found, len(prepared.options.option_table))


def rounds_for(problem: Problem) -> int:
    """Enough that more gains little (docs/results/planner.md), and a few seconds at most."""
    num_units = len(problem.units)
    return int(np.clip(160_000 / (num_units + problem.num_ranks), 100, min(3000, 100 * num_units)))


def make_plan(request: PlanRequest, prepared: Prepared, found: Found, bound: Bound) -> Plan:
    assert bound.ms <= found.score_ms * (1 + 1e-9), f"a bound of {bound.ms} ms, and a plan of {found.score_ms}"
    tables, at = {}, {}
    for unit, placed in zip(prepared.problem.units, found.placed, strict=True):
        choice = unit.choices[placed.choice]
        for member, table in enumerate(unit.tables):
            name = prepared.options.table_names[table]
            tables[name] = prepared.cutter.table_plan(choice, member, placed.places)
            at[name] = choice.options[member]
    tables = dict(sorted(tables.items()))
    return Plan(
        fingerprint=fingerprint(request),
        request=request,
        tables=tables,
        ranks=rank_loads(request, prepared, {name: (at[name], tables[name].ranks) for name in tables}),
        score_ms=found.score_ms,
        bound_ms=min(bound.ms, found.score_ms),  # they may be equal but for rounding
    )


def rank_loads(
    request: PlanRequest, prepared: Prepared, shards: dict[str, tuple[int, tuple[int, ...]]]
) -> tuple[RankLoad, ...]:
    """`shards`: by table its option and the rank of each of the option's shards."""
    options, num_ranks = prepared.options, request.group.num_ranks
    ms_RS = np.zeros((num_ranks, len(STAGES)))
    device_RB, host_RB = np.zeros((num_ranks, len(BYTE_KINDS))), np.zeros((num_ranks, len(BYTE_KINDS)))
    for option, ranks in shards.values():
        groups = slice(prepared.cutter.group_start[option], prepared.cutter.group_start[option + 1])
        for table, into in (
            (options.group_ms, ms_RS),
            (options.group_device_bytes, device_RB),
            (options.group_host_bytes, host_RB),
        ):
            np.add.at(into, np.array(ranks), np.repeat(table[groups], options.group_num_shards[groups], axis=0))
    dense = {kind: float(b) for kind, b in dense_bytes(request).items()}
    on_cpu = request.cluster.device == "cpu"
    return tuple(
        RankLoad(
            device_bytes=dict(zip(BYTE_KINDS, device.tolist(), strict=True)) | dense,
            host_bytes={} if on_cpu else dict(zip(BYTE_KINDS, host.tolist(), strict=True)),
            step_ms=dict(zip(STAGES, ms.tolist(), strict=True)),
        )
        for ms, device, host in zip(ms_RS, device_RB, host_RB, strict=True)
    )


def _churn(request: PlanRequest, cutter: Cutter) -> Churn | None:
    if request.sharding.keep_close_to is None:
        return None
    previous = load_plan(request.sharding.keep_close_to, request)
    option, places = [], []
    for table, name in enumerate(cutter.options.table_names):
        plan = previous.tables[name]
        found = cutter.find(table, plan)
        at = None if found is None else cutter.places(cutter.choice(found).scope, plan.ranks)
        option.append(None if at is None else found)
        places.append(at or ())
    return Churn(tuple(option), tuple(places), request.sharding.churn_ms_per_gb / 1e9)


def _names(unit: Unit, prepared: Prepared) -> str:
    names = [prepared.options.table_names[t] for t in unit.tables]
    return f"table {names[0]}" if len(names) == 1 else f"tables {', '.join(names)}, which must be together,"


def _overfull(problem: Problem, found: Found) -> str:
    if found.placed is None:
        return (
            "every start found some table without a place that ranks, hosts, pin and apart in `sharding` leave it; "
            "that there is none is not proven: allow more ranks, or take a rule out"
        )
    return (
        f"the nearest plan found puts {found.overflow:.1%} of a rank's memory too much on the {problem.num_ranks} ranks together; that "
        "no other fits is not proven"
    )


def _no_plan(request: PlanRequest, reason: str, proven: bool) -> str:
    cluster = request.cluster
    head = "no sharding plan fits" if proven else "no sharding plan was found that fits"
    tables = "1 table" if len(request.tables) == 1 else f"{len(request.tables)} tables"
    groups = request.sharding.replica_groups
    each = "" if groups == 1 else f", {request.group.num_ranks} in each of {groups} replica groups"
    return (
        f"{head} for {tables} on {cluster.num_ranks} {cluster.device} ranks{each}: {reason}\n"
        f"  of {cluster.table_bytes_per_rank / 1e9:,.2f} GB a rank, sharding.storage_reserve ({request.sharding.storage_reserve:g}) keeps "
        f"{cluster.table_bytes_per_rank * request.sharding.storage_reserve / 1e9:,.2f} GB and the dense arch "
        f"{sum(dense_bytes(request).values()) / 1e9:,.2f} GB"
    )

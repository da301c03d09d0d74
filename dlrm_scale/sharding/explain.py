"""Why a plan is as it is: what each option of a table would cost in its place, and how two plans differ."""

from dataclasses import dataclass

import numpy as np

from dlrm_scale.errors import PlanError
from dlrm_scale.sharding.packing import Packing, Placed
from dlrm_scale.sharding.plan import Plan, TablePlan
from dlrm_scale.sharding.planner import Prepared
from dlrm_scale.sharding.problem import Choice
from dlrm_scale.sharding.search import FITS


@dataclass(frozen=True)
class OptionCost:
    """One option of a table, with the rest of the plan left as it is."""

    sharding_type: str
    compute_kernel: str
    cache_load_factor: float | None
    num_shards: int
    largest_shard_bytes: float  # device memory
    all_shards_ms: float
    largest_shard_ms: float
    score_ms: float | None  # of the plan with it, at its best place; None: it has no place there
    fits: bool
    is_chosen: bool


@dataclass(frozen=True)
class TableChange:
    table: str
    before: str
    after: str
    moved_bytes: float  # weights that lie on another rank than before


def packing_of(prepared: Prepared, plan: Plan) -> Packing:
    """The plan in the search's terms.

    Raises:
        PlanError: a table is sharded in a way that the request's rules leave out.
    """
    packing = Packing(prepared.problem, max(plan.bound_ms, 1e-9), doublings=5)
    names = prepared.options.table_names
    for index, unit in enumerate(prepared.problem.units):
        options = tuple(prepared.cutter.find(t, plan.tables[names[t]]) for t in unit.tables)
        choice = next((i for i, c in enumerate(unit.choices) if c.options == options), None)
        scope = None if choice is None else unit.choices[choice].scope
        places = None if scope is None else prepared.cutter.places(scope, plan.tables[names[unit.tables[0]]].ranks)
        if choice is None or places is None:
            table = plan.tables[names[unit.tables[0]]]
            raise PlanError(
                f"the plan shards table {names[unit.tables[0]]} as {table.sharding_type}, kernel {table.compute_kernel}, ranks "
                f"{list(table.ranks)[:8]}, which the request's rules leave out; plan again"
            )
        packing.put(index, Placed(choice, places))
    return packing


def explain(prepared: Prepared, plan: Plan, table: str) -> list[OptionCost]:
    """Every option of `table`, the one whose plan scores least first.

    Raises:
        PlanError: no such table, or a plan that the request's rules leave out.
    """
    names = prepared.options.table_names
    if table not in names:
        raise PlanError(
            f"the plan has no table {table}; it has {', '.join(names[:8])}{' ...' if len(names) > 8 else ''}"
        )
    packing = packing_of(prepared, plan)
    index = next(i for i, unit in enumerate(prepared.problem.units) if names.index(table) in unit.tables)
    unit = prepared.problem.units[index]
    chosen = packing.take(index)
    costs = []
    for i, choice in enumerate(unit.choices):
        best = packing.best_place(index, i)
        score, fits = None, False
        if best is not None:
            packing.put(index, chosen if i == chosen.choice else best[1])
            score, fits = packing.score_ms, packing.overflow <= FITS
            packing.take(index)
        costs.append(_cost(prepared, unit.tables.index(names.index(table)), choice, score, fits, i == chosen.choice))
    return sorted(costs, key=lambda c: (not c.fits, np.inf if c.score_ms is None else c.score_ms, not c.is_chosen))


def _cost(
    prepared: Prepared, member: int, choice: Choice, score_ms: float | None, fits: bool, is_chosen: bool
) -> OptionCost:
    option, cutter, options = choice.options[member], prepared.cutter, prepared.options
    groups = slice(cutter.group_start[option], cutter.group_start[option + 1])
    C = prepared.problem.num_channels
    ms_g = cutter.demand_GK[groups, :C].sum(axis=1)
    factor = float(options.option_cache_load_factor[option])
    return OptionCost(
        sharding_type=str(options.option_type[option]),
        compute_kernel=str(options.option_kernel[option]),
        cache_load_factor=None if np.isnan(factor) else factor,
        num_shards=int(options.group_num_shards[groups].sum()),
        largest_shard_bytes=float(cutter.demand_GK[groups, C].max()),
        all_shards_ms=float(ms_g @ options.group_num_shards[groups]),
        largest_shard_ms=float(ms_g.max()),
        score_ms=score_ms,
        fits=fits,
        is_chosen=is_chosen,
    )


def changes(before: Plan, after: Plan) -> list[TableChange]:
    """Tables of both plans that are not sharded alike, most bytes moved first."""
    found = []
    for name in sorted(set(before.tables) & set(after.tables)):
        old, new = before.tables[name], after.tables[name]
        if old != new:
            spec = after.request.tables[name]
            width = 4 if spec.data_type == "fp32" else 2
            found.append(
                TableChange(
                    name, _said(before, name), _said(after, name), width * _moved_weights(after, name, old, new)
                )
            )
    return sorted(found, key=lambda change: -change.moved_bytes)


def _moved_weights(plan: Plan, name: str, old: TablePlan, new: TablePlan) -> int:
    """Weights that a rank holds after and did not hold before, over all ranks."""
    spec, num_ranks = plan.request.tables[name], plan.request.group.num_ranks
    if new.sharding_type == "data_parallel":
        holders = num_ranks * spec.num_embeddings * spec.embedding_dim
        return holders - (holders if old.sharding_type == "data_parallel" else spec.num_embeddings * spec.embedding_dim)
    if old.sharding_type == "data_parallel":
        return 0
    kept = sum(
        max(0, min(a.row + a.num_rows, b.row + b.num_rows) - max(a.row, b.row))
        * max(0, min(a.column + a.num_columns, b.column + b.num_columns) - max(a.column, b.column))
        for a in new.shards
        for b in old.shards
        if a.rank == b.rank
    )
    return spec.num_embeddings * spec.embedding_dim - kept


def _said(plan: Plan, name: str) -> str:
    table = plan.tables[name]
    kernel = "" if table.compute_kernel in ("fused", "dense") else f", {table.compute_kernel}"
    ranks = (
        "all ranks"
        if len(set(table.ranks)) == plan.request.group.num_ranks
        else f"ranks {', '.join(map(str, table.ranks))}"
    )
    return f"{table.sharding_type}{kernel} on {ranks}"

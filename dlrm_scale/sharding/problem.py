"""The planner's problem in the search's terms: units to place, their choices, and what each block of a choice takes.

A unit is a table, or a group of tables that must be together. A choice is one option of it, cut into blocks that are placed
one by one: on a rank (table- and column-wise), on a host (table-row-wise, each column block of grid_shard), or on all ranks at
once (row-wise, data_parallel). A block takes K quantities of each rank it lies on: C channels of milliseconds (see `channels`),
then the bytes of the two memory tiers.
"""

# C channels  K = C + 2 quantities  R ranks  H hosts  L ranks of a host  P places of a scope (R, H or 1)  O options
# G groups of equal shards  g groups of one block  W ranks that a block lies on (1, L or R)
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal

import numpy as np

from dlrm_scale.sharding.options import STAGES, OptionSet
from dlrm_scale.sharding.plan import PlanRequest, Shard, TablePlan

Scope = Literal["rank", "host", "all"]
SCOPES: dict[str, Scope] = {
    "data_parallel": "all",
    "table_wise": "rank",
    "column_wise": "rank",
    "row_wise": "all",
    "table_row_wise": "host",
    "table_column_wise": "rank",
    "grid_shard": "host",
}
SCORED_STAGES = tuple(stage for stage in STAGES if stage != "input_dist_comms")  # as TorchRec's `Perf.total`
NUM_TIERS = 2


@dataclass(frozen=True)
class Blocks:
    """`count` equal blocks. On the ranks of its place, in order, a block takes each column of `demand_Kg` `repeats_g` times."""

    count: int
    demand_Kg: np.ndarray
    repeats_g: np.ndarray

    def demand_KW(self) -> np.ndarray:
        return np.repeat(self.demand_Kg, self.repeats_g, axis=1)


@dataclass(frozen=True)
class Choice:
    options: tuple[int, ...]  # one of each table of the unit
    sharding_type: str
    blocks: tuple[Blocks, ...]
    places: tuple[int, ...] | None = None  # where each block must be (`pin`)

    @property
    def scope(self) -> Scope:
        return SCOPES[self.sharding_type]

    @property
    def one_host(self) -> bool:
        """All blocks on the ranks of one host."""
        return self.sharding_type == "table_column_wise"

    @property
    def num_blocks(self) -> int:
        return sum(blocks.count for blocks in self.blocks)

    @cached_property
    def demand_NKW(self) -> np.ndarray:
        """Of each block, in the order of their place in the table."""
        return np.stack([demand for blocks in self.blocks for demand in [blocks.demand_KW()] * blocks.count])


@dataclass(frozen=True)
class Unit:
    tables: tuple[int, ...]
    choices: tuple[Choice, ...]
    allowed_R: np.ndarray  # bool
    apart_from: tuple[int, ...] = ()  # the units that may share no rank with it


@dataclass(frozen=True)
class Churn:
    """A plan to stay close to: by table its option (None: not one of ours) and the places of its blocks."""

    option: tuple[int | None, ...]
    places: tuple[tuple[int, ...], ...]
    ms_per_byte: float


@dataclass(frozen=True)
class Problem:
    num_ranks: int
    ranks_per_host: int
    num_channels: int
    capacity: np.ndarray  # (2,) bytes of each tier that tables may take on a rank
    units: tuple[Unit, ...]
    churn: Churn | None

    @property
    def num_hosts(self) -> int:
        return self.num_ranks // self.ranks_per_host

    @cached_property
    def may_overflow(self) -> bool:
        """Whether some plan could put more bytes on a rank than it has."""
        most = np.zeros(NUM_TIERS)
        for unit in self.units:
            most += np.max(
                [sum(b.count * b.demand_Kg[-NUM_TIERS:].max(axis=1) for b in c.blocks) for c in unit.choices], axis=0
            )
        return bool((most > self.capacity).any())

    def width(self, scope: Scope) -> int:
        """Ranks that a block lies on."""
        return {"rank": 1, "host": self.ranks_per_host, "all": self.num_ranks}[scope]

    def hosts_of(self, allowed_R: np.ndarray) -> np.ndarray:
        """(H,) bool: hosts whose ranks are all allowed."""
        return allowed_R.reshape(self.num_hosts, self.ranks_per_host).all(axis=1)


def channels(request: PlanRequest, options: OptionSet) -> np.ndarray:
    """(G, C) milliseconds of a shard by channel. A plan's score is the sum over channels of the largest rank's.

    busiest_rank has one channel, the sum of all stages (TorchRec's `NoopPerfModel`). critical_path (TorchRec's
    `_calculate_critical_path`, plus the prefetch of cached tables) has one for forward compute, backward compute and
    prefetch, one for the averaging of replica groups, and one for each other collective: the forward or backward communication of one collection and sharding type.
    """
    by_stage = {stage: options.group_ms[:, i] for i, stage in enumerate(STAGES)}
    if request.sharding.objective == "busiest_rank":
        return sum(by_stage[stage] for stage in SCORED_STAGES)[:, None]
    collections = np.array([request.tables[name].collection for name in options.table_names])
    collective = np.char.add(collections[options.option_table].astype(str), options.option_type.astype(str))
    names, option_collective = np.unique(collective, return_inverse=True)
    member = (option_collective[options.group_option][:, None] == np.arange(len(names))).astype(float)
    alone = np.stack([by_stage[s] for s in ("fwd_compute", "bwd_compute", "prefetch_compute", "replica_sync")], axis=1)
    comms = [by_stage[s][:, None] * member for s in ("fwd_comms", "bwd_comms")]
    every = np.concatenate([alone, *comms], axis=1)
    return every[:, every.any(axis=0)] if every.any() else every[:, :1]


def demands(request: PlanRequest, options: OptionSet) -> np.ndarray:
    """(G, K) what one shard takes."""
    tiers = (options.group_device_bytes.sum(1, keepdims=True), options.group_host_bytes.sum(1, keepdims=True))
    return np.concatenate((channels(request, options), *tiers), axis=1)


class Cutter:
    """Cuts options into choices of blocks, and into shards."""

    def __init__(self, request: PlanRequest, options: OptionSet, demand_GK: np.ndarray) -> None:
        self.request, self.options, self.demand_GK = request, options, demand_GK
        group = request.group
        self.num_ranks, self.ranks_per_host = group.num_ranks, group.ranks_per_host
        self.group_start = np.searchsorted(options.group_option, np.arange(len(options.option_table) + 1))
        self.option_start = np.searchsorted(options.option_table, np.arange(len(options.table_names) + 1))

    def options_of(self, table: int) -> range:
        return range(self.option_start[table], self.option_start[table + 1])

    def choice(self, option: int) -> Choice:
        sharding_type = str(self.options.option_type[option])
        groups = slice(self.group_start[option], self.group_start[option + 1])
        num_shards, demand_gK = self.options.group_num_shards[groups], self.demand_GK[groups]
        scope = SCOPES[sharding_type]
        if scope == "all":
            blocks = (Blocks(1, demand_gK.T, num_shards),)
        elif scope == "rank":
            one = np.ones(1, dtype=int)
            blocks = tuple(Blocks(int(n), d[:, None], one) for n, d in zip(num_shards, demand_gK, strict=True))
        else:
            blocks = tuple(_host_blocks(num_shards, demand_gK, self.ranks_per_host))
        return Choice((option,), sharding_type, blocks)

    def shards(self, option: int) -> np.ndarray:
        """(S, 4) row, column, rows and columns of each shard, in the order of their place; none for data_parallel."""
        sharding_type = str(self.options.option_type[option])
        if sharding_type == "data_parallel":
            return np.empty((0, 4), dtype=int)
        groups = slice(self.group_start[option], self.group_start[option + 1])
        sizes = np.stack((self.options.group_num_rows[groups], self.options.group_num_columns[groups]), axis=1)
        sizes = np.repeat(sizes, self.options.group_num_shards[groups], axis=0)
        by_rows = {"row_wise": self.num_ranks, "table_row_wise": self.ranks_per_host, "grid_shard": self.ranks_per_host}
        sizes = sizes.reshape(-1, by_rows.get(sharding_type, 1), 2)
        row = np.cumsum(sizes[:, :, 0], axis=1) - sizes[:, :, 0]
        column = np.cumsum(sizes[:, 0, 1]) - sizes[:, 0, 1]
        return np.dstack((row, np.broadcast_to(column[:, None], row.shape), sizes)).reshape(-1, 4)

    def ranks(self, choice: Choice, places: tuple[int, ...]) -> tuple[int, ...]:
        """The rank of each shard when the choice's blocks are at `places`."""
        if choice.scope == "rank":
            return places
        if choice.scope == "all":
            return tuple(range(self.num_ranks))
        return tuple(host * self.ranks_per_host + local for host in places for local in range(self.ranks_per_host))

    def places(self, scope: Scope, ranks: tuple[int, ...]) -> tuple[int, ...] | None:
        """The inverse of `ranks`; None where ranks are not those of whole hosts, or of all ranks, in order."""
        if scope == "rank":
            return ranks
        if scope == "all":
            return (0,) if ranks == tuple(range(self.num_ranks)) else None
        hosts = tuple(rank // self.ranks_per_host for rank in ranks[:: self.ranks_per_host])
        expected = tuple(h * self.ranks_per_host + local for h in hosts for local in range(self.ranks_per_host))
        return hosts if ranks == expected else None

    def find(self, table: int, plan: TablePlan) -> int | None:
        """The option that is `plan`, wherever its shards are."""
        for option in self.options_of(table):
            factor = self.options.option_cache_load_factor[option]
            same_kernel = self.options.option_kernel[option] == plan.compute_kernel and (
                np.isnan(factor) if plan.cache_load_factor is None else factor == plan.cache_load_factor
            )
            if self.options.option_type[option] == plan.sharding_type and same_kernel:
                cut = [[s.row, s.column, s.num_rows, s.num_columns] for s in plan.shards]
                if np.array_equal(self.shards(option), np.array(cut, dtype=int).reshape(-1, 4)):
                    return option
        return None

    def table_plan(self, choice: Choice, member: int, places: tuple[int, ...]) -> TablePlan:
        """Of the unit's `member`-th table."""
        option = choice.options[member]
        factor = float(self.options.option_cache_load_factor[option])
        ranks = self.ranks(choice, places)
        return TablePlan(
            sharding_type=str(self.options.option_type[option]),
            compute_kernel=str(self.options.option_kernel[option]),
            cache_load_factor=None if np.isnan(factor) else factor,
            ranks=ranks,
            shards=tuple(
                Shard(rank=rank, row=row, column=column, num_rows=num_rows, num_columns=num_columns)
                for rank, (row, column, num_rows, num_columns) in zip(
                    ranks,
                    self.shards(option).tolist(),
                    strict=False,  # data_parallel has ranks and no shards
                )
            ),
        )


def _host_blocks(num_shards: np.ndarray, demand_gK: np.ndarray, ranks_per_host: int) -> Iterator[Blocks]:
    """One block a column of row shards; equal neighbours are counted together."""
    one_each = np.ones(ranks_per_host, dtype=int)
    group_of_shard = np.repeat(np.arange(len(num_shards)), num_shards).reshape(-1, ranks_per_host)
    demand_NKL = demand_gK[group_of_shard].transpose(0, 2, 1)
    count = 0
    for i, demand_KL in enumerate(demand_NKL):
        count += 1
        if i + 1 == len(demand_NKL) or not np.array_equal(demand_KL, demand_NKL[i + 1]):
            yield Blocks(count, demand_KL, one_each)
            count = 0


def with_places(choice: Choice, places: tuple[int, ...]) -> Choice:
    """The choice with each block pinned: blocks one by one, in the order of their place in the table."""
    return replace(choice, places=places)

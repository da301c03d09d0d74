"""The plans that TorchRec's own planner would try, so that the search never ends above the best of them.

Proposals are those of GreedyProposer, by sum and by largest shard, and of UniformProposer; places those of GreedyPerfPartitioner,
sorted by time and by bytes (`planner/proposers.py` and `planner/partitioners.py` of TorchRec 1.8.0). It reads milliseconds as
`NoopPerfModel` does, under any objective. What cannot beat the best plan so far is proposed and not placed.
"""

# U units  N choices of all units, unit by unit  R ranks  H hosts  L ranks of a host
import heapq
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import chain

import numpy as np

from dlrm_scale.sharding.bound import ChoiceTotals
from dlrm_scale.sharding.packing import Placed, in_order
from dlrm_scale.sharding.problem import SCOPES, Choice, Problem

MOST_PLACED = 400_000  # units in all plans that are placed, about a second; then proposals end
ROUNDING = 1e-12
Taken = tuple[float, float, float]  # milliseconds, device bytes and host bytes of one rank


@dataclass(frozen=True)
class _Shape:
    """A choice as the partitioner sees it: what each of its shards takes, by block and rank of the block."""

    sharding_type: str
    taken: tuple[tuple[Taken, ...], ...]


def torchrec_plans(
    problem: Problem, totals: ChoiceTotals, beat_ms: Callable[[], float]
) -> Iterator[tuple[str, list[Placed]]]:
    """(name, placed) of each plan that fits and whose busiest rank takes less than `beat_ms()`, which is asked again and again.

    None where rules limit the places of a unit: TorchRec's partitioner has no such rules.
    """
    ruled = any(not u.allowed_R.all() or u.apart_from or u.choices[0].places is not None for u in problem.units)
    if ruled:
        return
    partitioner = _Partitioner(problem, totals)
    seen: set[bytes] = set()
    num_placed = 0

    def promising(at_U: np.ndarray, mean_ms: float) -> bool:
        """By its mean, and by its largest shard above what lies on all ranks."""
        limit = beat_ms() * (1 - ROUNDING)
        if mean_ms >= limit:
            return False
        apart_U = totals.common_ms_N[at_U] == 0
        largest_ms = totals.worst_ms_N[at_U[apart_U]].max(initial=0.0) + totals.common_ms_N[at_U].sum()
        return bool(largest_ms < limit)

    by_sum, by_depth = totals.ms_N, totals.worst_ms_N
    for name, at_U in chain(
        _uniform(problem, totals, promising),
        _descent("greedy by sum", by_sum, problem, totals, promising),
        _descent("greedy by depth", by_depth, problem, totals, promising),
    ):
        key = partitioner.alike_N[at_U].tobytes()
        if key in seen:
            continue
        seen.add(key)
        for order, size_N in (("time", totals.ms_N), ("bytes", totals.bytes_N2[:, 0])):
            num_placed += len(at_U)
            places = partitioner.place(at_U, size_N, beat_ms() * (1 - ROUNDING))
            if places is not None:
                chosen = (at_U - totals.start_U).tolist()
                units = zip(problem.units, chosen, places, strict=True)
                yield f"TorchRec's {name}, {order}", [Placed(c, in_order(u.choices[c], p)) for u, c, p in units]
        if num_placed > MOST_PLACED:
            return


Promising = Callable[[np.ndarray, float], bool]


def _uniform(problem: Problem, totals: ChoiceTotals, promising: Promising) -> Iterator[tuple[str, np.ndarray]]:
    """One sharding type for all tables, of each table the option whose largest shard is least."""
    types = [[choice.sharding_type for choice in unit.choices] for unit in problem.units]
    for sharding_type in SCOPES:
        if all(sharding_type in of_unit for of_unit in types):
            at = []
            for start, of_unit in zip(totals.start_U.tolist(), types, strict=True):
                own = [start + i for i, kind in enumerate(of_unit) if kind == sharding_type]
                at.append(min(own, key=totals.worst_ms_N.__getitem__))
            at_U = np.array(at)
            if promising(at_U, float(totals.ms_N[at_U].sum()) / problem.num_ranks):
                yield f"uniform {sharding_type}", at_U


def _descent(
    name: str, score_N: np.ndarray, problem: Problem, totals: ChoiceTotals, promising: Promising
) -> Iterator[tuple[str, np.ndarray]]:
    """Each table's best option; then again and again the table with the largest shard in memory moves on to its next best."""
    start_U, num_choices = totals.start_U, len(totals.ms_N)
    stop_U = np.append(start_U[1:], num_choices)
    order_N = np.lexsort((score_N, np.repeat(np.arange(len(start_U)), stop_U - start_U)))
    storage_N4 = np.stack((totals.worst_bytes_N2, totals.bytes_N2), axis=2).reshape(num_choices, 4)
    largest_first = [
        (*(-storage_N4[order_N[at]]).tolist(), unit) for unit, at in enumerate(start_U) if at + 1 < stop_U[unit]
    ]
    heapq.heapify(largest_first)
    index_U, at_U = start_U.copy(), order_N[start_U]
    total_ms, step = float(totals.ms_N[at_U].sum()), 0
    while True:
        if promising(at_U, total_ms / problem.num_ranks * (1 - ROUNDING)):
            yield f"{name}, step {step}", at_U.copy()
        if not largest_first:
            return
        unit = heapq.heappop(largest_first)[-1]
        index_U[unit] += 1
        following = order_N[index_U[unit]]
        total_ms += float(totals.ms_N[following] - totals.ms_N[at_U[unit]])
        at_U[unit] = following
        step += 1
        if index_U[unit] + 1 < stop_U[unit]:
            heapq.heappush(largest_first, (*(-storage_N4[following]).tolist(), unit))


class _Partitioner:
    """GreedyPerfPartitioner: uniform options first, then tables by size, each shard on the least busy rank, or host, that has room."""

    def __init__(self, problem: Problem, totals: ChoiceTotals) -> None:
        self.problem, self.num_ranks, self.per_host = problem, problem.num_ranks, problem.ranks_per_host
        choices = [choice for unit in problem.units for choice in unit.choices]
        self._choices = choices
        self._shapes: dict[int, _Shape] = {}
        unit_N = np.repeat(np.arange(len(totals.start_U)), np.diff(np.append(totals.start_U, len(choices))))
        first: dict[tuple, int] = {}
        alike = [
            first.setdefault((unit, c.scope, c.one_host, *((b.count, b.demand_Kg.tobytes()) for b in c.blocks)), index)
            for index, (unit, c) in enumerate(zip(unit_N.tolist(), choices, strict=True))
        ]
        self.alike_N = np.array(alike)  # the first choice that is placed the same way

    def place(self, at_U: np.ndarray, size_N: np.ndarray, limit_ms: float) -> list[tuple[int, ...]] | None:
        """Places of each unit's blocks; None: no rank has room for a shard, or some rank reaches `limit_ms`."""
        self._ms = [0.0] * self.num_ranks
        self._room = [[float(capacity)] * self.num_ranks for capacity in self.problem.capacity]
        self._limit_ms = limit_ms
        shapes = [self._shape(n) for n in at_U.tolist()]
        places: list[tuple[int, ...]] = [()] * len(shapes)
        for unit, shape in enumerate(shapes):
            if SCOPES[shape.sharding_type] == "all":
                if not self._put(shape.taken[0], 0):
                    return None
                places[unit] = (0,)
        heap: list[tuple[float, int, int]] | None = None
        for unit in np.argsort(-size_N[at_U], kind="stable").tolist():
            shape = shapes[unit]
            if SCOPES[shape.sharding_type] == "all":
                continue
            if shape.sharding_type in ("table_wise", "column_wise"):
                heap = self._heap(range(self.num_ranks)) if heap is None else heap
                at = self._on_least(shape, heap)
            else:
                at, heap = self._on_hosts(shape), None
            if at is None:
                return None
            places[unit] = at
        return places if max(self._ms) < limit_ms else None

    def _shape(self, n: int) -> _Shape:
        if n not in self._shapes:
            self._shapes[n] = _shape_of(self._choices[n], self.problem.num_channels)
        return self._shapes[n]

    def _heap(self, ranks: range) -> list[tuple[float, int, int]]:
        heap = [(self._ms[rank], rank % self.per_host, rank) for rank in ranks]
        heapq.heapify(heap)
        return heap

    def _put(self, taken: tuple[Taken, ...], first_rank: int) -> bool:
        """On consecutive ranks, one each; False, and nothing done: one has no room."""
        (device, host), ms = self._room, self._ms
        for rank, (_, device_bytes, host_bytes) in enumerate(taken, first_rank):
            if device_bytes > device[rank] or host_bytes > host[rank]:
                return False
        for rank, (took, device_bytes, host_bytes) in enumerate(taken, first_rank):
            ms[rank] += took
            device[rank] -= device_bytes
            host[rank] -= host_bytes
        return True

    def _on_least(self, shape: _Shape, heap: list[tuple[float, int, int]]) -> tuple[int, ...] | None:
        """`_device_partition`."""
        places = []
        for taken in shape.taken:
            passed = []
            while heap and not self._put(taken, heap[0][2]):
                passed.append(heapq.heappop(heap))
            if not heap:
                return None
            _, local, rank = heap[0]
            heapq.heapreplace(heap, (self._ms[rank], local, rank))
            for entry in passed:
                heapq.heappush(heap, entry)
            if self._ms[rank] >= self._limit_ms:
                return None
            places.append(rank)
        return tuple(places)

    def _on_hosts(self, shape: _Shape) -> tuple[int, ...] | None:
        """`_cohost_partition` and `_multi_hosts_partition`: the least busy host, or run of hosts in that order, that has room."""
        per_host, num_hosts = self.per_host, self.problem.num_hosts
        hosts = sorted(range(num_hosts), key=lambda host: sum(self._ms[host * per_host : (host + 1) * per_host]))
        if shape.sharding_type == "table_column_wise":
            for host in hosts:
                before = self._ms[:], [room[:] for room in self._room]
                at = self._on_least(shape, self._heap(range(host * per_host, (host + 1) * per_host)))
                if at is not None:
                    return at
                self._ms, self._room = before
            return None
        count = len(shape.taken)
        runs = [hosts[i : i + count] for i in range(num_hosts - count + 1)]
        for run in runs or [[hosts[i % num_hosts] for i in range(count)]]:
            before = self._ms[:], [room[:] for room in self._room]
            if all(self._put(taken, host * per_host) for taken, host in zip(shape.taken, run, strict=True)):
                return tuple(run)
            self._ms, self._room = before
        return None


def _shape_of(choice: Choice, num_channels: int) -> _Shape:
    taken = []
    for blocks in choice.blocks:
        demand_KW = blocks.demand_KW()
        ms_W, bytes_2W = demand_KW[:num_channels].sum(axis=0), demand_KW[num_channels:]
        taken += [tuple(zip(ms_W.tolist(), *bytes_2W.tolist(), strict=True))] * blocks.count
    return _Shape(choice.sharding_type, tuple(taken))

"""Swaps of single shards between ranks: what taking out whole units and putting them back finds only by chance."""

# K quantities  S balanced quantities  R ranks  A shards  B sets of shards of one rank: one, two, or none  I of the pressed rank  J of others
from dataclasses import dataclass

import numpy as np

from dlrm_scale.sharding.packing import Packing, Placed, in_order
from dlrm_scale.sharding.problem import Unit

MOST_ON_A_RANK = 12  # shards: with more, on the average, pairs of them are not tried
LEAST_GAIN = 1e-9  # of the smooth score


def movable(unit: Unit) -> bool:
    """No rule says where the unit's shards may be."""
    return bool(unit.allowed_R.all()) and not unit.apart_from and unit.choices[0].places is None


def swap_down(packing: Packing, most_swaps: int, movable_U: list[bool]) -> int:
    """Exchanges sets of shards between the rank that holds too much, or is the busiest, and another, each time the two sets
    that lower the smooth score most; how many exchanges. Knows no churn: the problem must have none."""
    for done in range(most_swaps):
        if not _swap_once(packing, movable_U):
            return done
    return most_swaps


def _swap_once(packing: Packing, movable_U: list[bool]) -> bool:
    pressed = packing.pressed_rank()
    shards = _shards(packing, movable_U)
    if shards is None:
        return False
    first_B, second_B, demand_KB, rank_B = _sets(shards, packing.problem.num_ranks)
    at_I, at_J = np.flatnonzero(rank_B == pressed), np.flatnonzero(rank_B != pressed)
    if len(at_I) < 2:  # the empty set alone
        return False
    shift_KIJ = demand_KB[:, None, at_J] - demand_KB[:, at_I, None]
    cost_IJ = packing.cost_of_shift(pressed, rank_B[at_J], shift_KIJ)
    i, j = np.unravel_index(cost_IJ.argmin(), cost_IJ.shape)
    if cost_IJ[i, j] >= -LEAST_GAIN:
        return False
    moved: dict[int, dict[int, int]] = {}  # unit -> index of its block -> new rank
    for at, rank in ((at_I[i], int(rank_B[at_J[j]])), (at_J[j], pressed)):
        for shard in (first_B[at], second_B[at]):
            if shard >= 0:
                moved.setdefault(int(shards.unit_A[shard]), {})[int(shards.index_A[shard])] = rank
    for unit, new_rank in moved.items():
        placed = packing.take(unit)
        places = [new_rank.get(index, place) for index, place in enumerate(placed.places)]
        choice = packing.problem.units[unit].choices[placed.choice]
        packing.put(unit, Placed(placed.choice, in_order(choice, places)))
    return True


@dataclass(frozen=True)
class _Shards:
    """All that may move, rank by rank."""

    unit_A: np.ndarray
    index_A: np.ndarray  # of the unit's block
    rank_A: np.ndarray
    demand_KA: np.ndarray


def _shards(packing: Packing, movable_U: list[bool]) -> _Shards | None:
    units, ranks, demands = [], [], []
    for unit, placed in enumerate(packing.placed):
        choice = packing.problem.units[unit].choices[placed.choice]
        if movable_U[unit] and choice.scope == "rank" and not choice.one_host:
            units.append(unit)
            ranks.append(placed.places)
            demands.append(choice.demand_NKW[:, :, 0])
    if not units:
        return None
    counts = [len(places) for places in ranks]
    rank_A = np.concatenate(ranks)
    index_A = np.concatenate([np.arange(count) for count in counts])
    order = np.argsort(rank_A, kind="stable")
    return _Shards(np.repeat(units, counts)[order], index_A[order], rank_A[order], np.concatenate(demands).T[:, order])


def _sets(shards: _Shards, num_ranks: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """First and second shard of each set (B,), -1 where it has none; what it takes (K, B), and its rank (B,)."""
    rank_A, num_shards = shards.rank_A, len(shards.rank_A)
    firsts, seconds = [np.full(num_ranks, -1), np.arange(num_shards)], [np.full(num_ranks + num_shards, -1)]
    if num_shards <= MOST_ON_A_RANK * num_ranks:
        for apart in range(1, MOST_ON_A_RANK):
            first = np.flatnonzero(rank_A[apart:] == rank_A[:-apart])
            firsts.append(first)
            seconds.append(first + apart)
    first_B, second_B = np.concatenate(firsts), np.concatenate(seconds)
    demand_KA = np.column_stack((shards.demand_KA, np.zeros(len(shards.demand_KA))))  # the last, at -1, is nothing
    rank_B = np.concatenate((np.arange(num_ranks), rank_A[first_B[num_ranks:]]))
    return first_B, second_B, demand_KA[:, first_B] + demand_KA[:, second_B], rank_B

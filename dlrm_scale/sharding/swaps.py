"""Swaps of single blocks between ranks, or hosts: what taking out whole units and putting them back finds only by chance."""

# K quantities  S balanced quantities  W ranks of a block (1, or a host's)  A blocks of one scope  P places: ranks or hosts
# B sets of blocks at one place: one, two, or none  I of the pressed place  J of others  M exchanges
from dataclasses import dataclass

import numpy as np

from dlrm_scale.sharding.packing import Packing, Placed, in_order
from dlrm_scale.sharding.problem import Scope, Unit

MOST_AT_A_PLACE = 12  # blocks: with more, on the average, pairs of them are not tried
MOST_PAIRED = 2000  # blocks
LEAST_GAIN = 1e-9  # of the smooth score


def movable(unit: Unit) -> bool:
    """No rule says where the unit's shards may be."""
    return bool(unit.allowed_R.all()) and not unit.apart_from and unit.choices[0].places is None


def swap_down(packing: Packing, most_swaps: int, movable_U: list[bool]) -> int:
    """Exchanges sets of blocks between the rank that holds too much, or is the busiest, and another (or their hosts), each time the
    two sets that lower the smooth score most; how many exchanges. Knows no churn: the problem must have none."""
    for done in range(most_swaps):
        if not (_swap_once(packing, movable_U, "rank") or _swap_once(packing, movable_U, "host")):
            return done
    return most_swaps


def _swap_once(packing: Packing, movable_U: list[bool], scope: Scope) -> bool:
    pressed = packing.pressed_rank() // packing.problem.width(scope)
    blocks = _blocks(packing, movable_U, scope)
    if blocks is None or pressed not in blocks.place_A:
        return False
    first_B, second_B, demand_KBW, place_B = _sets(blocks, packing.problem.num_ranks // packing.problem.width(scope))
    at_I, at_J = np.flatnonzero(place_B == pressed), np.flatnonzero(place_B != pressed)
    if not len(at_J):
        return False
    at_I, at_J = _relieving(packing, demand_KBW, place_B, at_I, at_J)
    if not len(at_I):
        return False
    cost_M = packing.cost_of_shift(pressed, place_B[at_J], demand_KBW[:, at_J] - demand_KBW[:, at_I])
    best = int(cost_M.argmin())
    if cost_M[best] >= -LEAST_GAIN:
        return False
    moved: dict[int, dict[int, int]] = {}  # unit -> index of its block -> new place
    for at, place in ((at_I[best], int(place_B[at_J[best]])), (at_J[best], pressed)):
        for block in (first_B[at], second_B[at]):
            if block >= 0:
                moved.setdefault(int(blocks.unit_A[block]), {})[int(blocks.index_A[block])] = place
    for unit, new_place in moved.items():
        placed = packing.take(unit)
        places = [new_place.get(index, place) for index, place in enumerate(placed.places)]
        choice = packing.problem.units[unit].choices[placed.choice]
        packing.put(unit, Placed(placed.choice, in_order(choice, places)))
    return True


def _relieving(
    packing: Packing, demand_KBW: np.ndarray, place_B: np.ndarray, at_I: np.ndarray, at_J: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """(M,) sets of the pressed place and (M,) of others whose exchange leaves both below what presses the pressed one now."""
    width = demand_KBW.shape[2]
    rows = packing.pressing_rows()
    use_PW = packing.use_KR[rows].sum(axis=0).reshape(-1, width)
    demand_BW = demand_KBW[rows].sum(axis=0)
    here_W, there_JW = use_PW[place_B[at_I[0]]], use_PW[place_B[at_J]]
    shift_IJW = demand_BW[at_J] - demand_BW[at_I, None]
    limit = here_W.max() * (1 - LEAST_GAIN)
    good_IJ = ((here_W + shift_IJW).max(axis=2) < limit) & ((there_JW - shift_IJW).max(axis=2) < limit)
    i, j = np.nonzero(good_IJ)
    return at_I[i], at_J[j]


@dataclass(frozen=True)
class _Blocks:
    """All that may move, place by place."""

    unit_A: np.ndarray
    index_A: np.ndarray  # of the unit's block
    place_A: np.ndarray
    demand_KAW: np.ndarray


def _blocks(packing: Packing, movable_U: list[bool], scope: Scope) -> _Blocks | None:
    # The blocks of a grid stay on hosts of their own, those of table_column_wise on one
    kinds = ("table_wise", "column_wise") if scope == "rank" else ("table_row_wise", "grid_shard")
    units, places, demands = [], [], []
    for unit, placed in enumerate(packing.placed):
        choice = packing.problem.units[unit].choices[placed.choice]
        if choice.sharding_type in kinds and movable_U[unit] and (scope == "rank" or len(placed.places) == 1):
            units.append(unit)
            places.append(placed.places)
            demands.append(choice.demand_NKW)
    if not units:
        return None
    counts = [len(of_unit) for of_unit in places]
    place_A = np.concatenate(places)
    index_A = np.arange(len(place_A)) - np.repeat(np.cumsum(counts) - counts, counts)
    order = np.argsort(place_A, kind="stable")
    demand_KAW = np.concatenate(demands).transpose(1, 0, 2)[:, order]
    return _Blocks(np.repeat(units, counts)[order], index_A[order], place_A[order], demand_KAW)


def _sets(blocks: _Blocks, num_places: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """First and second block of each set (B,), -1 where it has none; what it takes (K, B, W), and its place (B,)."""
    place_A, num_blocks = blocks.place_A, len(blocks.place_A)
    firsts, seconds = [np.full(num_places, -1), np.arange(num_blocks)], [np.full(num_places + num_blocks, -1)]
    if num_blocks <= min(MOST_PAIRED, MOST_AT_A_PLACE * num_places):
        for apart in range(1, MOST_AT_A_PLACE):
            first = np.flatnonzero(place_A[apart:] == place_A[:-apart])
            firsts.append(first)
            seconds.append(first + apart)
    first_B, second_B = np.concatenate(firsts), np.concatenate(seconds)
    nothing = np.zeros_like(blocks.demand_KAW[:, :1])
    demand_KAW = np.concatenate((blocks.demand_KAW, nothing), axis=1)  # the last, at -1, is nothing
    place_B = np.concatenate((np.arange(num_places), place_A[first_B[num_places:]]))
    return first_B, second_B, demand_KAW[:, first_B] + demand_KAW[:, second_B], place_B

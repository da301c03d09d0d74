"""Swaps of single shards between ranks: what taking out whole units and putting them back finds only by chance."""

# K quantities  S balanced quantities  R ranks  B sets of shards of one rank: one, two, or none  I of the pressed rank  J of others
from itertools import combinations

import numpy as np

from dlrm_scale.sharding.packing import Packing, Placed, in_order
from dlrm_scale.sharding.problem import Unit

MOST_ON_A_RANK = 12  # shards, of which pairs are tried too
LEAST_GAIN = 1e-9  # of the smooth score
Block = tuple[int, int]  # unit, and index of its block


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
    sets_R, demand_KB, rank_B = _sets(packing, movable_U)
    at_I = np.flatnonzero(rank_B == pressed)
    at_J = np.flatnonzero(rank_B != pressed)
    if len(at_I) < 2 or not len(at_J):  # the empty set alone
        return False
    shift_KIJ = demand_KB[:, None, at_J] - demand_KB[:, at_I, None]
    cost_IJ = packing.cost_of_shift(pressed, rank_B[at_J], shift_KIJ)
    i, j = np.unravel_index(cost_IJ.argmin(), cost_IJ.shape)
    if cost_IJ[i, j] >= -LEAST_GAIN:
        return False
    other = int(rank_B[at_J[j]])
    moved = {block: other for block in sets_R[at_I[i]]} | {block: pressed for block in sets_R[at_J[j]]}
    for unit in {unit for unit, _ in moved}:
        placed = packing.take(unit)
        places = [moved.get((unit, index), place) for index, place in enumerate(placed.places)]
        choice = packing.problem.units[unit].choices[placed.choice]
        packing.put(unit, Placed(placed.choice, in_order(choice, places)))
    return True


def _sets(packing: Packing, movable_U: list[bool]) -> tuple[list[tuple[Block, ...]], np.ndarray, np.ndarray]:
    """Sets of shards that lie on one rank, what each takes (K, B), and its rank (B,)."""
    num_quantities, num_ranks = packing.use_KR.shape
    on_rank: list[list[tuple[Block, np.ndarray]]] = [[] for _ in range(num_ranks)]
    for unit, placed in enumerate(packing.placed):
        choice = packing.problem.units[unit].choices[placed.choice]
        if choice.scope == "rank" and not choice.one_host and movable_U[unit]:
            demands = [blocks.demand_Kg[:, 0] for blocks in choice.blocks for _ in range(blocks.count)]
            for index, (rank, demand_K) in enumerate(zip(placed.places, demands, strict=True)):
                on_rank[rank].append(((unit, index), demand_K))
    sets, demands, ranks = [], [], []
    for rank, blocks in enumerate(on_rank):
        sets.append(())
        demands.append(np.zeros(num_quantities))
        ranks.append(rank)
        for size in (1, 2) if len(blocks) <= MOST_ON_A_RANK else (1,):
            for chosen in combinations(blocks, size):
                sets.append(tuple(block for block, _ in chosen))
                demands.append(sum(demand for _, demand in chosen))
                ranks.append(rank)
    return sets, np.array(demands).T, np.array(ranks)

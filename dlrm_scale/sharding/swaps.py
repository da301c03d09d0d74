"""Swaps of single blocks between ranks, or hosts: what taking out whole units and putting them back finds only by chance."""

# K quantities  S balanced quantities  W ranks of a block (1, or a host's)  A blocks of one scope  P places: ranks or hosts
# B sets of blocks at one place: one, two, or none  I of the pressed place  J of others  M exchanges
from dataclasses import dataclass

import numpy as np

from dlrm_scale.sharding.packing import Packing, Placed, in_order
from dlrm_scale.sharding.problem import NUM_TIERS, Problem, Scope, Unit

MOST_AT_A_PLACE = 12  # blocks: with more, on the average, pairs of them are not tried
MOST_PAIRED = 2000  # blocks
MOST_COMPARED = 256  # exchanges that relieve both places: of more, those that leave the busier of the two least
LEAST_GAIN = 1e-9  # of the smooth score
# The blocks of a grid stay on hosts of their own, those of table_column_wise on one: only a single one of them moves
KINDS: dict[Scope, tuple[str, ...]] = {
    "rank": ("table_wise", "column_wise"),
    "host": ("table_row_wise", "grid_shard"),
}


def movable(unit: Unit) -> bool:
    """No rule says where the unit's shards may be."""
    return bool(unit.allowed_R.all()) and not unit.apart_from and unit.choices[0].places is None


class Swapper:
    """Exchanges sets of blocks between the rank that holds too much, or is the busiest, and another (or their hosts). Knows no churn:
    the problem must have none."""

    def __init__(self, problem: Problem) -> None:
        self.start_U = np.cumsum([0] + [len(unit.choices) for unit in problem.units[:-1]])
        self.pools = {scope: _Pool.of(problem, scope) for scope in KINDS}

    def swap_down(self, packing: Packing, most_swaps: int) -> int:
        """Each time the two sets that lower the smooth score most; how many exchanges."""
        for done in range(most_swaps):
            if not (self._swap_once(packing, "rank") or self._swap_once(packing, "host")):
                return done
        return most_swaps

    def _swap_once(self, packing: Packing, scope: Scope) -> bool:
        pressed = packing.pressed_rank() // packing.problem.width(scope)
        blocks = self._blocks(packing, scope)
        if blocks is None or pressed not in blocks.place_A:
            return False
        num_places = packing.problem.num_ranks // packing.problem.width(scope)
        first_B, second_B, demand_KBW, place_B = _sets(blocks, num_places)
        at_I, at_J = np.flatnonzero(place_B == pressed), np.flatnonzero(place_B != pressed)
        if not len(at_J):
            return False
        at_M, other_M = _relieving(packing, demand_KBW, place_B, at_I, at_J)
        if not len(at_M):
            return False
        cost_M = packing.cost_of_shift(pressed, place_B[other_M], demand_KBW[:, other_M] - demand_KBW[:, at_M])
        best = int(cost_M.argmin())
        if cost_M[best] >= -LEAST_GAIN:
            return False
        moved: dict[int, dict[int, int]] = {}  # unit -> index of its block -> new place
        for at, place in ((at_M[best], int(place_B[other_M[best]])), (other_M[best], pressed)):
            for block in (first_B[at], second_B[at]):
                if block >= 0:
                    moved.setdefault(int(blocks.unit_A[block]), {})[int(blocks.index_A[block])] = place
        for unit, new_place in moved.items():
            placed = packing.take(unit)
            places = [new_place.get(index, place) for index, place in enumerate(placed.places)]
            choice = packing.problem.units[unit].choices[placed.choice]
            packing.put(unit, Placed(placed.choice, in_order(choice, places)))
        return True

    def _blocks(self, packing: Packing, scope: Scope) -> "_Blocks | None":
        pool = self.pools[scope]
        chosen_U = self.start_U + [placed.choice for placed in packing.placed]
        units = np.flatnonzero(pool.count_N[chosen_U])
        if not len(units):
            return None
        count_U = pool.count_N[chosen_U[units]]
        place_A = np.array([place for unit in units.tolist() for place in packing.placed[unit].places])
        index_A = np.arange(len(place_A)) - np.repeat(np.cumsum(count_U) - count_U, count_U)
        order = np.argsort(place_A, kind="stable")
        at_A = (np.repeat(pool.start_N[chosen_U[units]], count_U) + index_A)[order]
        return _Blocks(np.repeat(units, count_U)[order], index_A[order], place_A[order], pool.demand_KXW[:, at_A])


@dataclass(frozen=True)
class _Pool:
    """What each block of each choice takes that may be exchanged, choice after choice."""

    count_N: np.ndarray  # blocks of a choice; 0: none that may be exchanged
    start_N: np.ndarray
    demand_KXW: np.ndarray

    @staticmethod
    def of(problem: Problem, scope: Scope) -> "_Pool":
        width = problem.width(scope)
        demands, counts = [np.zeros((problem.num_channels + NUM_TIERS, 0, width))], []
        for unit in problem.units:
            can_move = movable(unit)
            for choice in unit.choices:
                moves = (
                    can_move and choice.sharding_type in KINDS[scope] and (scope == "rank" or choice.num_blocks == 1)
                )
                counts.append(choice.num_blocks if moves else 0)
                if moves:
                    demands.append(choice.demand_NKW.transpose(1, 0, 2))
        count_N = np.array(counts)
        return _Pool(count_N, np.cumsum(count_N) - count_N, np.concatenate(demands, axis=1))


def _relieving(
    packing: Packing, demand_KBW: np.ndarray, place_B: np.ndarray, at_I: np.ndarray, at_J: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """(M,) sets of the pressed place and (M,) of others whose exchange leaves both below what presses the pressed one now."""
    width = demand_KBW.shape[2]
    rows = packing.pressing_rows()
    use_PW = packing.use_KR[rows].sum(axis=0).reshape(-1, width)
    demand_BW = demand_KBW[rows].sum(axis=0)
    here_W, there_JW = use_PW[place_B[at_I[0]]], use_PW[place_B[at_J]]
    busier_IJ = np.zeros((len(at_I), len(at_J)))
    for w in range(width):  # not one array with an axis of it, as it is often 1
        shift_IJ = demand_BW[at_J, w] - demand_BW[at_I, None, w]
        np.maximum(busier_IJ, here_W[w] + shift_IJ, out=busier_IJ)
        np.maximum(busier_IJ, there_JW[:, w] - shift_IJ, out=busier_IJ)
    good = np.flatnonzero(busier_IJ < here_W.max() * (1 - LEAST_GAIN))
    if len(good) > MOST_COMPARED:
        good = good[np.argpartition(busier_IJ.ravel()[good], MOST_COMPARED)[:MOST_COMPARED]]
    i, j = np.unravel_index(good, busier_IJ.shape)
    return at_I[i], at_J[j]


@dataclass(frozen=True)
class _Blocks:
    """All that may move, place by place."""

    unit_A: np.ndarray
    index_A: np.ndarray  # of the unit's block
    place_A: np.ndarray
    demand_KAW: np.ndarray


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

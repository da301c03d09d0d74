"""A lower bound of every plan's score, and proofs that no plan fits.

A plan's score T is at least its mean over ranks, and at least what its worst shard and the shares of all tables that lie on every
rank (row-wise, data_parallel) together make one rank take. So T is possible only if, for some size of that common load, choices
whose largest shard keeps under T less the common load have a mean of at most T: a choice for each unit on its own, once the bytes
of all ranks together and the common load are priced by multipliers (Lagrange). The bound is the least T for which that holds.
"""

# U units  N choices of all units, unit by unit  R ranks
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from dlrm_scale.sharding.problem import Cutter, Problem

BISECTIONS = 40
COMMON_HALVINGS = 10  # of the target: sizes of the common load that are told apart
COMMON_BISECTIONS = 10
PRICE_BISECTIONS = 30


@dataclass(frozen=True)
class ChoiceTotals:
    """What each choice takes: over all its shards, and at the least of some one rank."""

    start_U: np.ndarray  # first choice of each unit
    ms_N: np.ndarray
    worst_ms_N: np.ndarray
    bytes_N2: np.ndarray
    worst_bytes_N2: np.ndarray
    common_ms_N: np.ndarray  # of each rank, for choices that lie on all ranks; else 0

    @property
    def taken_N3(self) -> np.ndarray:
        """What has a price: bytes of both tiers, and the common load."""
        return np.column_stack((self.bytes_N2, self.common_ms_N))


@dataclass(frozen=True)
class Bound:
    ms: float
    price_3: np.ndarray  # ms that a byte of each tier is worth where memory is short, and a ms of common load
    impossible: str | None = None  # why no plan can fit: what `unit` does, or all tables together
    unit: int | None = None


def choice_totals(problem: Problem, cutter: Cutter) -> ChoiceTotals:
    C = problem.num_channels
    demand_GK, options = cutter.demand_GK, cutter.options
    starts = cutter.group_start[:-1]
    total_OK = np.add.reduceat(demand_GK * options.group_num_shards[:, None], starts)
    worst_OK = np.maximum.reduceat(demand_GK, starts)
    num_choices = [len(unit.choices) for unit in problem.units]
    members = [choice.options for unit in problem.units for choice in unit.choices]
    first = np.cumsum([0] + [len(m) for m in members[:-1]])
    flat = np.array([option for options_of_choice in members for option in options_of_choice])
    total_NK, worst_NK = np.add.reduceat(total_OK[flat], first), np.add.reduceat(worst_OK[flat], first)
    least_NK = np.add.reduceat(np.minimum.reduceat(demand_GK, starts)[flat], first)
    on_all_N = np.array([choice.scope == "all" for unit in problem.units for choice in unit.choices])
    return ChoiceTotals(
        start_U=np.cumsum([0, *num_choices[:-1]]),
        ms_N=total_NK[:, :C].sum(1),
        worst_ms_N=worst_NK[:, :C].sum(1),
        bytes_N2=total_NK[:, C:],
        worst_bytes_N2=worst_NK[:, C:],
        common_ms_N=np.where(on_all_N, least_NK[:, :C].sum(1), 0.0),
    )


def lower_bound(problem: Problem, totals: ChoiceTotals) -> Bound:
    fits_N = (totals.worst_bytes_N2 <= problem.capacity).all(axis=1)
    lone_U = np.logical_or.reduceat(fits_N, totals.start_U)
    no_price = np.zeros(3)
    if not lone_U.all():
        unit = int(np.flatnonzero(~lone_U)[0])
        return Bound(np.inf, no_price, _too_large(problem, totals, unit), unit)
    least_bytes = np.minimum.reduceat(np.where(fits_N[:, None], totals.bytes_N2, np.inf), totals.start_U).sum(axis=0)
    room = problem.capacity * problem.num_ranks
    if least_bytes[0] > room[0]:
        return Bound(
            np.inf,
            no_price,
            f"the tables take at least {least_bytes[0] / 1e9:,.1f} GB of device memory however they are sharded, and the "
            f"{problem.num_ranks} ranks have {room[0] / 1e9:,.1f} GB for them",
        )
    least_in_all = np.minimum.reduceat(np.where(fits_N, totals.bytes_N2.sum(axis=1), np.inf), totals.start_U).sum()
    if least_in_all > room.sum():
        return Bound(
            np.inf,
            no_price,
            f"the tables take at least {least_in_all / 1e9:,.1f} GB of device and host memory together however they are sharded, and "
            f"the {problem.num_ranks} ranks have {room[0] / 1e9:,.1f} and {room[1] / 1e9:,.1f} GB for them",
        )
    worst = float(np.minimum.reduceat(np.where(fits_N, totals.worst_ms_N, np.inf), totals.start_U).max())
    mean, price_3 = best_mean(problem, totals, fits_N)
    low = max(worst, mean)
    high = max(low, float(totals.worst_ms_N[fits_N].max()))

    def possible(target: float) -> bool:
        return best_mean(problem, totals, fits_N & (totals.worst_ms_N <= target))[0] <= target

    low = _least_possible(possible, low, high, BISECTIONS)
    low = _least_possible(lambda t: _possible_beside_common(problem, totals, fits_N, t), low, high, COMMON_BISECTIONS)
    return Bound(low, price_3)


def _least_possible(possible: Callable[[float], bool], low: float, high: float, bisections: int) -> float:
    """A value under which nothing is possible: `low`, or higher by bisection, geometric since `high` may be far above."""
    if possible(low):
        return low
    step = 1e-3
    while low * (1 + step) < high and not possible(low * (1 + step)):
        low, step = low * (1 + step), step * 2
    high = min(high, low * (1 + step))
    for _ in range(bisections):
        middle = (low + high) / 2
        low, high = (low, middle) if possible(middle) else (middle, high)
    return low


def _possible_beside_common(problem: Problem, totals: ChoiceTotals, fits_N: np.ndarray, target: float) -> bool:
    """False: for every size of the common load, the choices that leave room for it have too large a mean."""
    on_all_N = totals.common_ms_N > 0

    def possible(least: float, most: float, halvings: int) -> bool:
        allowed_N = fits_N & (totals.worst_ms_N <= np.where(on_all_N, target, target - least))
        if best_mean(problem, totals, allowed_N, common_ms=most)[0] > target:
            return False
        middle = (least + most) / 2
        return halvings == 0 or possible(least, middle, halvings - 1) or possible(middle, most, halvings - 1)

    return possible(0.0, target, COMMON_HALVINGS)


def best_mean(
    problem: Problem, totals: ChoiceTotals, allowed_N: np.ndarray, common_ms: float = np.inf
) -> tuple[float, np.ndarray]:
    """A lower bound of the mean milliseconds of a rank over choices in `allowed_N` whose common load is at most `common_ms`, and the
    prices that give it."""
    taken_N3 = totals.taken_N3
    room_3 = np.append(problem.capacity * problem.num_ranks, common_ms)

    def at(price_3: np.ndarray) -> tuple[float, np.ndarray]:
        cost_N = np.where(allowed_N, totals.ms_N + taken_N3 @ price_3, np.inf)
        least_U = np.minimum.reduceat(cost_N, totals.start_U)
        if np.isinf(least_U).any():
            return np.inf, np.zeros(3)
        chosen = _first_at(cost_N, least_U, totals.start_U)
        paid = float(sum(p * r for p, r in zip(price_3, room_3, strict=True) if p))
        return (float(least_U.sum()) - paid) / problem.num_ranks, taken_N3[chosen].sum(axis=0) - room_3

    price_3 = np.zeros(3)
    value, excess_3 = at(price_3)
    for i in np.flatnonzero(excess_3 > 0):
        low, high = 0.0, 1e-12 if i < 2 else 1e-3
        while (excess := at(_with(price_3, i, high))[1][i]) > 0 and high < 1e6:
            low, high = high, high * 8
        if excess > 0:
            return np.inf, price_3  # at any price: there is not the room
        best = 0.0
        for _ in range(PRICE_BISECTIONS):
            middle = (low + high) / 2
            trial, excess_3 = at(_with(price_3, i, middle))
            low, high = (middle, high) if excess_3[i] > 0 else (low, middle)
            if trial > value:
                value, best = trial, middle
        price_3 = _with(price_3, i, best)
    return value, price_3


def _with(prices: np.ndarray, i: int, price: float) -> np.ndarray:
    changed = prices.copy()
    changed[i] = price
    return changed


def _first_at(cost_N: np.ndarray, least_U: np.ndarray, start_U: np.ndarray) -> np.ndarray:
    """(U,) the first choice of each unit whose cost is the least."""
    counts = np.diff(np.append(start_U, len(cost_N)))
    hits = np.flatnonzero(cost_N == np.repeat(least_U, counts))
    return hits[np.searchsorted(hits, start_U)]


def cheapest_choices(totals: ChoiceTotals, allowed_N: np.ndarray, price_3: np.ndarray) -> np.ndarray:
    """(U,) index among all choices: the least milliseconds at these prices among `allowed_N`, or among all where none is."""
    cost_N = totals.ms_N + totals.taken_N3 @ price_3
    some_U = np.logical_or.reduceat(allowed_N, totals.start_U)
    counts = np.diff(np.append(totals.start_U, len(cost_N)))
    cost_N = np.where(allowed_N | ~np.repeat(some_U, counts), cost_N, np.inf)
    return _first_at(cost_N, np.minimum.reduceat(cost_N, totals.start_U), totals.start_U)


def _too_large(problem: Problem, totals: ChoiceTotals, unit: int) -> str:
    stop = totals.start_U[unit + 1] if unit + 1 < len(totals.start_U) else len(totals.ms_N)
    worst_n2 = totals.worst_bytes_N2[totals.start_U[unit] : stop]
    device_GB, host_GB = problem.capacity / 1e9
    in_host_n = worst_n2[:, 1] > 0
    said = []
    if not in_host_n.all():
        least = worst_n2[~in_host_n, 0].min() / 1e9
        said.append(
            f"puts at least {least:,.2f} GB on one rank however it may be sharded, and a rank has {device_GB:,.2f} GB for tables"
        )
    if in_host_n.any():
        least_device, least_host = worst_n2[in_host_n].min(axis=0) / 1e9
        said.append(
            f"with its rows in host memory puts at least {least_host:,.2f} GB there and {least_device:,.2f} GB on the device of one rank, "
            f"which has {host_GB:,.2f} and {device_GB:,.2f} GB for tables"
        )
    return "; ".join(said)

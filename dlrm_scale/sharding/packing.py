"""A partial plan that units are put into and taken out of, and what the next one would cost at every place."""

# n choices of one batch  C channels  S balanced quantities  K = C + 2 quantities  R ranks  H hosts  L ranks of a host  P places  W ranks of a block
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from dlrm_scale.sharding.problem import Choice, Problem, Unit

OVERFLOW_WEIGHT = (
    100.0  # scores that all of a rank's memory too much is worth: no saving in time may buy bytes that are not there
)
NO_PLACE = np.inf


@dataclass(frozen=True)
class Placed:
    choice: int  # index into the unit's choices
    places: tuple[int, ...]  # of its blocks


@dataclass(frozen=True)
class _Batch:
    """A unit's choices of one scope that are cut into equal blocks, so that one product scores them all."""

    choices: np.ndarray  # (n,)
    demand_nKW: np.ndarray
    by_count: tuple[tuple[int, np.ndarray], ...]  # number of blocks, and the choices (of n) that have it
    churn_nP: np.ndarray | None  # ms of each block


class Packing:
    """The smooth score is the sum over channels of the p-norm over ranks of their milliseconds, in units of `scale_ms`, plus the
    bytes that do not fit: unlike the maximum, it also falls when a rank that is not the busiest gets less.

    `power` is 2 ** doublings; the larger, the nearer to the maximum. With `balance_bytes` the norm of the ranks' device memory, in
    units of capacity, counts too, so that where memory is short what is left of it stays together.
    """

    def __init__(self, problem: Problem, scale_ms: float, doublings: int, balance_bytes: bool = False) -> None:
        self.problem, self.scale_ms = problem, scale_ms
        self.num_rows = problem.num_channels + balance_bytes  # of the quantities, those that the smooth score balances
        units = [scale_ms] * problem.num_channels + [max(float(problem.capacity[0]), 1.0)]
        self.unit_S = np.array(units[: self.num_rows])
        self.weight_S = np.ones(self.num_rows)
        self.placed: list[Placed | None] = [None] * len(problem.units)
        self.on_rank: list[set[int]] = [set() for _ in range(problem.num_ranks)]
        self.use_KR = np.zeros((problem.num_channels + 2, problem.num_ranks))
        self._powers_SR = np.zeros((self.num_rows, problem.num_ranks))
        self.over_R = np.zeros(problem.num_ranks)
        self.churn_ms = 0.0
        self._capacity = [float(c) for c in problem.capacity]
        self._room = [max(c, 1.0) for c in self._capacity]
        self._batches: dict[int, list[_Batch]] = {}
        self._odd: dict[int, list[int]] = {}
        self.sharpen(doublings)

    def weigh_bytes(self, weight: float) -> None:
        """Of the norm of memory beside that of milliseconds, where `balance_bytes` has one."""
        self.weight_S[self.problem.num_channels :] = weight

    def sharpen(self, doublings: int) -> None:
        self.doublings, self.power = doublings, 2**doublings
        self._refresh(slice(None), 1)

    # ---------------------------------------------------------------- scores
    @property
    def score_ms(self) -> float:
        """The true score: the sum over channels of the largest rank's milliseconds."""
        return float(self.use_KR[: self.problem.num_channels].max(axis=1).sum())

    @property
    def preferred_ms(self) -> float:
        """What plans are chosen by: the score, and what leaving the previous plan costs."""
        return self.score_ms + self.churn_ms

    @property
    def overflow(self) -> float:
        """Bytes over capacity, as a part of a rank's, summed over ranks and tiers; 0 when all fits."""
        return float(self.over_R.sum())

    @property
    def smooth(self) -> float:
        return float(self._smooth(self._powers_SR.sum(axis=1), self.overflow, self.churn_ms))

    @property
    def bytes_norm(self) -> float:
        """Of the ranks' device memory; with `balance_bytes` only."""
        return float(self._powers_SR[-1].sum() ** (1 / self.power))

    def _smooth(self, sums_S: np.ndarray, overflow: Any, churn_ms: Any) -> Any:
        """Of one plan, or with an axis in front of many."""
        return sums_S ** (1 / self.power) @ self.weight_S + OVERFLOW_WEIGHT * overflow + churn_ms / self.scale_ms

    def _raise(self, use: np.ndarray, axis: int = 0) -> np.ndarray:
        shape = [1] * use.ndim
        shape[axis] = -1
        out = np.minimum(use / self.unit_S.reshape(shape), 1e4)
        for _ in range(self.doublings):
            out *= out
        return out

    def _over(self, bytes_tier_first: np.ndarray) -> np.ndarray:
        """Overflow of (..., 2, X) bytes: (..., X)."""
        if not self.problem.may_overflow:
            return np.zeros((*bytes_tier_first.shape[:-2], bytes_tier_first.shape[-1]))
        device, host = (bytes_tier_first[..., tier, :] for tier in (0, 1))
        over = np.maximum(device - self._capacity[0], 0.0) / self._room[0]
        over += np.maximum(host - self._capacity[1], 0.0) / self._room[1]
        return over

    def _refresh(self, places: slice | np.ndarray, width: int) -> None:
        C, S = self.problem.num_channels, self.num_rows
        use_KPW = self.use_KR.reshape(C + 2, -1, width)[:, places]
        self._powers_SR.reshape(S, -1, width)[:, places] = self._raise(use_KPW[:S])
        if self.problem.may_overflow:
            self.over_R.reshape(-1, width)[places] = self._over(use_KPW[C:].transpose(1, 0, 2))

    # ---------------------------------------------------------------- changes
    def put(self, unit: int, placed: Placed) -> None:
        self._change(unit, placed, 1)
        self.placed[unit] = placed

    def take(self, unit: int) -> Placed:
        placed = self.placed[unit]
        self._change(unit, placed, -1)
        self.placed[unit] = None
        return placed

    def _change(self, unit: int, placed: Placed, sign: int) -> None:
        choice = self.problem.units[unit].choices[placed.choice]
        width, num_rows = self.problem.width(choice.scope), len(self.use_KR)
        use_KPW = self.use_KR.reshape(num_rows, -1, width)
        if len(placed.places) == 1:
            places = slice(placed.places[0], placed.places[0] + 1)
            use_KPW[:, places] += sign * choice.demand_NKW.transpose(1, 0, 2)
        else:
            places = np.array(placed.places)
            np.add.at(
                use_KPW, (slice(None), places), sign * choice.demand_NKW.transpose(1, 0, 2)
            )  # some may share a rank
        for ranks in self._near(unit, placed):
            (ranks.add if sign > 0 else ranks.discard)(unit)
        self._refresh(places, width)
        if self.problem.churn is not None:
            self.churn_ms += sign * self._churn(unit, placed)

    def save(self) -> tuple:
        return self.use_KR.copy(), self._powers_SR.copy(), self.over_R.copy(), self.churn_ms

    def restore(self, saved: tuple, placed: list[Placed]) -> None:
        """Back to `save`d, when units were at `placed`."""
        self.use_KR, self._powers_SR, self.over_R, self.churn_ms = saved
        changed = [unit for unit, now in enumerate(self.placed) if now is not placed[unit]]
        for unit in changed:
            for ranks in self._near(unit, self.placed[unit]):
                ranks.discard(unit)
        for unit in changed:
            self.placed[unit] = placed[unit]
            for ranks in self._near(unit, self.placed[unit]):
                ranks.add(unit)

    def become(self, placed: list[Placed]) -> None:
        """Changes whatever differs from `placed`."""
        different = [u for u, now in enumerate(self.placed) if now != placed[u]]
        for unit in different:
            self.take(unit)
        for unit in different:
            self.put(unit, placed[unit])

    def _near(self, unit: int, placed: Placed | None) -> list[set[int]]:
        if placed is None:
            return []
        choice = self.problem.units[unit].choices[placed.choice]
        width = self.problem.width(choice.scope)
        return [self.on_rank[rank] for p in placed.places for rank in range(p * width, (p + 1) * width)]

    # ---------------------------------------------------------------- what a unit would cost
    def best(self, unit: int) -> tuple[float, Placed] | None:
        """The smooth score with the unit added where it is least, over all choices and places; None: no place is allowed."""
        if unit not in self._batches:
            self._batches[unit], self._odd[unit] = self._sort_choices(self.problem.units[unit])
        found = [self._best_of_batch(unit, batch) for batch in self._batches[unit]]
        found += [self.best_place(unit, choice) for choice in self._odd[unit]]
        return min((f for f in found if f is not None), key=lambda f: f[0], default=None)

    def _sort_choices(self, unit: Unit) -> tuple[list[_Batch], list[int]]:
        """Batches by scope, and the choices that fit in none; without those that another choice can stand for at any place."""
        odd, even, seen = [], {"rank": [], "host": [], "all": []}, set()
        for index, choice in enumerate(unit.choices):
            takes = (choice.scope, *((blocks.count, blocks.demand_Kg.tobytes()) for blocks in choice.blocks))
            if takes in seen and choice.places is None and self.problem.churn is None:
                continue
            if not choice.one_host:
                seen.add(takes)
            num_places = {"rank": unit.allowed_R.sum(), "host": self.problem.hosts_of(unit.allowed_R).sum(), "all": 1}[
                choice.scope
            ]
            plain = len(choice.blocks) == 1 and not choice.one_host and choice.places is None
            (even[choice.scope] if plain and choice.num_blocks <= num_places else odd).append(index)
        batches = []
        for indices in filter(None, even.values()):
            chosen = [unit.choices[i] for i in indices]
            demand_nKW = np.stack([c.demand_NKW[0] for c in chosen])
            count_n = np.array([c.num_blocks for c in chosen])
            by_count = tuple((int(count), np.flatnonzero(count_n == count)) for count in np.unique(count_n))
            batches.append(_Batch(np.array(indices), demand_nKW, by_count, self._churn_by_place(unit, chosen)))
        return batches, odd

    def _best_of_batch(self, unit: int, batch: _Batch) -> tuple[float, Placed] | None:
        """One unit of work for all choices x places: the added powers are additive over the ranks of distinct blocks."""
        C, S, W = self.problem.num_channels, self.num_rows, batch.demand_nKW.shape[2]
        use_KPW = self.use_KR.reshape(C + 2, -1, W)
        after_nKPW = use_KPW + batch.demand_nKW[:, :, None, :]
        added_nSP = (self._raise(after_nKPW[:, :S], axis=1) - self._powers_SR.reshape(S, -1, W)).sum(axis=3)
        after_bytes = after_nKPW[:, C:].reshape(len(batch.choices), 2, -1)
        over_nP = (self._over(after_bytes) - self.over_R).reshape(len(batch.choices), -1, W).sum(axis=2)
        cost_nP = np.einsum("nsp,s->np", added_nSP, self._slope_S()) + OVERFLOW_WEIGHT * over_nP
        if batch.churn_nP is not None:
            cost_nP += batch.churn_nP / self.scale_ms
        cost_nP[:, ~self._open_places(unit, W)] = NO_PLACE
        sums_S, overflow, best = self._powers_SR.sum(axis=1), self.overflow, None
        for count, at in batch.by_count:  # m of the n choices, all of so many blocks
            places_mB = np.argpartition(cost_nP[at], count - 1, axis=1)[:, :count]
            sums_mS = sums_S + np.take_along_axis(added_nSP[at], places_mB[:, None], axis=2).sum(axis=2)
            overflow_m = overflow + np.take_along_axis(over_nP[at], places_mB, axis=1).sum(axis=1)
            churn_ms = self.churn_ms
            if batch.churn_nP is not None:
                churn_ms = churn_ms + np.take_along_axis(batch.churn_nP[at], places_mB, axis=1).sum(axis=1)
            score_m = self._smooth(sums_mS, overflow_m, churn_ms)
            score_m[np.take_along_axis(cost_nP[at], places_mB, axis=1).max(axis=1) == NO_PLACE] = NO_PLACE
            i = int(score_m.argmin())
            if score_m[i] < (NO_PLACE if best is None else best[0]):
                best = (float(score_m[i]), Placed(int(batch.choices[at[i]]), tuple(sorted(places_mB[i].tolist()))))
        return best

    def best_place(self, unit: int, choice_index: int) -> tuple[float, Placed] | None:
        """Of one choice of any kind: its blocks one after the other, each where the smooth score is least."""
        C, S, problem = self.problem.num_channels, self.num_rows, self.problem
        choice = problem.units[unit].choices[choice_index]
        use_KR, places = self.use_KR.copy(), []
        width = self.problem.width(choice.scope)
        open_P = self._open_places(unit, width)
        for i, block_KW in enumerate(choice.demand_NKW):
            after_KPW = use_KR.reshape(C + 2, -1, width) + block_KW[:, None, :]
            before = self._raise(use_KR[:S]).reshape(S, -1, width).sum(axis=2)
            added_SP = self._raise(after_KPW[:S]).sum(axis=2) - before
            over_P = (self._over(after_KPW[C:].reshape(2, -1)) - self._over(use_KR[C:])).reshape(-1, width).sum(axis=1)
            sums_S = before.sum(axis=1)
            slope_S = self.weight_S * np.maximum(sums_S, 1e-9) ** (1 / self.power - 1) / self.power
            cost_P = (
                slope_S @ added_SP + OVERFLOW_WEIGHT * over_P + self._churn_of_block(unit, choice, i) / self.scale_ms
            )
            allowed_P = self._allowed_now(choice, i, places, open_P)
            if not allowed_P.any():
                return None
            place = int(np.where(allowed_P, cost_P, NO_PLACE).argmin())
            use_KR.reshape(C + 2, -1, width)[:, place] = after_KPW[:, place]
            places.append(place)
        placed = Placed(choice_index, in_order(choice, places))
        sums_S, overflow = self._raise(use_KR[:S]).sum(axis=1), float(self._over(use_KR[C:]).sum())
        return float(self._smooth(sums_S, overflow, self.churn_ms + self._churn(unit, placed))), placed

    def random_place(self, unit: int, choice_index: int, rng: np.random.Generator) -> Placed | None:
        """Of one choice: its blocks one after the other, each at any place that rules allow; None: a block has no place."""
        choice = self.problem.units[unit].choices[choice_index]
        open_P, places = self._open_places(unit, self.problem.width(choice.scope)), []
        for block in range(choice.num_blocks):
            allowed = np.flatnonzero(self._allowed_now(choice, block, places, open_P))
            if not len(allowed):
                return None
            places.append(int(rng.choice(allowed)))
        return Placed(choice_index, in_order(choice, places))

    def _allowed_now(self, choice: Choice, block: int, places: list[int], open_P: np.ndarray) -> np.ndarray:
        """(P,) bool: where the next block may be, once the ones before it are at `places`. Column shards may share a rank, as in
        TorchRec; the column blocks of a grid lie on hosts of their own while there are any."""
        if choice.places is not None:
            pinned = np.zeros_like(open_P)
            pinned[choice.places[block]] = True
            return pinned & open_P
        if not places or choice.scope == "all":
            return open_P
        if choice.one_host:
            host_of = np.arange(self.problem.num_ranks) // self.problem.ranks_per_host
            return open_P & (host_of == host_of[places[0]])
        if choice.scope == "host":
            fresh_P = open_P.copy()
            fresh_P[places] = False
            return fresh_P if fresh_P.any() else open_P
        return open_P

    def _open_places(self, unit: int, width: int) -> np.ndarray:
        """(P,) bool: places all of whose ranks the unit's rules, and the units it must be apart from, leave it."""
        this = self.problem.units[unit]
        allowed_R = this.allowed_R
        if this.apart_from:
            taken = [r for r in range(self.problem.num_ranks) if not self.on_rank[r].isdisjoint(this.apart_from)]
            allowed_R = allowed_R.copy()
            allowed_R[taken] = False
        return allowed_R if width == 1 else allowed_R.reshape(-1, width).all(axis=1)

    def pressed_rank(self) -> int:
        """The one that holds most too much; where all fits, the busiest."""
        if self.over_R.max() > 0:
            return int(self.over_R.argmax())
        return int(self.use_KR[: self.problem.num_channels].sum(axis=0).argmax())

    def pressing_rows(self) -> slice:
        """The quantities that the pressed rank has too much of: bytes of a tier, or milliseconds."""
        C = self.problem.num_channels
        if not self.over_R.max() > 0:
            return slice(0, C)
        over_2 = self.use_KR[C:, self.pressed_rank()] - self.problem.capacity
        tier = C + int((over_2 / np.maximum(self.problem.capacity, 1.0)).argmax())
        return slice(tier, tier + 1)

    def cost_of_shift(self, place: int, others_M: np.ndarray, shift_KMW: np.ndarray) -> np.ndarray:
        """(M,) what the smooth score rises by, to first order, when the ranks of `place` get `shift_KMW` more and those of `others_M`
        that much less; places are ranks or hosts, as W says."""
        C, S, W = self.problem.num_channels, self.num_rows, shift_KMW.shape[2]
        use_KPW, powers_SPW = self.use_KR.reshape(C + 2, -1, W), self._powers_SR.reshape(S, -1, W)
        here_KMW, there_KMW = use_KPW[:, place, None] + shift_KMW, use_KPW[:, others_M] - shift_KMW
        before_SM = (powers_SPW[:, place, None] + powers_SPW[:, others_M]).sum(axis=2)
        added_SM = (self._raise(here_KMW[:S]) + self._raise(there_KMW[:S])).sum(axis=2) - before_SM
        cost_M = self._slope_S() @ added_SM
        if self.problem.may_overflow:
            over_PW = self.over_R.reshape(-1, W)
            over_MW = sum(self._over(k[C:].reshape(2, -1)).reshape(-1, W) for k in (here_KMW, there_KMW))
            cost_M += OVERFLOW_WEIGHT * (over_MW - over_PW[place] - over_PW[others_M]).sum(axis=1)
        return cost_M

    def _slope_S(self) -> np.ndarray:
        """What the smooth score rises by for each unit that a sum of powers rises by."""
        return self.weight_S * np.maximum(self._powers_SR.sum(axis=1), 1e-9) ** (1 / self.power - 1) / self.power

    # ---------------------------------------------------------------- churn
    def _churn(self, unit: int, placed: Placed) -> float:
        if self.problem.churn is None:
            return 0.0
        choice = self.problem.units[unit].choices[placed.choice]
        there = Counter(self._previous_places(unit, choice))
        ms = 0.0
        for place, block in zip(placed.places, choice.demand_NKW, strict=True):
            if there[place]:
                there[place] -= 1
            else:
                ms += float(block[self.problem.num_channels :].sum()) * self.problem.churn.ms_per_byte
        return ms

    def _previous_places(self, unit: int, choice: Choice) -> tuple[int, ...]:
        """Where the blocks of the same choice lie in the plan to stay close to; none where that has another choice."""
        churn, tables = self.problem.churn, self.problem.units[unit].tables
        same = all(churn.option[t] == o for t, o in zip(tables, choice.options, strict=True))
        return churn.places[tables[0]] if same else ()

    def _churn_of_block(self, unit: int, choice: Choice, block: int) -> np.ndarray:
        """(P,) ms of the choice's `block`-th block by place: its bytes, unless the previous plan has one like it there."""
        num_places = self.problem.num_ranks // self.problem.width(choice.scope)
        churn = self.problem.churn
        if churn is None:
            return np.zeros(num_places)
        block_bytes = float(choice.demand_NKW[block][self.problem.num_channels :].sum())
        ms_P = np.full(num_places, block_bytes * churn.ms_per_byte)
        ms_P[list(self._previous_places(unit, choice))] = 0.0
        return ms_P

    def _churn_by_place(self, unit: Unit, choices: list[Choice]) -> np.ndarray | None:
        if self.problem.churn is None:
            return None
        index = next(i for i, other in enumerate(self.problem.units) if other is unit)
        return np.stack([self._churn_of_block(index, choice, 0) for choice in choices])


def in_order(choice: Choice, places: Sequence[int]) -> tuple[int, ...]:
    """Equal blocks that no rule tells apart, by place: so that plans are alike that differ in nothing else."""
    return tuple(places if len(choice.blocks) > 1 or choice.places is not None else sorted(places))

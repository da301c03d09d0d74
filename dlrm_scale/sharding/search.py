"""Anytime search for the plan of least score: many quick starts, then large-neighbourhood search from the best of them.

A start fixes a choice for every unit and packs them, largest first, each where the smooth score is least (longest processing
time first). The choices come from targets (nothing larger than T on one rank, at the prices that the bound puts on memory), and
from leaving all choices open; beside these, every plan of TorchRec's planner that is better is a start. Then units are taken out, half of them from the busiest rank, and put back at their best, as long as there are rounds and time. The result depends on
the seed and the rounds alone, unless time cuts the search short, which it says.
"""

import math
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from itertools import chain, islice

import numpy as np

from dlrm_scale.sharding.bound import Bound, ChoiceTotals, best_mean, cheapest_choices
from dlrm_scale.sharding.packing import Packing, Placed
from dlrm_scale.sharding.problem import Problem, Unit
from dlrm_scale.sharding.swaps import Swapper, movable
from dlrm_scale.sharding.torchrec_plans import torchrec_plans

TARGETS = (1.0, 1.03, 1.08, 1.15, 1.3, 1.6, 2.0, 3.0, math.inf)  # times the bound
MORE_WHILE_TOO_FULL = 8  # times the rounds, as long as nothing fits
BYTES_WEIGHT = 0.03  # of balanced memory, once a plan fits
SHORT_OF_MEMORY = 0.7  # part of all ranks' memory, taken by the cheapest choices, from which on packing it needs care
MEMORY_PARTS = (0.97, 0.95, 0.93, 0.9)
MOST_STARTED, LEAST_STARTS = 24_000, 8  # units in all our own starts; a start of many takes long
COMMON_PARTS = (0.75, 0.5, 0.25, 0.0)
MOST_LEGS = 6  # starts to improve
UNITS_IN_LEGS = 400  # in all of them: many units make rounds longer, and starts nearer
CLOSE_ENOUGH = 2e-3  # a gap not worth searching on
CLOSE_START = 5e-3  # one after which no more of our own starts are tried
MOST_SLACK = 0.04  # how much worse than the best a plan may be to go on from, at first
JUDGE_DOUBLINGS = 4  # plans are compared by the 16-norm
INSERT_DOUBLINGS = (1, 7)  # and units put back by one drawn anew each round: from nearly the mean to nearly the maximum
REMOVED = 0.35  # of the geometric distribution of how many units a round takes out, after the first
NUM_RETURNS = 8  # times that a descent goes back to its best plan
FORCED_FIRST, FORCED = 0.5, 0.05  # part of the units put back, first and later, whose choice is drawn
STALE_ROUNDS, STALE_PART = 300, 0.5  # rounds, at least and as a part of a leg's, without a gain of note that end it
STALE_GAIN = 1e-4
MOST_SWAPS = 4  # in a round
LEVEL_FAILURES, LEVEL_GAIN = 60, 1e-6  # tries in a row that end the levelling of memory; part of the norm that counts
FITS = 1e-12  # overflow below this is rounding


@dataclass
class Found:
    """The best plan so far: `placed` by unit, and how it came about. `preferred_ms`: the score, and the churn."""

    placed: tuple[Placed, ...] | None = None
    score_ms: float = math.inf
    preferred_ms: float = math.inf
    overflow: float = math.inf
    from_start: str = ""
    num_rounds: int = 0
    cut_short: bool = False
    seconds_to_best: float = 0.0
    history: list[tuple[float, float]] = field(default_factory=list)  # (seconds, score) at each gain

    @property
    def fits(self) -> bool:
        return self.overflow <= FITS

    def is_better(self, overflow: float, preferred_ms: float) -> bool:
        overflow = 0.0 if overflow <= FITS else overflow
        return (overflow, preferred_ms) < (0.0 if self.fits else self.overflow, self.preferred_ms * (1 - 1e-12))


class Search:
    """`progress(part done, found)` is called between rounds."""

    def __init__(
        self,
        problem: Problem,
        totals: ChoiceTotals,
        bound: Bound,
        seed: int,
        seconds: float,
        progress: Callable[[float, Found], None] | None = None,
    ) -> None:
        self.problem, self.totals, self.bound = problem, totals, bound
        self.rng = np.random.default_rng(seed)
        self.started = time.monotonic()
        self.deadline = self.started + seconds
        self.progress = progress
        self.found = Found()
        self._fits_N = (totals.worst_bytes_N2 <= problem.capacity).all(axis=1)
        self._cheapest_U = cheapest_choices(totals, self._fits_N, np.zeros(3))
        self._swapper = Swapper(problem) if problem.churn is None else None
        self._freedom_U = np.array([self._freedom(unit) for unit in problem.units])
        wanted_bytes = float(totals.bytes_N2[self._cheapest_U, 0].sum())
        self._is_short_of_memory = wanted_bytes > SHORT_OF_MEMORY * problem.capacity[0] * problem.num_ranks

    def run(self, num_rounds: int) -> Found:
        packings = []
        for name, packing in self._starts():
            self._note(packing, name)
            packings.append((packing.preferred_ms + packing.overflow * self._scale(), len(packings), name, packing))
            if self.found.cut_short:
                break
        if not packings:
            return self.found
        # What does not fit by little may still be the better start; but the one that comes nearest to fitting is tried too.
        packings.sort(key=lambda entry: entry[:2])
        legs = packings[: int(np.clip(UNITS_IN_LEGS // len(self.problem.units), 1, MOST_LEGS))]
        nearest = min(packings, key=lambda entry: (entry[-1].overflow, entry[:2]))
        if not self.found.fits and nearest not in legs:
            legs = [nearest, *legs[: MOST_LEGS - 1]]
        for i, (*_, name, packing) in enumerate(legs):
            if self._over():
                break
            self._improve(packing, name, num_rounds // len(legs), i * (num_rounds // len(legs)), num_rounds)
        for _ in range(MORE_WHILE_TOO_FULL):
            if self.found.fits or self._over():
                break
            self._improve(nearest[-1], nearest[-2], num_rounds, num_rounds, num_rounds)
        self._level_memory()
        return self.found

    def _over(self) -> bool:
        if self.found.fits and self.found.preferred_ms <= self.bound.ms * (1 + CLOSE_ENOUGH):
            return True
        if time.monotonic() > self.deadline:
            self.found.cut_short = True
            return True
        return False

    def _note(self, packing: Packing, name: str) -> None:
        overflow, preferred_ms = packing.overflow, packing.preferred_ms
        if self.found.is_better(overflow, preferred_ms):
            found = self.found
            found.placed, found.score_ms, found.from_start = tuple(packing.placed), packing.score_ms, name
            found.overflow, found.preferred_ms = overflow, preferred_ms
            found.seconds_to_best = time.monotonic() - self.started
            found.history.append((found.seconds_to_best, found.score_ms))

    # ---------------------------------------------------------------- starts
    def _starts(self) -> Iterator[tuple[str, Packing]]:
        """The plan to stay close to; our own choices, each only once; then what of TorchRec's plans is better than all of these."""
        if (previous := self._previous()) is not None:
            yield "the plan to stay close to", self._packing(previous)
        seen: set[bytes] = set()
        most = max(LEAST_STARTS, MOST_STARTED // len(self.problem.units))
        for name, chosen in islice(chain(self._priced(), [("all open", None)]), most):
            if self._over() or (self.found.fits and self.found.preferred_ms <= self.bound.ms * (1 + CLOSE_START)):
                break
            key = b"" if chosen is None else chosen.tobytes()
            if key in seen:
                continue
            seen.add(key)
            packing = self._pack(None if chosen is None else chosen - self.totals.start_U)
            if packing is not None:
                yield name, packing
        beat_ms = lambda: self.found.preferred_ms if self.found.fits else math.inf  # noqa: E731
        for name, placed in torchrec_plans(self.problem, self.totals, beat_ms):
            yield name, self._packing(placed)

    def _previous(self) -> list[Placed] | None:
        """None: there is none, or it has a table in a way that this request leaves out, or rules on places."""
        churn, previous = self.problem.churn, []
        for unit in self.problem.units if churn is not None else ():
            options, places = tuple(churn.option[table] for table in unit.tables), churn.places[unit.tables[0]]
            choice = next((i for i, c in enumerate(unit.choices) if c.options == options), None)
            if choice is None or not movable(unit):  # a rule may have come since
                return None
            previous.append(Placed(choice, places))
        return previous or None

    def _priced(self) -> Iterator[tuple[str, np.ndarray]]:
        """The cheapest choices under targets, at the prices of the bound, of less memory and of less common load."""
        totals = self.totals
        on_target = (
            (f"target x{t:g}", self._fits_N & (totals.worst_ms_N <= t * self.bound.ms), self.bound.price_3)
            for t in TARGETS
        )
        for name, allowed_N, price_3 in chain(self._less_memory(), self._common_loads(), on_target):
            chosen = cheapest_choices(totals, allowed_N, price_3)
            if self._is_short_of_memory:
                chosen = cheapest_choices(totals, allowed_N & self._fits_beside(chosen), price_3)
            yield name, chosen

    def _fits_beside(self, chosen: np.ndarray) -> np.ndarray:
        """(N,) bool: what lies on a rank or host has room there beside what of `chosen` lies on all of them."""
        on_all_N = self.totals.common_ms_N > 0
        common_bytes = self.totals.worst_bytes_N2[chosen[on_all_N[chosen]]].sum(axis=0)
        return on_all_N | (self.totals.worst_bytes_N2 <= self.problem.capacity - common_bytes).all(axis=1)

    def _less_memory(self) -> Iterator[tuple[str, np.ndarray, np.ndarray]]:
        """As if ranks had less memory, so that blocks still fit when what is left of it is scattered."""
        for target in TARGETS if self._is_short_of_memory else ():
            allowed_N = self._fits_N & (self.totals.worst_ms_N <= target * self.bound.ms)
            for part in MEMORY_PARTS:
                smaller = replace(self.problem, capacity=self.problem.capacity * part)
                value, price_3 = best_mean(smaller, self.totals, allowed_N)
                if value < math.inf:
                    yield f"target x{target:g}, memory x{part:g}", allowed_N, price_3

    def _common_loads(self) -> Iterator[tuple[str, np.ndarray, np.ndarray]]:
        """Less than the cheapest load on all ranks, so that what is large on one rank has room beside it."""
        totals = self.totals
        common_ms = float(totals.common_ms_N[self._cheapest_U].sum())
        for target in TARGETS[:3] if common_ms > CLOSE_ENOUGH * self.bound.ms else ():
            for part in COMMON_PARTS:
                room_ms = target * self.bound.ms - part * common_ms
                allowed_N = self._fits_N & ((totals.worst_ms_N <= room_ms) | (totals.common_ms_N > 0))
                value, price_3 = best_mean(self.problem, totals, allowed_N, common_ms=max(part * common_ms, 1e-9))
                if value < math.inf:
                    yield f"target x{target:g}, common load x{part:g}", allowed_N, price_3

    def _pack(self, chosen_U: np.ndarray | None) -> Packing | None:
        """None: some unit found no place that its rules allow."""
        problem, totals = self.problem, self.totals
        packing = self._packing()
        if chosen_U is None:
            at_N = cheapest_choices(totals, np.ones(len(totals.ms_N), dtype=bool), self.bound.price_3)
        else:
            at_N = totals.start_U + chosen_U
        room = np.maximum(problem.capacity, 1.0)
        size_U = np.maximum(totals.worst_ms_N[at_N] / self._scale(), (totals.worst_bytes_N2[at_N] / room).max(axis=1))
        on_all_U = np.array(
            [u.choices[c].scope == "all" for u, c in zip(problem.units, at_N - totals.start_U, strict=True)]
        )
        for unit in np.lexsort((-size_U, ~on_all_U, self._freedom_U)).tolist():
            fit = packing.best(unit) if chosen_U is None else packing.best_place(unit, int(chosen_U[unit]))
            if fit is None:
                return None
            packing.put(unit, fit[1])
        return packing

    def _packing(self, placed: Iterable[Placed] = (), balance_bytes: bool | None = None) -> Packing:
        balance_bytes = self._is_short_of_memory if balance_bytes is None else balance_bytes
        packing = Packing(self.problem, self._scale(), JUDGE_DOUBLINGS, balance_bytes)
        for unit, place in enumerate(placed):
            packing.put(unit, place)
        return packing

    def _freedom(self, unit: Unit) -> int:
        """Ranks that its rules leave a unit: those with the fewest are placed first. All of them: as many as there are units."""
        if all(choice.places is not None for choice in unit.choices):
            return 0
        ruled = not unit.allowed_R.all() or unit.apart_from
        return int(unit.allowed_R.sum()) if ruled else self.problem.num_ranks + 1

    def _scale(self) -> float:
        return self.bound.ms if self.bound.ms > 0 else 1.0

    # ---------------------------------------------------------------- improvement
    def _improve(self, packing: Packing, name: str, num_rounds: int, done: int, of: int) -> None:
        """Record-to-record travel: a plan is gone on from while it is not far above the best of this start, less and less far."""
        packing.weigh_bytes(1.0 if packing.overflow > FITS else BYTES_WEIGHT)
        packing.sharpen(JUDGE_DOUBLINGS)
        least, least_placed = packing.smooth, list(packing.placed)
        at_least, last_gain = True, 0
        for round_ in range(num_rounds):
            if self._over() or round_ - last_gain > max(STALE_ROUNDS, STALE_PART * num_rounds):
                return
            slack = MOST_SLACK * (1 - round_ / num_rounds) ** 2
            if round_ % (num_rounds // NUM_RETURNS + 1) == 0 and not at_least:
                packing.become(least_placed)
                at_least = True
            saved, before = packing.save(), list(packing.placed)
            smooth = math.inf
            if self._reinsert(packing, self._neighbourhood(packing)):
                if packing.smooth <= least * (1 + slack):
                    self._swap(packing)
                smooth = packing.smooth
            if smooth <= least * (1 + slack):
                at_least = smooth <= least
                if smooth < least:
                    last_gain = round_ if smooth < least * (1 - STALE_GAIN) else last_gain
                    least, least_placed = smooth, list(packing.placed)
                self._note(packing, name)
            else:
                packing.restore(saved, before)
            self.found.num_rounds += 1
            if self.progress is not None and round_ % 16 == 0:
                self.progress((done + round_) / of, self.found)

    def _reinsert(self, packing: Packing, units: list[int]) -> bool:
        """Takes units out and puts them back; False: some unit found no place."""
        for unit in units:
            packing.take(unit)
        packing.sharpen(int(self.rng.integers(*INSERT_DOUBLINGS)))
        placed = self._put_back(packing, units)
        packing.sharpen(JUDGE_DOUBLINGS)
        return placed

    def _swap(self, packing: Packing) -> None:
        if self._swapper is not None:
            self._swapper.swap_down(packing, MOST_SWAPS)

    def _level_memory(self) -> None:
        """Where time allows several places, the one with more memory left: the fullest rank's memory goes down, the score not up."""
        found, problem = self.found, self.problem
        if not found.fits or self._is_short_of_memory or problem.num_ranks == 1 or problem.churn is not None:
            return
        packing = self._packing(found.placed, balance_bytes=True)
        limit_ms, failures = max(found.score_ms, packing.score_ms), 0
        limit_host_bytes = float(packing.use_KR[-1].sum()) * (1 + FITS)  # nothing moves there only to be level
        while failures < LEVEL_FAILURES and time.monotonic() < self.deadline:
            saved, before, was = packing.save(), list(packing.placed), packing.bytes_norm
            fullest, emptiest = (
                int(packing.use_KR[problem.num_channels].argmax()),
                int(packing.use_KR[problem.num_channels].argmin()),
            )
            weights_N = self.totals.worst_bytes_N2[:, 0]
            units = {*self._drawn(packing, fullest, 1, weights_N), *self._drawn(packing, emptiest, 1, weights_N)}
            units.add(int(self.rng.integers(len(problem.units))))
            placed = self._reinsert(packing, sorted(units))
            if (
                placed
                and packing.score_ms <= limit_ms
                and packing.overflow <= FITS
                and packing.use_KR[-1].sum() <= limit_host_bytes
                and packing.bytes_norm < was * (1 - LEVEL_GAIN)
            ):
                failures = 0
            else:
                packing.restore(saved, before)
                failures += 1
        found.placed, found.score_ms = tuple(packing.placed), min(found.score_ms, packing.score_ms)

    def _neighbourhood(self, packing: Packing) -> list[int]:
        """Units to take out: about half from a busy rank (or one that holds too much), the others from anywhere."""
        C, rng = self.problem.num_channels, self.rng
        num = min(len(self.problem.units), 1 + int(rng.geometric(REMOVED)))
        too_full = packing.overflow > FITS
        if too_full:
            pressed, idle = int(packing.over_R.argmax()), int(packing.use_KR[C].argmin())
        else:
            channel_ms = np.maximum(packing.use_KR[:C].max(axis=1), 0)  # what was taken out again leaves rounding
            channel = int(rng.choice(C, p=channel_ms / channel_ms.sum())) if C > 1 else 0
            pressed, idle = int(packing.use_KR[channel].argmax()), int(packing.use_KR[:C].sum(axis=0).argmin())
        taken_N = self.totals.worst_bytes_N2[:, 0] if too_full else self.totals.worst_ms_N
        picked = set(self._drawn(packing, pressed, (num + 1) // 2, taken_N))
        if rng.random() < 0.5:
            picked |= set(self._drawn(packing, idle, num // 2, taken_N))
        while len(picked) < num:
            picked.add(int(rng.integers(len(self.problem.units))))
        return sorted(picked)

    def _drawn(self, packing: Packing, rank: int, count: int, taken_N: np.ndarray) -> list[int]:
        """Units on a rank, each as likely as its share of what `taken_N` counts."""
        there = np.array(sorted(packing.on_rank[rank]), dtype=int)
        if len(there) <= count:
            return there.tolist()
        weight = taken_N[self.totals.start_U[there] + [packing.placed[u].choice for u in there]]
        weight = weight + 1e-9 * (weight.max() + 1e-30)
        return self.rng.choice(there, size=count, replace=False, p=weight / weight.sum()).tolist()

    def _put_back(self, packing: Packing, units: list[int]) -> bool:
        """Largest first, roughly; some in a choice that greed would not take. False: one took the last place of another."""
        size = self.totals.ms_N[self.totals.start_U[units]] * np.exp(self.rng.normal(scale=0.7, size=len(units)))
        order = [units[i] for i in np.argsort(-size)]
        for unit in order:
            if self.rng.random() < (FORCED_FIRST if unit == order[0] else FORCED):
                fit = packing.best_place(unit, int(self.rng.integers(len(self.problem.units[unit].choices))))
                fit = fit or packing.best(unit)
            else:
                fit = packing.best(unit)
            if fit is None:
                return False
            packing.put(unit, fit[1])
        return True

"""Searches on the predictor: fit to what was told, propose by virtual launches, launch the few that promise most.

searcher = PredictorSearcher(featuriser, seed=0, proposer="evolution", budget=20)
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from dlrm_scale.config import RunConfig
from dlrm_scale.tuning.features import FeatureTable
from dlrm_scale.tuning.featurise import Featuriser, record_features, workload_of
from dlrm_scale.tuning.knobs import Point
from dlrm_scale.tuning.plans import Plans
from dlrm_scale.tuning.predictor import Measured, NeuralPredictor, Prediction, Predictor
from dlrm_scale.tuning.proposers import PROPOSERS
from dlrm_scale.tuning.records import Record
from dlrm_scale.tuning.searcher import TellingSearcher, digest

NUM_INITIAL = 5  # launches before the predictor has a say: the analytic model's best, then points far from each other
INITIAL_POOL = 128
POOL = 200  # best proposals that launches are chosen from
FEW_LEFT = 6  # launches: from here on a batch is chosen of all that are left
CAUTION = 1.0  # deviations below the mean that a virtual launch counts with
MANY_STARTS = 8
OWN_GROUP = 0


@dataclass(frozen=True)
class KnownRuns:
    """Runs that were measured before this search. Those of this search's workload have group OWN_GROUP."""

    table: FeatureTable
    measured: Measured


def known_runs(records: Sequence[Record], plans: Plans, own: RunConfig | None = None) -> KnownRuns:
    """Of records that are usable here (see `History.split`); runs that failed say nothing and are left out. `own`: a configuration
    of the workload that is searched, if one is."""
    told = [record for record in records if record.outcome != "failed"]
    groups = {} if own is None else {workload_of(own): OWN_GROUP}
    group_N = np.array([groups.setdefault(workload_of(r.job.config), len(groups)) for r in told], dtype=int)
    step_ms_N, fits_N = np.array([r.step_ms for r in told]), np.array([r.outcome == "ok" for r in told], dtype=bool)
    return KnownRuns(record_features(told, plans), Measured(step_ms_N, fits_N, group_N))


class PredictorSearcher(TellingSearcher):
    """
    Args:
        budget: launches in all, if known; the last ones are then chosen together.
        history: runs to learn from beside those told.
    """

    def __init__(
        self,
        featuriser: Featuriser,
        seed: int,
        proposer: Literal["reinforce", "evolution"] = "evolution",
        budget: int | None = None,
        history: KnownRuns | None = None,
        make_predictor: Callable[[int], Predictor] = NeuralPredictor,
    ) -> None:
        super().__init__(featuriser, seed)
        self.kind, self.propose, self.budget, self.history = proposer, PROPOSERS[proposer], budget, history
        self.make_predictor = make_predictor

    def identity(self) -> dict[str, Any]:
        known = None if self.history is None else digest(self.history.measured.step_ms_N)
        return {**super().identity(), "budget": self.budget, "history": known}

    def choose(self, k: int) -> list[Point]:
        timed = sum(result.outcome == "ok" for _, result in self.told)
        asked = len(self.told) + len(self.pending)
        if self.history is None and (asked < NUM_INITIAL or not timed):
            return self._initial(k)
        predictor = self.predictor()
        used = self.used
        score = _Score(self.featuriser, predictor, self.allows)
        proposed = self.propose(self.space, score, self._starts(), self.rng)
        order = sorted((s, i) for i, (point, s) in enumerate(proposed.items()) if point not in used and np.isfinite(s))
        points = list(proposed)
        pool = [points[i] for _, i in order[:POOL]]
        left = k if self.budget is None else max(k, self.budget - asked)
        size = left if left <= max(k, FEW_LEFT) else k
        chosen = self._batch(pool, predictor, size)
        if size > k:  # one part of a batch that is best together: of it, those that are best alone
            cost = self._cost(self._predict(predictor, chosen), chosen)
            chosen = [chosen[i] for i in np.argsort(cost, kind="stable")[:k].tolist()]
        return chosen + ([] if len(chosen) == k else self._others(k - len(chosen), chosen))

    def predictor(self) -> Predictor:
        """Fitted to history and all that was told; a failed run says nothing of time or memory and is left out."""
        told = [(point, result) for point, result in self.told if result.outcome != "failed"]
        parts = [] if self.history is None else [(self.history.table, self.history.measured)]
        if told:
            step_ms = np.array([np.nan if r.step_ms is None else r.step_ms for _, r in told])
            fits = np.array([r.outcome == "ok" for _, r in told])
            table = self.featuriser([point for point, _ in told]).table
            parts.append((table, Measured(step_ms, fits, np.full(len(told), OWN_GROUP))))
        predictor = self.make_predictor(self.seed)
        if parts:
            joined = (np.concatenate(arrays) for arrays in zip(*(_arrays(m) for _, m in parts), strict=True))
            predictor.fit(FeatureTable.join([table for table, _ in parts]), Measured(*joined))
        return predictor

    def _initial(self, k: int) -> list[Point]:
        """The analytic model's best of a random pool, unless there is one already, and points of its better half far from others."""
        pool = self._emptier(self.fresh(INITIAL_POOL))
        if not pool:
            return []
        table = self.featuriser(pool).table
        order = np.argsort(table.analytic_ms_N / table.global_batch_N, kind="stable").tolist()
        better = [pool[i] for i in order[: max(k, len(pool) // 2)]]
        chosen = [] if self.used else better[:1]
        while len(chosen) < min(k, len(better)):
            others = [*chosen, *self.used]
            rest = [point for point in better if point not in chosen]
            chosen.append(max(rest, key=lambda point: min(_distance(point, other) for other in others)))
        return chosen

    def _emptier(self, pool: list[Point]) -> list[Point]:
        """Once something did not fit: points that take less memory by the planner's count, and while nothing ever fitted, the emptier
        half of those."""
        misfits = [point for point, result in self.told if result.outcome == "does not fit"]
        if not misfits or not pool:
            return pool
        fill_N = self.featuriser(pool).table.fill_N3.sum(1)
        most = float(self.featuriser(misfits).table.fill_N3.sum(1).min())
        if (fill_N < most).any() and not self._starts():
            most = float(np.median(fill_N[fill_N < most]))
        return [pool[i] for i in np.flatnonzero(fill_N <= max(most, fill_N.min())).tolist()]

    def _starts(self) -> list[Point]:
        """The best runs told, each once."""
        timed = [(point, result.step_ms) for point, result in self.told if result.step_ms is not None]
        if not timed:
            return []
        batch_N = self.featuriser([point for point, _ in timed]).table.global_batch_N
        cost = np.array([ms for _, ms in timed]) / batch_N
        return list(dict.fromkeys(timed[i][0] for i in np.argsort(cost, kind="stable").tolist()))[:MANY_STARTS]

    def _predict(self, predictor: Predictor, points: Sequence[Point]) -> Prediction:
        return predictor.predict(self.featuriser(points).table)

    def _cost(self, prediction: Prediction, points: Sequence[Point]) -> np.ndarray:
        return prediction.log_ms_N - np.log(self.featuriser(points).table.global_batch_N)

    def _batch(self, pool: list[Point], predictor: Predictor, size: int) -> list[Point]:
        """Greedily, what raises the expected gain of the best of the batch most: each member of the ensemble is one way the truth may
        be. So points that would win in the same case are not taken twice; and of two taken, at least two knobs differ where
        the pool has such.
        """
        if not pool:
            return []
        prediction = self._predict(predictor, pool)
        mean_P = self._cost(prediction, pool)
        cost_MP = prediction.log_ms_MN - prediction.log_ms_N + mean_P
        best = self.best_cost
        best_M = np.full(len(cost_MP), mean_P.min() + 0.1 if best is None else np.log(best))
        free, chosen = np.ones(len(pool), dtype=bool), []
        while len(chosen) < min(size, len(pool)):
            gain_P = np.maximum(best_M[:, None] - cost_MP, 0).mean(0) * prediction.fits_N
            gain_P -= 1e-6 * mean_P  # no gain in sight: the fastest
            far = np.array([all(_distance(p, pool[c]) > 1 for c in chosen) for p in pool])
            allowed = free & far if (free & far).any() else free
            pick = int(np.where(allowed, gain_P, -np.inf).argmax())
            chosen.append(pick)
            free[pick] = False
            best_M = np.minimum(best_M, cost_MP[:, pick])
        return [pool[i] for i in chosen]

    def _others(self, k: int, chosen: list[Point]) -> list[Point]:
        """Random ones, where too few proposals were new."""
        self.pending += chosen
        others = self.fresh(k)
        self.pending = self.pending[: len(self.pending) - len(chosen)]
        return others


class _Score:
    """Log of milliseconds a sample, less its uncertainty, more for what may not fit."""

    def __init__(self, featuriser: Featuriser, predictor: Predictor, allows: Callable[[Point], bool]) -> None:
        self.featuriser, self.predictor, self.allows = featuriser, predictor, allows

    def __call__(self, points: Sequence[Point]) -> np.ndarray:
        candidates = self.featuriser(points)
        prediction = self.predictor.predict(candidates.table)
        cost_N = prediction.log_ms_N - np.log(candidates.table.global_batch_N) - CAUTION * prediction.spread_N
        scores_N = cost_N - np.log(np.maximum(prediction.fits_N, 1e-6))
        allowed_N = np.array([self.allows(point) for point in points], dtype=bool)
        return np.where(candidates.table.feasible_N & allowed_N, scores_N, np.inf)


def _arrays(measured: Measured) -> tuple[np.ndarray, ...]:
    return measured.step_ms_N, measured.fits_N, measured.group_N


def _distance(one: Point, other: Point) -> int:
    """How many knobs differ; one that only one of them has counts."""
    return sum(one.get(name) != other.get(name) for name in {**one, **other})

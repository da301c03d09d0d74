"""What our searchers are held against: the planner's model alone, and Optuna's TPE."""

import warnings
from typing import Any

import numpy as np

from dlrm_scale.tuning.featurise import Featuriser
from dlrm_scale.tuning.knobs import Point
from dlrm_scale.tuning.searcher import Result, TellingSearcher

MISSES = 8  # draws in a row that were known already, before a random point stands in
ENUMERATED = 20_000  # points; of a larger space a sample is ranked


class AnalyticSearcher(TellingSearcher):
    """Launches in the order of the analytic model's milliseconds a sample, whatever comes back."""

    kind = "planner alone"

    def __init__(self, featuriser: Featuriser, seed: int) -> None:
        super().__init__(featuriser, seed)
        small = self.space.size <= ENUMERATED
        points = list(self.space.enumerate()) if small else [self.space.sample(self.rng) for _ in range(ENUMERATED)]
        points = list(dict.fromkeys(points))
        candidates = featuriser(points)
        cost = candidates.table.analytic_ms_N / candidates.table.global_batch_N
        order = np.lexsort((self.rng.random(len(points)), cost))  # equals in random order
        self.ranked = [points[i] for i in order.tolist() if i not in candidates.reasons]

    def choose(self, k: int) -> list[Point]:
        used = self.used
        return [point for point in self.ranked if point not in used][:k]


class TPESearcher(TellingSearcher):
    """Optuna's TPE: multivariate, grouped by condition, with what does not fit as a broken constraint.

    What the planner refuses is told as such at once and costs no launch, as for the others. Its state is what it was told: a restored
    one learns from that, but is no exact continuation.
    """

    kind = "tpe"

    def __init__(self, featuriser: Featuriser, seed: int) -> None:
        import optuna

        super().__init__(featuriser, seed)
        optuna.logging.set_verbosity(optuna.logging.ERROR)
        with warnings.catch_warnings():
            warnings.simplefilter(
                "ignore", optuna.exceptions.ExperimentalWarning
            )  # what `group` and `constant_liar` are
            sampler = optuna.samplers.TPESampler(seed=seed, multivariate=True, group=True, constant_liar=True)
        self.study, self.trials = optuna.create_study(sampler=sampler), {}

    def choose(self, k: int) -> list[Point]:
        chosen: list[Point] = []
        misses = 0
        while len(chosen) < k and misses < MISSES:
            trial = self.study.ask()
            point = self._suggested(trial)
            misses += 1
            if self.featuriser([point]).reasons:
                self._finish(trial, 1e9, broken=True)
            elif point in self.used or point in chosen:
                known = [r.step_ms for p, r in self.told if p == point and r.step_ms is not None]
                self._finish(trial, np.log(known[0] / self._batch(point)) if known else 1e9, broken=not known)
            else:
                self.trials[point] = trial
                chosen.append(point)
                misses = 0
        return chosen + [point for point in self.fresh(k) if point not in chosen][: k - len(chosen)]

    def tell(self, point: Point, result: Result) -> None:
        super().tell(point, result)
        trial = self.trials.pop(point, None)
        if trial is None:  # a point that it did not draw itself: told as if it had
            self.study.enqueue_trial(self._parameters(point))
            trial = self.study.ask()
            self._suggested(trial)
        cost = 1e9 if result.step_ms is None else float(np.log(result.step_ms / self._batch(point)))
        self._finish(trial, cost, broken=result.step_ms is None)

    def _parameters(self, point: Point) -> dict[str, Any]:
        choices = self.space.choices
        return {name: choices[name].index(value) if self._is_ordered(name) else value for name, value in point.items()}

    def _is_ordered(self, name: str) -> bool:
        return self.space.knobs[name].kind in ("integer", "log_float")

    def _finish(self, trial: Any, cost: float, broken: bool) -> None:
        trial.set_constraint("fits", 1.0 if broken else -1.0)  # broken above 0
        self.study.tell(trial, float(cost))

    def _batch(self, point: Point) -> float:
        return float(self.featuriser([point]).table.global_batch_N[0])

    def _suggested(self, trial: Any) -> Point:
        """Ordered knobs by the index of their value, so that neighbours are near; the others as categories."""
        kept: dict[str, Any] = {}
        for name, choices in self.space.choices.items():
            if not self.space.is_active(name, kept):
                continue
            if self._is_ordered(name):
                kept[name] = choices[trial.suggest_int(name, 0, len(choices) - 1)]
            else:
                kept[name] = trial.suggest_categorical(name, list(choices))
        return Point(kept)

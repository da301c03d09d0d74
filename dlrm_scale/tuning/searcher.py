"""Searchers: which points to launch next. One interface, seeded, saved as JSON between launches.

    for point in searcher.ask(k):
        searcher.tell(point, result)

The same space, seed and results give the same points, also when the state went through a file in between.
"""

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, Protocol

import numpy as np

from dlrm_scale.errors import ConfigError
from dlrm_scale.tuning.featurise import Featuriser
from dlrm_scale.tuning.knobs import Point
from dlrm_scale.tuning.records import OUTCOMES, Outcome

DRAWS = 64  # for each point asked for, before a space counts as used up


@dataclass(frozen=True)
class Result:
    """What became of a launch. Raises ConfigError: ok without a step time, or another outcome than those."""

    outcome: Outcome
    step_ms: float | None = None
    reason: str = ""

    def __post_init__(self) -> None:
        if self.outcome not in OUTCOMES:
            raise ConfigError(f"outcome is {self.outcome!r}, but must be one of {', '.join(OUTCOMES)}")
        if (self.outcome == "ok") != (self.step_ms is not None and 0 < self.step_ms < float("inf")):
            raise ConfigError(
                f"an outcome of ok comes with a step time above 0 and any other with none, but this is {self.outcome} with {self.step_ms}; "
                "a run without a time is failed, with its reason"
            )


class Searcher(Protocol):
    def ask(self, k: int) -> list[Point]:
        """k distinct points that were not asked for or told before and that the planner has a plan for; fewer, or none, where
        the space has no more."""
        ...

    def tell(self, point: Point, result: Result) -> None:
        """Of any point of the space, asked for or not; a point may be told again."""
        ...

    def state(self) -> dict[str, Any]:
        """All that `restore` needs, as JSON."""
        ...

    def restore(self, state: dict[str, Any]) -> None:
        """Raises ConfigError: the state of another kind of searcher, or of another space, seed, budget or history."""
        ...


class TellingSearcher(ABC):
    """What all of ours share: what was told, what is under way, and the state.

    Attributes:
        told: in order.
        pending: asked for and not told.
        allows: whether a point may be launched; what was told of others still teaches. Not part of the state.
    """

    kind = ""

    def __init__(self, featuriser: Featuriser, seed: int) -> None:
        self.featuriser, self.space, self.seed = featuriser, featuriser.space, seed
        self.rng = np.random.default_rng(seed)
        self.told: list[tuple[Point, Result]] = []
        self.pending: list[Point] = []
        self.allows: Callable[[Point], bool] = lambda point: True

    def ask(self, k: int) -> list[Point]:
        if k < 1:
            raise ConfigError(f"a searcher is asked for 1 point or more, not {k}")
        points = self.choose(k)
        self.pending += points
        return points

    @abstractmethod
    def choose(self, k: int) -> list[Point]:
        """Points to launch next, none of which was told or is under way."""

    def tell(self, point: Point, result: Result) -> None:
        self.told.append((self.space.point(point), result))
        if point in self.pending:
            self.pending.remove(point)

    @property
    def used(self) -> set[Point]:
        return {point for point, _ in self.told} | set(self.pending)

    @property
    def best_cost(self) -> float | None:
        """Milliseconds a sample of the fastest run told of points that are allowed; None before one was ok."""
        costs = [
            r.step_ms / self.featuriser([p]).table.global_batch_N[0]
            for p, r in self.told
            if r.step_ms is not None and self.allows(p)
        ]
        return min(costs) if costs else None

    def fresh(self, count: int) -> list[Point]:
        """Random points that are not used and that have a plan."""
        found: dict[Point, None] = {}
        used = self.used
        if self.space.size <= count * DRAWS:
            rest = [point for point in self.space.enumerate() if point not in used]
            draws = [rest[i] for i in self.rng.permutation(len(rest)).tolist()]
        else:
            draws = [self.space.sample(self.rng) for _ in range(count * DRAWS)]
        for point in draws:
            if len(found) == count:
                break
            known = point in used or point in found
            if not known and self.allows(point) and not self.featuriser([point]).reasons:
                found[point] = None
        return list(found)

    def identity(self) -> dict[str, Any]:
        """What a state must agree in."""
        return {"kind": self.kind, "space": self.space.fingerprint, "seed": self.seed}

    def state(self) -> dict[str, Any]:
        return {
            **self.identity(),
            "rng": self.rng.bit_generator.state,
            "told": [[dict(point), asdict(result)] for point, result in self.told],
            "pending": [dict(point) for point in self.pending],
        }

    def restore(self, state: dict[str, Any]) -> None:
        mine = self.identity()
        wrong = [
            f"{key} is {state.get(key)} there, {value} here" for key, value in mine.items() if state.get(key) != value
        ]
        if wrong:
            raise ConfigError(
                f"the saved search is another one: {'; '.join(wrong)}; go on with its settings, or start anew"
            )
        self.rng.bit_generator.state = state["rng"]
        self.told = [(self.space.point(point), Result(**result)) for point, result in state["told"]]
        self.pending = [self.space.point(point) for point in state["pending"]]


class RandomSearcher(TellingSearcher):
    kind = "random"

    def choose(self, k: int) -> list[Point]:
        return self.fresh(k)


def digest(*arrays: np.ndarray) -> str:
    """12 hex digits of numbers."""
    return hashlib.sha256(json.dumps([a.tolist() for a in arrays]).encode()).hexdigest()[:12]

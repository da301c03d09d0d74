"""Times several things in turn, round after round, so that whatever else the machine does falls on all of them alike."""

import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np

LEAST_ROUNDS = 3
Key = TypeVar("Key", bound=Hashable)


@dataclass(frozen=True)
class Case:
    """What to time. A call too short for the clock is timed `calls_per_sample` times over.

    Attributes:
        finish: waits for what the calls left under way, as `torch.cuda.synchronize` does; it is inside the time.
    """

    call: Callable[[], Any]
    calls_per_sample: int = 1
    finish: Callable[[], Any] = lambda: None


@dataclass(frozen=True)
class Spread:
    median: float
    p10: float
    p90: float


def spread(samples: Sequence[float]) -> Spread:
    p10, median, p90 = np.percentile(samples, (10, 50, 90)).tolist()
    return Spread(median, p10, p90)


def time_interleaved(
    cases: Mapping[Key, Case],
    seconds: float,
    align: Callable[[], Any] = lambda: None,
    agree: Callable[[bool], bool] = lambda go_on: go_on,
    tell: Callable[[int, float], Any] = lambda num_rounds, elapsed_seconds: None,
) -> dict[Key, list[float]]:
    """Seconds of one call, one sample a round, by case: as many rounds as begin within `seconds`, at least LEAST_ROUNDS.

    Where several processes time together, `align` makes them begin each sample at once and `agree` gives all of them one
    verdict on another round. A first round is not counted: there memory is first touched and connections are made.
    """
    samples: dict[Key, list[float]] = {key: [] for key in cases}
    num_rounds, started = -1, time.perf_counter()
    while num_rounds < LEAST_ROUNDS or agree(time.perf_counter() - started < seconds):
        for key, case in cases.items():
            align()
            begun = time.perf_counter()
            for _ in range(case.calls_per_sample):
                case.call()
            case.finish()
            if num_rounds >= 0:
                samples[key].append((time.perf_counter() - begun) / case.calls_per_sample)
            tell(max(num_rounds, 0), time.perf_counter() - started)
        num_rounds += 1
    return samples

"""How far two orders agree (Kendall's tau-b), how sure that is, and how far a measurement agrees with itself."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np
from scipy.stats import kendalltau

NUM_RESAMPLES = 1000


@dataclass(frozen=True)
class Agreement:
    """`low` and `high`: the middle 95 % of tau over plans drawn anew from those there are (bootstrap).
    `p_value`: how often values in no order at all agree as far, either way."""

    tau: float
    low: float
    high: float
    p_value: float


def agreement(predicted: Sequence[float], measured: Sequence[float], seed: int) -> Agreement:
    """Both are of the same plans, which are not all alike in either."""
    x, y, rng = np.array(predicted), np.array(measured), np.random.default_rng(seed)
    drawn = rng.integers(len(x), size=(NUM_RESAMPLES, len(x)))
    taus = np.array([kendalltau(x[i], y[i]).statistic for i in drawn])
    found = kendalltau(x, y)
    # of few plans, some draws hold one plan only, which has no order
    low, high = np.nanpercentile(taus, (2.5, 97.5)).tolist()
    return Agreement(float(found.statistic), low, high, float(found.pvalue))


def repeat_agreement(ms_RP: np.ndarray) -> float:
    """The mean tau between two of R repeats of the same P plans.

    It says how much noise hides of the order, and is no upper bound: a prediction without error comes out above it, since it
    has no noise of its own and is held against the median over repeats.
    """
    return float(np.mean([kendalltau(a, b).statistic for a, b in combinations(ms_RP, 2)]))

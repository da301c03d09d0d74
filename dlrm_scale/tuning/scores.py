"""How good a predictor's decisions are, on runs whose truth is known."""

import math

import numpy as np

from dlrm_scale.tuning.features import FeatureTable
from dlrm_scale.tuning.predictor import Prediction

TOPS = (1, 5, 10)
TOP_PART = 0.1
SCORES = ("tau", "tau_top", *(f"regret_{k}" for k in TOPS), "mape", "coverage", "false_fits")


def scores(prediction: Prediction, table: FeatureTable, step_ms_N: np.ndarray, fits_N: np.ndarray) -> dict[str, float]:
    """`step_ms_N` is NaN where the run does not fit. A score without runs to be of is NaN.

    tau and regret are of milliseconds a sample; tau_top among the truly best 10 %; regret_k: the best of the k that are put
    first (by predicted cost over the chance of fitting) over the best of all, less 1; if none of them fits, the median run stands for it;
    false_fits: of the runs that do not fit, the part expected to.
    """
    cost_N, predicted_N = step_ms_N / table.global_batch_N, prediction.log_ms_N - np.log(table.global_batch_N)
    known = np.flatnonzero(fits_N)
    expected_N = prediction.fits_N >= 0.5
    order = np.argsort(predicted_N - np.log(np.maximum(prediction.fits_N, 1e-9)), kind="stable")
    best, median = cost_N[known].min(), np.median(cost_N[known])
    top = known[np.argsort(cost_N[known])[: max(5, round(TOP_PART * len(known)))]]
    error_N = np.abs(np.exp(prediction.log_ms_N[known]) / step_ms_N[known] - 1)
    low_N, high_N = prediction.interval()
    found = {
        "tau": kendall_tau(predicted_N[known], cost_N[known]),
        "tau_top": kendall_tau(predicted_N[top], cost_N[top]),
        "mape": error_N.mean(),
        "coverage": ((low_N <= step_ms_N) & (step_ms_N <= high_N))[known].mean(),
        "false_fits": expected_N[~fits_N].mean() if (~fits_N).any() else np.nan,
    }
    for k in TOPS:
        first = cost_N[order[:k]]
        found[f"regret_{k}"] = (median if np.isnan(first).all() else np.nanmin(first)) / best - 1
    return {name: float(found[name]) for name in SCORES}


def kendall_tau(one_N: np.ndarray, other_N: np.ndarray) -> float:
    """tau-b: of pairs, those in the same order less those in the opposite one; NaN where one side is all ties."""
    same = untied_one = untied_other = 0.0
    for i in range(len(one_N) - 1):  # a row of pairs at a time: all at once would take gigabytes for 10,000 runs
        one, other = np.sign(one_N[i + 1 :] - one_N[i]), np.sign(other_N[i + 1 :] - other_N[i])
        same += float(one @ other)
        untied_one += float(np.abs(one).sum())
        untied_other += float(np.abs(other).sum())
    norm = math.sqrt(untied_one * untied_other)
    return same / norm if norm else math.nan

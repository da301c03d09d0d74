"""The metrics against definitions written out pair by pair, and against closed forms."""

import math

import numpy as np
import pytest

from dlrm_scale.training.metrics import auc, binary_metrics, grouped_auc


def pairwise_auc(scores, labels, weights):
    pairs = in_order = 0.0
    for i in np.flatnonzero(labels > 0):
        for j in np.flatnonzero(labels == 0):
            pairs += weights[i] * weights[j]
            in_order += (
                weights[i] * weights[j] * (1.0 if scores[i] > scores[j] else 0.5 if scores[i] == scores[j] else 0.0)
            )
    return in_order / pairs if pairs else math.nan


@pytest.fixture
def samples():
    rng = np.random.default_rng(3)
    n = 300
    scores = np.round(rng.normal(size=n), 1)  # rounding makes ties
    labels = (rng.random(n) < 0.3).astype(np.float64)
    return scores, labels, rng.uniform(0.1, 2.0, n), rng.integers(-3, 12, n)


def test_auc_counts_pairs_and_ties(samples):
    scores, labels, weights, _ = samples
    assert auc(scores, labels, weights) == pytest.approx(pairwise_auc(scores, labels, weights), abs=1e-12)


def test_auc_of_one_label_does_not_exist():
    assert math.isnan(auc(np.arange(3.0), np.ones(3), np.ones(3)))


def test_grouped_auc_is_the_weighted_mean_over_groups_with_both_labels(samples):
    scores, labels, weights, groups = samples
    labels = np.where(groups == 5, 1.0, labels)  # group 5 has one label only
    aucs, shares = [], []
    for g in np.unique(groups):
        of = groups == g
        value = pairwise_auc(scores[of], labels[of], weights[of])
        if not math.isnan(value):
            aucs.append(value)
            shares.append(weights[of].sum())
    assert 5 in groups and len(aucs) == len(np.unique(groups)) - 1
    assert grouped_auc(scores, labels, weights, groups) == pytest.approx(np.average(aucs, weights=shares), abs=1e-12)


def test_ne_is_one_for_the_base_rate_and_calibration_too():
    labels = np.array([1.0, 0, 0, 0])
    metrics = binary_metrics(np.full(4, math.log(0.25 / 0.75)), labels, np.ones(4), None)
    assert metrics["ne"] == pytest.approx(1.0) and metrics["calibration"] == pytest.approx(1.0)
    assert metrics["auc"] == 0.5 and "gauc" not in metrics


def test_rows_of_weight_zero_do_not_count(samples):
    scores, labels, weights, groups = samples
    padded = binary_metrics(
        np.append(scores, [50.0, -50.0]),
        np.append(labels, [0.0, 1.0]),
        np.append(weights, [0.0, 0.0]),
        np.append(groups, [0, 0]),
    )
    assert padded == binary_metrics(scores, labels, weights, groups)


def test_log_loss_of_extreme_logits_stays_finite():
    metrics = binary_metrics(np.array([800.0, -800.0]), np.array([0.0, 0.0]), np.ones(2), None)
    assert metrics["log_loss"] == pytest.approx(400.0) and math.isnan(metrics["ne"])


def test_no_sample_gives_no_figure():
    metrics = binary_metrics(np.zeros(2), np.zeros(2), np.zeros(2), np.zeros(2, dtype=np.int64))
    assert set(metrics) == {"log_loss", "ne", "auc", "calibration", "base_rate", "gauc"}
    assert all(math.isnan(v) for v in metrics.values())


def test_figures_of_unequal_weights_equal_a_loop_over_samples(samples):
    scores, labels, weights, _ = samples
    logits = scores + 0.7  # predicts far more positives than there are
    losses = positives = predicted = total = 0.0
    for logit, label, weight in zip(logits, labels, weights, strict=True):
        probability = 1 / (1 + math.exp(-logit))
        losses -= weight * math.log(probability if label else 1 - probability)
        positives += weight * label
        predicted += weight * probability
        total += weight
    rate = positives / total
    entropy = -rate * math.log(rate) - (1 - rate) * math.log(1 - rate)
    expected = {
        "log_loss": losses / total,
        "ne": losses / total / entropy,
        "calibration": predicted / positives,
        "base_rate": rate,
    }
    assert expected["calibration"] > 1.5 and abs(rate - labels.mean()) > 1e-3
    metrics = binary_metrics(logits, labels, weights, None)
    assert {name: metrics[name] for name in expected} == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_logit_that_is_no_number_leaves_no_figure(samples, bad):
    scores, labels, weights, groups = samples
    metrics = binary_metrics(
        np.append(scores, bad), np.append(labels, 1.0), np.append(weights, 1.0), np.append(groups, 0)
    )
    assert set(metrics) == {"log_loss", "ne", "auc", "calibration", "base_rate", "gauc"}
    assert all(math.isnan(v) for v in metrics.values())

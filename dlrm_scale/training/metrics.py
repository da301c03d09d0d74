"""NE, log loss, AUC, GAUC and calibration of binary predictions: exact, weighted, in float64.

TorchRec 1.8.0 computes the first ones too, but its grouped AUC fails and its AUC sees only a window; one function for the
training window, the held-out split and the oracle keeps all figures comparable.
"""

import numpy as np


# N samples
def binary_metrics(
    logits_N: np.ndarray, labels_N: np.ndarray, weights_N: np.ndarray, groups_N: np.ndarray | None
) -> dict[str, float]:
    """Metrics of one task; samples of weight 0 do not count.

    Returns: log_loss; ne, the log loss over the entropy of the base rate (He et al. 2014), the base rate that of these very
        samples; auc; gauc, the groups' AUCs averaged with the groups' weights over groups that hold both labels (absent
        without `groups_N`); calibration, the predicted over the actual number of positives; base_rate. A figure that does
        not exist (an AUC of one label only; any, of a logit that is no number) is NaN.
    """
    keep = weights_N > 0
    logits, labels, weights = (np.asarray(a[keep], dtype=np.float64) for a in (logits_N, labels_N, weights_N))
    nan = float("nan")
    if not len(logits) or not np.isfinite(logits).all():
        return dict.fromkeys(
            ("log_loss", "ne", "auc", "calibration", "base_rate") + (("gauc",) if groups_N is not None else ()), nan
        )
    losses = np.logaddexp(0.0, logits) - labels * logits
    log_loss = float(np.average(losses, weights=weights))
    base_rate = float(np.average(labels, weights=weights))
    both = 0 < base_rate < 1
    entropy = -(base_rate * np.log(base_rate) + (1 - base_rate) * np.log1p(-base_rate)) if both else nan
    predicted = float(np.average(np.exp(-np.logaddexp(0.0, -logits)), weights=weights))
    metrics = {
        "log_loss": log_loss,
        "ne": log_loss / entropy,
        "auc": auc(logits, labels, weights),
        "calibration": predicted / base_rate if base_rate > 0 else nan,
        "base_rate": base_rate,
    }
    if groups_N is not None:
        metrics["gauc"] = grouped_auc(logits, labels, weights, groups_N[keep])
    return metrics


def auc(scores_N: np.ndarray, labels_N: np.ndarray, weights_N: np.ndarray) -> float:
    """The weighted share of (positive, negative) pairs that are in order; a tie counts half. NaN without both labels."""
    return grouped_auc(scores_N, labels_N, weights_N, np.zeros(len(scores_N), dtype=np.int64))


def grouped_auc(scores_N: np.ndarray, labels_N: np.ndarray, weights_N: np.ndarray, groups_N: np.ndarray) -> float:
    """The weighted mean over groups of each group's AUC; groups with one label only are left out. NaN if all are.

    A group counts with the sum of its samples' weights (BARS: the number of its samples).
    """
    if not len(scores_N):
        return float("nan")
    order = np.lexsort((scores_N, groups_N))
    scores, groups = scores_N[order], groups_N[order]
    positive = np.where(labels_N[order] > 0, weights_N[order], 0.0)
    negative = np.where(labels_N[order] > 0, 0.0, weights_N[order])
    new_group = np.concatenate(([True], groups[1:] != groups[:-1]))
    new_tie = new_group | np.concatenate(([True], scores[1:] != scores[:-1]))
    ties, starts = np.flatnonzero(new_tie), np.flatnonzero(new_group)
    positive_tie, negative_tie = np.add.reduceat(positive, ties), np.add.reduceat(negative, ties)
    positive_group, negative_group = np.add.reduceat(positive, starts), np.add.reduceat(negative, starts)
    group_of_tie = np.cumsum(new_group)[ties] - 1
    before_group = np.concatenate(([0.0], np.cumsum(negative_group)))[group_of_tie]
    negatives_below = np.cumsum(negative_tie) - negative_tie - before_group
    pairs_in_order = np.bincount(
        group_of_tie, weights=positive_tie * (negatives_below + negative_tie / 2), minlength=len(starts)
    )
    both = (positive_group > 0) & (negative_group > 0)
    if not both.any():
        return float("nan")
    aucs = pairs_in_order[both] / (positive_group[both] * negative_group[both])
    return float(np.average(aucs, weights=(positive_group + negative_group)[both]))

"""The known label function of the synthetic source: what a model has to find, and the best that it can reach.

The logit is a sum of terms that reward different parts of a model; a term without its features drops out:
dense       linear, |x|, and a product of two: a logistic regression finds only the first
ids         one effect an id, smaller down the popularity ranks, so that a few 100k samples are enough to learn them
cross       8 x 8 clusters of two categorical features
history     the effects of the groups of clusters of the recent events
match       how many of the recent events share the target's group: only a model in which sequence and target meet finds it
"""

from dataclasses import dataclass

import numpy as np

from dlrm_scale.data.hashing import by_chunks, modulo, normal, stream
from dlrm_scale.data.source import Jagged
from dlrm_scale.features import CategoricalFeature, FeatureSchema, Sequence

# Tuned on configs/quickstart.yaml: base rate, oracle AUC, and the distance of a logistic regression from it.
_BIAS = -0.9
_DENSE_LINEAR = 0.8
_DENSE_ABS = 0.6
_DENSE_PRODUCT = 0.2
_ID = 0.5
_CROSS = 0.25
_HISTORY = 0.6
_MATCH = 5
_MEAN_MATCH = 0.25  # about; keeps the base rate where it is when the term drops out

_HEAD_RANKS = 64  # ids hotter than this have effects of nearly full size
_TABLE_RANKS = 65_536  # effects of ids hotter than this are looked up, those of the others computed
_CROSS_CLUSTERS = 8
_RECENCY = 0.8  # weight of an event relative to the next newer one
MAX_CLUSTERS = 1024  # a table no larger than this gives the clusters of a sequence whose last field reads it
_FALLBACK_CLUSTERS = 16
_GROUPS = 8  # of clusters: events and target match by group, which few samples suffice to learn


def num_clusters(schema: FeatureSchema, sequence: Sequence) -> int:
    """Clusters of a sequence's items, by rank % num_clusters: one for each row of the last field's table if that is small, else 16."""
    first, last = schema.tables[sequence.fields[0].table], schema.tables[sequence.fields[-1].table]
    small = len(sequence.fields) > 1 and last.num_embeddings <= MAX_CLUSTERS
    return min(last.num_embeddings if small else _FALLBACK_CLUSTERS, first.num_embeddings)


# R rows  F dense features  T tasks
@dataclass(frozen=True)
class Draw:
    """What R samples are made of, before ids are scattered and dense values transformed.

    Attributes:
        dense_RF: float64, standard normal.
        ranks: popularity ranks (0 is the hottest) of every id feature.
        targets: rank (R,) of the target in each table that a sequence reads.
        user_R: rank of the user.
    """

    dense_RF: np.ndarray
    ranks: dict[str, Jagged]
    targets: dict[str, np.ndarray]
    user_R: np.ndarray


class LabelFunction:
    def __init__(self, schema: FeatureSchema, seed: int) -> None:
        self._schema = schema
        self._seed = seed
        single = [f for f in schema.bag_features if not f.multi_hot and f.pooling_factor == 1]
        self._crossed = sorted(single, key=lambda f: schema.tables[f.table].num_embeddings)[:2]
        self._id_tables: dict[tuple[str, str], np.ndarray] = {}

    def probabilities_RT(self, draw: Draw) -> np.ndarray:
        """float64 (R, T): P(label = 1) of each task."""
        logits_RT = np.stack([self._logits(draw, task) for task in self._schema.labels], axis=1)
        return 1 / (1 + np.exp(-logits_RT))

    def _effect(self, counter: np.ndarray, *what: str) -> np.ndarray:
        return normal(stream(self._seed, "effect", *what), counter)

    def _logits(self, draw: Draw, task: str) -> np.ndarray:
        logits_R = _BIAS + self._dense(draw.dense_RF, task) + self._ids(draw, task)
        if len(self._crossed) == 2:
            a_R, b_R = (modulo(draw.ranks[f.name].values, _CROSS_CLUSTERS) for f in self._crossed)
            effects = self._effect(np.arange(_CROSS_CLUSTERS**2), "cross", task)
            logits_R += _CROSS * effects[a_R * _CROSS_CLUSTERS + b_R]
        for sequence in self._schema.sequences:
            logits_R += self._sequence(draw, sequence, task) / len(self._schema.sequences)
        return logits_R

    def _dense(self, dense_RF: np.ndarray, task: str) -> np.ndarray | float:
        num_dense = dense_RF.shape[1]
        if num_dense == 0:
            return 0.0
        weights_F = self._effect(np.arange(num_dense), "dense", task)
        terms_R = _DENSE_LINEAR * (dense_RF @ weights_F) / np.linalg.norm(weights_F)
        terms_R += _DENSE_ABS * (np.abs(dense_RF[:, -1]) - np.sqrt(2 / np.pi))
        if num_dense > 1:
            terms_R += _DENSE_PRODUCT * dense_RF[:, 0] * dense_RF[:, 1]
        return terms_R

    def _ids(self, draw: Draw, task: str) -> np.ndarray | float:
        terms_R: np.ndarray | float = 0.0
        for f in self._schema.categorical:
            ranks = draw.ranks[f.name]
            effects = self._id_effects(ranks.values, f, task)
            if f.multi_hot or len(effects) < len(ranks.offsets) - 1:  # else each row has one: its mean is itself
                effects = _sum_rows(effects, _rows(ranks), len(ranks.lengths)) / np.maximum(ranks.lengths, 1)
            terms_R = terms_R + effects
        return _ID * terms_R / np.sqrt(max(len(self._schema.categorical), 1))

    def _id_effects(self, ranks: np.ndarray, f: CategoricalFeature, task: str) -> np.ndarray:
        def compute(ranks: np.ndarray) -> np.ndarray:
            return self._effect(ranks, "id", f.name, task) / np.sqrt(1 + ranks / _HEAD_RANKS)

        num = min(self._schema.tables[f.table].num_embeddings, _TABLE_RANKS)
        if (f.name, task) not in self._id_tables:
            self._id_tables[f.name, task] = by_chunks(compute, np.arange(num))
        effects = self._id_tables[f.name, task].take(ranks, mode="clip")
        beyond = np.flatnonzero(ranks >= num)
        effects[beyond] = compute(ranks[beyond])
        return effects

    def _sequence(self, draw: Draw, sequence: Sequence, task: str) -> np.ndarray:
        first = sequence.fields[0]
        events = draw.ranks[first.name]
        lengths, clusters = events.lengths, num_clusters(self._schema, sequence)
        row_of_event = _rows(events)
        group_of_event = by_chunks(lambda ranks: modulo(modulo(ranks, clusters), _GROUPS), events.values)
        age_of_event = np.repeat(events.offsets[1:] - 1, lengths)
        age_of_event -= np.arange(len(events.values))
        recency = ((1 - _RECENCY) * _RECENCY ** np.arange(sequence.max_length)).take(age_of_event)
        effects = self._effect(np.arange(_GROUPS), "history", first.table, task).take(group_of_event)
        terms_R = _HISTORY * _sum_rows(recency * effects, row_of_event, len(lengths))
        tables = {field.table for field in sequence.fields}
        if any(f.table in tables for f in self._schema.sequence_id_features):  # else the target is not to be seen
            group_of_target = modulo(modulo(draw.targets[first.table], clusters), _GROUPS)
            matches = group_of_event == np.repeat(group_of_target, lengths)
            terms_R += _MATCH * (_sum_rows(recency * matches, row_of_event, len(lengths)) - _MEAN_MATCH)
        return terms_R


def _rows(ids: Jagged) -> np.ndarray:
    """The row of each id."""
    return np.repeat(np.arange(len(ids.offsets) - 1), ids.lengths)


def _sum_rows(values: np.ndarray, rows: np.ndarray, num_rows: int) -> np.ndarray:
    return np.bincount(rows, weights=values, minlength=num_rows)

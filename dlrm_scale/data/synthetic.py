"""The embedded data: power-law ids, users with tastes, aligned histories, for any schema; labels from a known function.

Every value is a hash of (seed, sample index), so that any block can be read alone, in any order, on any machine. Training holds
the indices [0, num_train), evaluation [num_train, num_train + num_eval). Because the label function is known
(`synthetic_labels`), so are the best possible NE and AUC: a run prints them beside the model's.
"""

from collections.abc import Callable
from functools import cached_property
from math import gcd
from typing import Literal

import numpy as np

from dlrm_scale import config as configuration
from dlrm_scale.config_io import fingerprint
from dlrm_scale.data.hashing import by_chunks, hash64, modulo, normal, stream, uniform
from dlrm_scale.data.source import Jagged, Rows
from dlrm_scale.data.synthetic_labels import MAX_CLUSTERS, Draw, LabelFunction, num_clusters
from dlrm_scale.features import CategoricalFeature, FeatureSchema, Sequence, Table

_BLOCK_ROWS = 4096
_VERSION = 1  # raise it with every change to what is drawn: fingerprints must differ
_GOLDEN_RATIO = 0.6180339887498949

_NUM_FAVOURITES = 3  # clusters a user prefers
_EVENT_TASTE = 0.7  # part of a user's events that come from the favourites
_TARGET_TASTE = 0.5  # part of the targets shown to a user that do
_NUM_HIDDEN_USERS = 10_000  # when no feature can be the user
_EMPTY_SEQUENCES = 0.05
_FULL_SEQUENCES = 0.15


def power_law_ranks(uniform_: np.ndarray, num: int, skew: float) -> np.ndarray:
    """int64 ranks in [0, num), rank r with probability about (r + 1) ** -skew: the inverse CDF of the density x ** -skew on [1, num + 1)."""
    if skew == 1:
        x = (num + 1.0) ** uniform_
    else:
        x = (1 + uniform_ * ((num + 1.0) ** (1 - skew) - 1)) ** (1 / (1 - skew))
    ranks = x.astype(np.int64)
    ranks -= 1
    return np.minimum(ranks, num - 1, out=ranks)  # rounding may reach the open end


# R rows  F dense features  T tasks
class SyntheticSource:
    """A `Source` for any schema; see the module's docstring.

    Ids: rank 0 of a table is its hottest. A rank becomes an id by `(multiplier * rank + offset) % num_embeddings`, the multiplier
    near num_embeddings / golden ratio and coprime to it: a bijection that spreads the hot ids evenly, so that no row-wise shard holds them all.

    Users: the first single-id feature outside the sequences' tables is the user (without one, a hidden user is drawn). Each user
    prefers a few clusters of items, in the history as in the target.

    Sequences: an event's first field is drawn, its further fields are fixed functions of the first (as an item has one category).
    The single-id features that share the sequence's tables are the target, made alike.
    """

    def __init__(
        self,
        config: configuration.SyntheticSource,
        schema: FeatureSchema,
        split: Literal["train", "eval"],
        seed: int,
    ) -> None:
        self._schema = schema
        self._seed = seed
        self._skew = config.id_skew
        self._first_index = 0 if split == "train" else config.num_train
        self._num_rows = config.num_train if split == "train" else config.num_eval
        self._labels = LabelFunction(schema, seed)
        self._user = next((f for f in schema.bag_features if not f.multi_hot), None)
        rows = f"{self._first_index}+{self._num_rows}"
        self.fingerprint = f"synthetic{_VERSION}-{_what_is_drawn(schema)}-skew{self._skew}-rows{rows}-seed{seed}"
        self.mended: dict[str, int] = {}

    @cached_property
    def block_starts(self) -> np.ndarray:
        return np.append(np.arange(0, self._num_rows, _BLOCK_ROWS), self._num_rows)

    def read_block(self, block: int) -> Rows:
        index_R = self._index_of(block)
        draw = self._draw(index_R)
        weights_R = np.ones(len(index_R), np.float32)
        if self._schema.weight:
            weights_R = (0.5 + self._uniform(index_R, "weight")).astype(np.float32)
        groups_R = np.zeros(len(index_R), np.int64)
        if self._schema.group:
            groups_R = (hash64(stream(self._seed, "group"), draw.user_R) >> np.uint64(1)).astype(np.int64)
        return Rows(
            dense_RF=self._dense(draw.dense_RF),
            ids={
                name: self._ids_of(name, draw.ranks[name])
                for name in (*self._schema.bag_keys, *self._schema.sequence_keys)
            },
            labels_RT=self._labels_of(index_R, self._labels.probabilities_RT(draw)),
            weights_R=weights_R,
            groups_R=groups_R,
        )

    def oracle_probabilities_RT(self) -> np.ndarray:
        """float64 (num_rows, T): the probabilities that the split's labels were drawn from; no model can do better."""
        return self._over_blocks(lambda index_R: self._labels.probabilities_RT(self._draw(index_R)))

    def labels_RT(self) -> np.ndarray:
        """float32 (num_rows, T): all labels of the split."""
        return self._over_blocks(
            lambda index_R: self._labels_of(index_R, self._labels.probabilities_RT(self._draw(index_R)))
        )

    def _over_blocks(self, function: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
        return np.concatenate([function(self._index_of(b)) for b in range(len(self.block_starts) - 1)])

    def _index_of(self, block: int) -> np.ndarray:
        return self._first_index + np.arange(self.block_starts[block], self.block_starts[block + 1])

    # ---- the draws: each a hash of (seed, what, sample index, slot)
    def _uniform(self, counter: np.ndarray, *what: str) -> np.ndarray:
        return uniform(stream(self._seed, *what), counter)

    def _draw(self, index_R: np.ndarray) -> Draw:
        schema = self._schema
        dense = [normal(stream(self._seed, "dense", f.name), index_R) for f in schema.dense]
        if self._user:
            user_R = self._popular(index_R, schema.tables[self._user.table].num_embeddings, self._user.name)
        else:
            user_R = self._popular(index_R, _NUM_HIDDEN_USERS, "hidden user")
        targets: dict[str, np.ndarray] = {}
        ranks: dict[str, Jagged] = {}
        for sequence in schema.sequences:
            self._draw_sequence(sequence, index_R, user_R, targets, ranks)
        shown = dict(targets)  # by the first feature of the table
        for f in schema.categorical:
            ranks[f.name] = self._draw_categorical(f, index_R, shown.pop(f.table, None))
        return Draw(
            dense_RF=np.stack(dense, axis=1) if dense else np.zeros((len(index_R), 0)),
            ranks=ranks,
            targets=targets,
            user_R=user_R,
        )

    def _popular(self, counter: np.ndarray, num: int, *what: str) -> np.ndarray:
        key = stream(self._seed, "id", *what)
        return by_chunks(lambda part: power_law_ranks(uniform(key, part), num, self._skew), counter)

    def _draw_categorical(self, f: CategoricalFeature, index_R: np.ndarray, ranks_R: np.ndarray | None) -> Jagged:
        """Ranks of one feature: `ranks_R` where another part of the sample has fixed them, else drawn by popularity."""
        num = self._schema.tables[f.table].num_embeddings
        if f.multi_hot:  # 0 to about twice the pooling factor
            longest = int(2 * f.pooling_factor) + 1
            length_uniform = self._uniform(index_R, "length", f.name)
            offsets = _offsets((length_uniform * (2 * f.pooling_factor + 1)).astype(np.int64))
            return Jagged(self._popular(_counter(index_R, longest, offsets), num, f.name), offsets)
        if ranks_R is None:
            ranks_R = self._popular(index_R, num, f.name)
        if f.pooling_factor == 1:
            return Jagged(ranks_R, np.arange(len(ranks_R) + 1))
        present = self._uniform(index_R, "length", f.name) < f.pooling_factor
        return Jagged(ranks_R[present], _offsets(present))

    def _draw_sequence(
        self,
        sequence: Sequence,
        index_R: np.ndarray,
        user_R: np.ndarray,
        targets: dict[str, np.ndarray],
        ranks: dict[str, Jagged],
    ) -> None:
        """Adds the events to `ranks` and, where an earlier sequence has not, the target to `targets` (by table)."""
        first, *others = sequence.fields
        clusters = num_clusters(self._schema, sequence)
        favourites_RC = np.stack(
            [
                self._popular(user_R * _NUM_FAVOURITES + i, clusters, "favourite", first.table)
                for i in range(_NUM_FAVOURITES)
            ],
            axis=1,
        )
        if first.table not in targets:
            target = ("target", first.table)
            rows = np.arange(len(index_R))
            targets[first.table] = self._tasteful(
                index_R, rows, favourites_RC, clusters, _TARGET_TASTE, first.table, *target
            )
        lengths = self._sequence_lengths(sequence, index_R)
        offsets = _offsets(lengths)
        counter = _counter(index_R, sequence.max_length, offsets)
        rows = np.repeat(np.arange(len(index_R)), lengths)
        event = ("event", sequence.name)
        event_ranks = self._tasteful(counter, rows, favourites_RC, clusters, _EVENT_TASTE, first.table, *event)
        ranks[first.name] = Jagged(event_ranks, offsets)
        for field in others:
            ranks[field.name] = Jagged(self._derived(first.table, field.table, event_ranks), offsets)
            if field.table not in targets:
                targets[field.table] = self._derived(first.table, field.table, targets[first.table])

    def _tasteful(
        self,
        counter: np.ndarray,
        rows: np.ndarray,
        favourites_RC: np.ndarray,
        clusters: int,
        taste: float,
        table: str,
        *what: str,
    ) -> np.ndarray:
        """Ranks of `table` by popularity, a `taste` part of them moved to the nearest rank of one of the favourite clusters
        of their row."""
        num = self._schema.tables[table].num_embeddings
        key = stream(self._seed, "taste", *what)

        def draw(counter: np.ndarray, rows: np.ndarray) -> np.ndarray:
            ranks = self._popular(counter, num, *what)
            choice = uniform(key, counter) / taste
            moving = np.flatnonzero(choice < 1)
            chosen = (choice[moving] * _NUM_FAVOURITES).astype(np.int64)
            chosen += rows[moving] * _NUM_FAVOURITES
            moved = ranks[moving]
            moved -= modulo(moved, clusters)
            moved += favourites_RC.ravel().take(chosen)
            ranks[moving] = np.where(moved < num, moved, moved - clusters)
            return ranks

        return by_chunks(draw, counter, rows)

    def _derived(self, table: str, other: str, ranks: np.ndarray) -> np.ndarray:
        """The rank in table `other` that belongs to each rank of `table`: its cluster if `other` is small, else a popular one by hash."""
        num = self._schema.tables[other].num_embeddings
        return modulo(ranks, num) if num <= MAX_CLUSTERS else self._popular(ranks, num, "derived", table, other)

    def _sequence_lengths(self, sequence: Sequence, index_R: np.ndarray) -> np.ndarray:
        """Some empty, some full, the rest between, with the mean near `expected_length` (kept to 0.25 .. 0.8 of the longest)."""
        between = 1 - _EMPTY_SEQUENCES - _FULL_SEQUENCES
        mean_between = (sequence.expected_length / sequence.max_length - _FULL_SEQUENCES) / between
        power = 1 / np.clip(mean_between, 0.1, 0.8) - 1  # the mean of uniform ** power is 1 / (1 + power)
        kind = self._uniform(index_R, "length kind", sequence.name)
        lengths = self._uniform(index_R, "length", sequence.name) ** power * (sequence.max_length + 1)
        lengths[kind < _EMPTY_SEQUENCES] = 0
        lengths[kind >= 1 - _FULL_SEQUENCES] = sequence.max_length
        return np.minimum(lengths.astype(np.int64), sequence.max_length)  # rounding may reach the open end

    # ---- from the draws to what a file would hold
    def _dense(self, normal_RF: np.ndarray) -> np.ndarray:
        """float32 (R, F): a normal value, or under log1p the transform of a lognormal one."""
        values_RF = normal_RF.astype(np.float32)
        for i, f in enumerate(self._schema.dense):
            if f.transform == "log1p":
                values_RF[:, i] = np.log1p(np.exp(normal_RF[:, i] + 1))
        return values_RF

    def _ids_of(self, feature: str, ranks: Jagged) -> Jagged:
        name = self._schema.table_of[feature]
        num = self._schema.tables[name].num_embeddings
        multiplier, offset = self._scatter[name]
        return Jagged(by_chunks(lambda part: modulo(part * multiplier + offset, num), ranks.values), ranks.offsets)

    @cached_property
    def _scatter(self) -> dict[str, tuple[int, int]]:
        """By table, the multiplier and the offset that make ids of ranks."""
        scatter = {}
        for name, table in self._schema.tables.items():
            num = table.num_embeddings
            multiplier = max(1, round(num * _GOLDEN_RATIO))
            while gcd(multiplier, num) != 1:
                multiplier += 1
            scatter[name] = (multiplier, int(stream(self._seed, "scatter", name)) % num)
        return scatter

    def _labels_of(self, index_R: np.ndarray, probabilities_RT: np.ndarray) -> np.ndarray:
        uniform_RT = np.stack([self._uniform(index_R, "label", name) for name in self._schema.labels], axis=1)
        return (uniform_RT < probabilities_RT).astype(np.float32)


def _what_is_drawn(schema: FeatureSchema) -> str:
    """Fingerprint of what of a schema the samples depend on; their order stays when only a table's width or type changes."""
    drawn = {name: Table(num_embeddings=t.num_embeddings, embedding_dim=4) for name, t in schema.tables.items()}
    return fingerprint(schema.model_copy(update={"tables": drawn}))


def _offsets(lengths: np.ndarray) -> np.ndarray:
    return np.concatenate([[0], np.cumsum(lengths)])


def _counter(index_R: np.ndarray, longest: int, offsets: np.ndarray) -> np.ndarray:
    """A number for every element of rows that hold at most `longest`: index * longest + its place in the row."""
    counter = np.repeat(index_R * longest - offsets[:-1], np.diff(offsets))
    counter += np.arange(len(counter))
    return counter

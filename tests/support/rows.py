"""A source in memory whose every value is a function of the row's number, and rows taken apart by plain Python loops."""

import hashlib
from typing import Any

import numpy as np

from dlrm_scale.data.source import Jagged, Rows
from dlrm_scale.features import CategoricalFeature, DenseFeature, FeatureSchema, Sequence, SequenceField, Table

SCHEMA = FeatureSchema(
    tables={name: Table(num_embeddings=1_000_000, embedding_dim=4) for name in ("row", "tag", "event")},
    dense=(DenseFeature(name="x"), DenseFeature(name="y")),
    categorical=(
        CategoricalFeature(name="row", table="row"),
        CategoricalFeature(name="tags", table="tag", multi_hot=True),
        CategoricalFeature(name="target", table="event"),
    ),
    sequences=(Sequence(name="past", max_length=5, fields=(SequenceField(name="events", table="event"),)),),
    labels=("click", "buy"),
    weight="weight",
    group="group",
)


def sample(row: int) -> dict[str, Any]:
    """What row number `row` holds."""
    return {
        "dense": [row / 4, -row],
        "ids": {
            "row": [row],
            "tags": [row * 10 + i for i in range(row % 3)],
            "target": [row + 7],
            "events": [row + i * i for i in range(row % 6)],
        },
        "labels": [row % 2, row // 2 % 2],
        "weight": 1 + row % 4 / 2,
        "group": row // 3,
    }


def rows_of(numbers: list[int] | np.ndarray) -> Rows:
    """Rows of these numbers; their ids are slices of longer arrays, as a file's are."""
    samples = [sample(int(number)) for number in numbers]
    return Rows(
        dense_RF=np.array([s["dense"] for s in samples], np.float32).reshape(-1, 2),
        ids={name: _slice_of_longer([s["ids"][name] for s in samples]) for name in sample(0)["ids"]},
        labels_RT=np.array([s["labels"] for s in samples], np.float32).reshape(-1, 2),
        weights_R=np.array([s["weight"] for s in samples], np.float32),
        groups_R=np.array([s["group"] for s in samples], np.int64),
    )


def _slice_of_longer(lists: list[list[int]]) -> Jagged:
    before, after = [-1, -2, -3], [-4, -5]
    values = np.array([*before, *(v for values in lists for v in values), *after], np.int64)
    return Jagged(values, len(before) + np.cumsum([0, *map(len, lists)], dtype=np.int64))


def samples_of(rows: Rows) -> list[dict[str, Any]]:
    """Each row as `sample` gives it."""
    return [
        {
            "dense": rows.dense_RF[r].tolist(),
            "ids": {name: j.values[j.offsets[r] : j.offsets[r + 1]].tolist() for name, j in rows.ids.items()},
            "labels": rows.labels_RT[r].tolist(),
            "weight": rows.weights_R[r].item(),
            "group": rows.groups_R[r].item(),
        }
        for r in range(rows.num_rows)
    ]


def numbers_of(rows: Rows) -> list[int]:
    return [s["ids"]["row"][0] for s in samples_of(rows)]


def content(rows: Rows) -> str:
    """A digest of every value."""
    sha = hashlib.sha256()
    for column in (rows.dense_RF, rows.labels_RT, rows.weights_R, rows.groups_R):
        sha.update(column.tobytes())
    for name in sorted(rows.ids):
        sha.update(rows.ids[name].values.tobytes() + rows.ids[name].offsets.tobytes())
    return sha.hexdigest()


class BlockSource:
    """A `Source` with blocks of given sizes, of `SCHEMA`; remembers which blocks were read."""

    def __init__(self, block_sizes: list[int], fingerprint: str = "blocks") -> None:
        self.fingerprint = fingerprint
        self.block_starts = np.cumsum([0, *block_sizes], dtype=np.int64)
        self.mended: dict[str, int] = {}
        self.blocks_read: list[int] = []

    def read_block(self, block: int) -> Rows:
        self.blocks_read.append(block)
        return rows_of(np.arange(self.block_starts[block], self.block_starts[block + 1]))

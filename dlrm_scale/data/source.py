"""The interface between data in some format and the loader: a source is an indexed list of blocks of rows."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import numpy as np


@dataclass(frozen=True)
class Jagged:
    """Ids of one feature over R rows: row r holds `values[offsets[r]:offsets[r + 1]]`.

    Attributes:
        values: int64 (sum of lengths,)
        offsets: int64 (R + 1,); offsets[0] need not be 0 (a slice shares its parent's values).
    """

    values: np.ndarray
    offsets: np.ndarray

    @property
    def lengths(self) -> np.ndarray:
        return np.diff(self.offsets)


# R rows  F dense features  T tasks
@dataclass(frozen=True)
class Rows:
    """R decoded and validated samples, column by column; what it holds is ready to train on.

    Attributes:
        dense_RF: float32, transformed, columns in schema order.
        ids: one `Jagged` for each key of `schema.bag_keys` and `schema.sequence_keys`; ids are in their table's range.
        labels_RT: float32, 0 or 1.
        weights_R: float32, not negative.
        groups_R: int64.
    """

    dense_RF: np.ndarray
    ids: Mapping[str, Jagged]
    labels_RT: np.ndarray
    weights_R: np.ndarray
    groups_R: np.ndarray

    @property
    def num_rows(self) -> int:
        return len(self.labels_RT)


class Source(Protocol):
    """Rows 0 .. num_rows - 1 of one split, in blocks: the unit that is read at once.

    Opening a source checks everything that can be known without reading rows (files, columns, types) and raises
    `DataError`. `read_block` raises `DataError` naming feature, table, file, row and value at the first bad value.
    """

    @property
    def fingerprint(self) -> str:
        """Changes when the data does: part of what fixes the order of samples."""

    @property
    def block_starts(self) -> np.ndarray:
        """int64 (num_blocks + 1,): block b holds rows block_starts[b] .. block_starts[b + 1] - 1."""

    def read_block(self, block: int) -> Rows:
        """Decodes and validates one block."""

    @property
    def mended(self) -> dict[str, int]:
        """What policy changed so far, by what was done: {"ids of item taken modulo 1000": 17, ...}."""

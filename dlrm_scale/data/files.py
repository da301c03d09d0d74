"""What every source of files shares: finding them, cutting their rows into blocks, and a fingerprint.

A subclass of `FileSource` says where blocks may end and reads raw columns; the rest is here.
"""

import glob
import hashlib
import json
import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
import pyarrow as pa

from dlrm_scale.config import Split
from dlrm_scale.data.decode import Decoder
from dlrm_scale.data.source import Rows
from dlrm_scale.errors import DataError
from dlrm_scale.features import FeatureSchema

SAMPLES_PER_FILE = 16
SAMPLE_BYTES = 64 << 10


@dataclass(frozen=True)
class Piece:
    """Consecutive rows of one file: one block."""

    file: int
    first_row: int
    num_rows: int


class FileSource(ABC):
    """A `Source` over files.

    Args:
        split: the part of all rows that this source has; row i is row floor(start * N) + i of the files' N rows.
        files: in order.
        bounds: for each file, int64 ascending from 0 to its number of rows: where blocks may end.
        digests: for each file, text that changes when its content does.
    """

    def __init__(
        self,
        schema: FeatureSchema,
        split: Split,
        files: Sequence[Path],
        bounds: Sequence[np.ndarray],
        digests: Sequence[str],
    ):
        self._decoder = Decoder(schema)
        self._files = files
        self._pieces = cut(bounds, split.rows)
        if not self._pieces:
            total = sum(int(b[-1]) for b in bounds)
            raise DataError(
                f"rows {list(split.rows)} of the {total} rows in {', '.join(split.paths)} are no row at all; widen `rows`"
            )
        self._block_starts = np.cumsum([0, *(p.num_rows for p in self._pieces)], dtype=np.int64)
        made_of = [type(self).__name__, split.rows, [(f.name, d) for f, d in zip(files, digests, strict=True)]]
        self._fingerprint = hashlib.sha256(json.dumps(made_of).encode()).hexdigest()[:12]

    @property
    def fingerprint(self) -> str:
        return self._fingerprint

    @property
    def block_starts(self) -> np.ndarray:
        return self._block_starts

    @property
    def mended(self) -> dict[str, int]:
        return dict(self._decoder.mended)

    def read_block(self, block: int) -> Rows:
        piece = self._pieces[block]
        return self._decoder.decode(self._read(piece), str(self._files[piece.file]), piece.first_row)

    @abstractmethod
    def _read(self, piece: Piece) -> Mapping[str, pa.Array]:
        """Every column of the schema, `piece.num_rows` values each."""


def expand(patterns: Sequence[str]) -> list[Path]:
    """The files that paths and glob patterns name, each pattern's in sorted order.

    Raises:
        DataError: a pattern matches no file, a path is a folder, or a file is named twice.
    """
    files: list[Path] = []
    for pattern in patterns:
        found = [Path(p) for p in sorted(glob.glob(pattern, recursive=True))] or [Path(pattern)]
        if not found[0].exists():
            raise DataError(f"no file matches {pattern} (seen from {Path.cwd()}); mend the path or run from its root")
        for file in found:
            if file.is_dir():
                raise DataError(f"{file} is a folder; name its files, for example {file / '*.parquet'}")
            if file in files:
                raise DataError(f"{file} is named twice by {', '.join(patterns)}; its rows would count twice")
        files += found
    return files


def cut(bounds: Sequence[np.ndarray], rows: tuple[float, float]) -> list[Piece]:
    """Cuts the rows from one fraction of all rows to another into pieces that end at the bounds."""
    total = sum(int(b[-1]) for b in bounds)
    start, stop = (math.floor(fraction * total) for fraction in rows)
    pieces, file_start = [], 0
    for file, bounds_of_file in enumerate(bounds):
        edges = np.unique(np.clip([start - file_start, *bounds_of_file, stop - file_start], 0, bounds_of_file[-1]))
        edges = edges[(edges >= start - file_start) & (edges <= stop - file_start)]
        pieces += [Piece(file, int(a), int(b - a)) for a, b in pairwise(edges)]
        file_start += int(bounds_of_file[-1])
    return pieces


def digest(file: Path, tail_bytes: int = 0) -> str:
    """Of a file's size, of samples of it and of its last bytes; the whole of a file up to 1 MiB.

    Reading terabytes at each start is out of the question; a change that keeps the size of a larger file
    and touches neither its samples nor its tail is not seen.
    """
    size = file.stat().st_size
    sha = hashlib.sha256(str(size).encode())
    with file.open("rb") as f:
        for start in np.linspace(0, max(0, size - SAMPLE_BYTES), SAMPLES_PER_FILE, dtype=np.int64):
            f.seek(int(start))
            sha.update(f.read(SAMPLE_BYTES))
        f.seek(size - tail_bytes)
        sha.update(f.read())
    return sha.hexdigest()

"""Parquet files as a `Source`: a block is a row group, cut by the split's range of rows.

Only the schema's columns are read. A file's footer is parsed once, when the source is opened.
"""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from dlrm_scale.config import Split
from dlrm_scale.data.columns import check_columns, column_names
from dlrm_scale.data.files import FileSource, Piece, digest, expand
from dlrm_scale.errors import DataError
from dlrm_scale.features import FeatureSchema


class ParquetSource(FileSource):
    """Rows of `split.paths`.

    Raises:
        DataError: a file is absent, unreadable, no Parquet or without rows, lacks a column, has a column of a type
            that does not fit, or of another type than the first file has.
    """

    def __init__(self, split: Split, schema: FeatureSchema):
        files = expand(split.paths)
        self._columns = column_names(schema)
        self._footers, types = [], []
        for file in files:
            footer, found = _open(file)
            check_columns(schema, found, str(file))
            self._footers.append(footer)
            types.append({name: found.field(name).type for name in self._columns})
            _check_agreement(files[0], types[0], file, types[-1])
        self._bounds = [_row_group_bounds(footer) for footer in self._footers]
        digests = [
            digest(file, tail_bytes=footer.serialized_size + 8)  # the footer, its length and the magic number
            for file, footer in zip(files, self._footers, strict=True)
        ]
        super().__init__(schema, split, files, self._bounds, digests)

    def _read(self, piece: Piece) -> Mapping[str, pa.Array]:
        bounds = self._bounds[piece.file]
        group = int(np.searchsorted(bounds, piece.first_row, side="right")) - 1
        file = self._files[piece.file]
        try:
            with pq.ParquetFile(file, metadata=self._footers[piece.file]) as opened:
                table = opened.read_row_group(group, columns=self._columns)
        except (OSError, pa.ArrowException) as e:
            raise DataError(
                f"{file}, row group {group}: cannot be read ({e}); the file is damaged or changed since it was opened"
            ) from None
        table = table.slice(piece.first_row - int(bounds[group]), piece.num_rows)
        return {name: _one_chunk(table.column(name)) for name in self._columns}


def _open(file: Path) -> tuple[pq.FileMetaData, pa.Schema]:
    try:
        with pq.ParquetFile(file) as opened:
            footer, found = opened.metadata, opened.schema_arrow
    except (OSError, pa.ArrowException) as e:
        raise DataError(f"{file} cannot be read as Parquet: {e}") from None
    if footer.num_rows == 0:
        raise DataError(f"{file} has no rows; leave it out of the paths or write it again")
    return footer, found


def _check_agreement(
    first_file: Path, first: dict[str, pa.DataType], file: Path, types: dict[str, pa.DataType]
) -> None:
    for name, kind in types.items():
        if kind != first[name]:
            raise DataError(
                f"column {name} is of type {first[name]} in {first_file}, but of type {kind} in {file}; write all files of a "
                f"split with one schema"
            )


def _row_group_bounds(footer: pq.FileMetaData) -> np.ndarray:
    return np.cumsum([0, *(footer.row_group(g).num_rows for g in range(footer.num_row_groups))], dtype=np.int64)


def _one_chunk(column: pa.ChunkedArray) -> pa.Array:
    return column.chunk(0) if column.num_chunks == 1 else column.combine_chunks()  # combining copies even one chunk

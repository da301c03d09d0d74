"""Criteo's raw TSV in the formats that need not fit in memory: Parquet, and the .npy triple of torchrec's tools."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from dlrm_scale.data.criteo import CATEGORIES, COLUMNS, INTEGERS, LABEL, TSV_SCHEMA, read_tsv
from dlrm_scale.errors import DataError


def write_parquet(source: Path, output: Path, on_rows: Callable[[int], None]) -> list[Path]:
    """Columns as `data.criteo` names them: raw integers, ids as uint32, nulls where a field is empty.

    `on_rows` is told how many more rows are done. Raises DataError for a bad row, and leaves no file
    under its final name then.
    """
    file = output / f"{_stem(source)}.parquet"
    part = file.with_suffix(".part")
    with pq.ParquetWriter(part, TSV_SCHEMA) as writer:
        for batch in read_tsv(source, COLUMNS):
            writer.write_batch(batch)
            on_rows(batch.num_rows)
    part.replace(file)
    return [file]


def write_npy(source: Path, output: Path, on_rows: Callable[[int], None]) -> list[Path]:
    """The same bytes as torchrec's `BinaryCriteoUtils.tsv_to_npys`: a missing value is 0, dense is log(x - smallest + 2).

    The smallest dense value of the file has to be known first, so the file is read twice; `on_rows` counts both.
    Raises DataError for a bad row, and leaves no file
    under its final name then.
    """
    num_rows, smallest = 0, np.iinfo(np.int64).max
    for batch in read_tsv(source, (LABEL, *INTEGERS)):
        if batch.column(LABEL).null_count:
            row = num_rows + int(np.argmax(batch.column(LABEL).is_null().to_numpy(zero_copy_only=False)))
            raise DataError(f"{source}, row {row} (counted from 0): label is empty, and the npy format knows no null")
        smallest = min(smallest, int(_matrix(batch, INTEGERS, np.int64).min()))
        num_rows += batch.num_rows
        on_rows(batch.num_rows)

    shapes = {"dense": (len(INTEGERS), np.float32), "sparse": (len(CATEGORIES), np.int64), "labels": (1, np.int32)}
    files = [output / f"{_stem(source)}_{part}.npy" for part in shapes]
    parts = [file.with_suffix(".part") for file in files]
    dense, sparse, labels = (
        np.lib.format.open_memmap(part, "w+", dtype, (num_rows, width))
        for part, (width, dtype) in zip(parts, shapes.values(), strict=True)
    )
    start = 0
    for batch in read_tsv(source, COLUMNS):
        rows = slice(start, start + batch.num_rows)
        dense[rows] = np.log(_matrix(batch, INTEGERS, np.int64) - (smallest - 2), dtype=np.float32)
        sparse[rows] = _matrix(batch, CATEGORIES, np.int64)
        labels[rows] = _matrix(batch, (LABEL,), np.int32)
        start = rows.stop
        on_rows(batch.num_rows)
    for array, part, file in zip((dense, sparse, labels), parts, files, strict=True):
        array.flush()
        part.replace(file)
    return files


def _matrix(batch: pa.RecordBatch, names: tuple[str, ...], dtype: type) -> np.ndarray:
    return np.stack([batch.column(name).fill_null(0).to_numpy().astype(dtype) for name in names], axis=1)


def _stem(source: Path) -> str:
    return source.name.removesuffix(".gz").removesuffix(".tsv").removesuffix(".txt")

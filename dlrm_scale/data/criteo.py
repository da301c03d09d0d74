"""Criteo's click logs as a `Source`: the raw TSV, or the .npy triples of torchrec's Criteo tools.

Columns are named label, int_0 .. int_12, cat_0 .. cat_25, of which a schema may use any part. The TSV is for
samples and days that fit in memory; tools/prepare_data turns larger ones into .npy or Parquet.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pyarrow import csv

from dlrm_scale.config import Split
from dlrm_scale.data.columns import check_columns, column_names
from dlrm_scale.data.files import FileSource, Piece, digest, expand
from dlrm_scale.errors import ConfigError, DataError
from dlrm_scale.features import FeatureSchema

LABEL = "label"
INTEGERS = tuple(f"int_{i}" for i in range(13))
CATEGORIES = tuple(f"cat_{i}" for i in range(26))
COLUMNS = (LABEL, *INTEGERS, *CATEGORIES)
TSV_SCHEMA = pa.schema(
    [(name, pa.int64()) for name in (LABEL, *INTEGERS)] + [(name, pa.uint32()) for name in CATEGORIES]
)
NPY_SCHEMA = pa.schema(
    [(LABEL, pa.int32())] + [(name, pa.float32()) for name in INTEGERS] + [(name, pa.int64()) for name in CATEGORIES]
)
ROWS_PER_BLOCK = 8192
MAX_TSV_ROWS = 8_000_000  # of one split: about 2 GB of text, 1.7 GB held
HEX_DIGITS = 8
NPY_SUFFIX = "_dense.npy"

_NIBBLE = np.full(256, 255, np.uint8)
for _digits in ("0123456789abcdef", "0123456789ABCDEF"):
    _NIBBLE[list(_digits.encode())] = np.arange(16)


class CriteoTsvSource(FileSource):
    """Raw click logs (.tsv, or .tsv.gz), held in memory; an empty field is a null.

    Raises:
        DataError: no file, a file without rows, a row that is not 40 fields of integers and hex, too many rows for
            memory, or a schema with other columns than Criteo's.
    """

    def __init__(self, split: Split, schema: FeatureSchema):
        files = expand(split.paths)
        check_columns(schema, TSV_SCHEMA, str(files[0]))
        columns = column_names(schema)
        self._tables: list[pa.Table] = []
        for file in files:
            batches, num_rows = [], sum(t.num_rows for t in self._tables)
            for batch in read_tsv(file, columns):
                batches.append(batch)
                num_rows += batch.num_rows
                if num_rows > MAX_TSV_ROWS:
                    raise DataError(
                        f"{file}: raw TSV is held in memory, and {', '.join(split.paths)} has more than {MAX_TSV_ROWS:,} "
                        f"rows; turn it into .npy first: python -m tools.prepare_data criteo --input {file} --format npy "
                        f"--output prepared/criteo"
                    )
            self._tables.append(pa.Table.from_batches(batches))
        bounds = [_block_bounds(table.num_rows) for table in self._tables]
        super().__init__(schema, split, files, bounds, [digest(file) for file in files])

    def _read(self, piece: Piece) -> Mapping[str, pa.Array]:
        table = self._tables[piece.file].slice(piece.first_row, piece.num_rows)
        return {name: table.column(name).combine_chunks() for name in table.column_names}


class CriteoNpySource(FileSource):
    """<name>_dense.npy (float32 R x 13), <name>_sparse.npy (int32 or int64 R x 26), <name>_labels.npy (int32 R x 1).

    Split.paths name the dense files. torchrec's BinaryCriteoUtils.tsv_to_npys stores the dense values logged
    already (log(x - smallest of the file + 2)) and every missing value, dense or id, as 0 before that: here
    nothing is a null, and log1p would be a second logarithm.

    Raises:
        ConfigError: a dense feature with transform log1p.
        DataError: a file of a triple is absent, no .npy, or of another shape, type or number of rows.
    """

    def __init__(self, split: Split, schema: FeatureSchema):
        files = expand(split.paths)
        check_columns(schema, NPY_SCHEMA, str(files[0]))
        logged = [f.name for f in schema.dense if f.transform == "log1p"]
        if logged:
            raise ConfigError(
                f"the dense values of Criteo's npy format are logged already, but {', '.join(logged)} has transform "
                f"log1p; set it to none"
            )
        self._columns = column_names(schema)
        self._triples = [_open_triple(file) for file in files]
        bounds = [_block_bounds(len(labels)) for _, _, labels in self._triples]
        digests = ["".join(digest(part) for part in _triple_paths(file)) for file in files]
        super().__init__(schema, split, files, bounds, digests)

    def _read(self, piece: Piece) -> Mapping[str, pa.Array]:
        rows = slice(piece.first_row, piece.first_row + piece.num_rows)
        dense, sparse, labels = (np.ascontiguousarray(part[rows].T) for part in self._triples[piece.file])
        columns = dict(zip(COLUMNS, (*labels, *dense, *sparse), strict=True))
        return {name: pa.array(columns[name]) for name in self._columns}


def read_tsv(file: Path, columns: Sequence[str]) -> Iterator[pa.RecordBatch]:
    """Rows of a raw click log in the file's order, some thousands at a time, as `TSV_SCHEMA`'s types.

    Raises:
        DataError: names the file and the row (from 0) that is not as it should be.
    """
    first_row = 0
    try:
        reader = csv.open_csv(
            file,
            read_options=csv.ReadOptions(
                column_names=COLUMNS, use_threads=False, block_size=2 << 20
            ),  # rows are counted
            parse_options=csv.ParseOptions(delimiter="\t", quote_char=False, ignore_empty_lines=False),
            convert_options=csv.ConvertOptions(
                column_types={name: pa.string() if name in CATEGORIES else pa.int64() for name in COLUMNS},
                null_values=[""],
                strings_can_be_null=True,
                include_columns=columns,
            ),
        )
        for batch in reader:
            arrays = [
                _parse_hex(column, name, file, first_row) if name in CATEGORIES else column
                for name, column in zip(columns, batch.columns, strict=True)
            ]
            yield pa.RecordBatch.from_arrays(arrays, names=list(columns))
            first_row += batch.num_rows
    except (OSError, pa.ArrowException) as e:
        raise DataError(_explain(file, str(e))) from None


def _parse_hex(column: pa.StringArray, name: str, file: Path, first_row: int) -> pa.Array:
    """uint32 of strings of up to 8 hex digits; nulls stay."""
    present_R = column.is_valid().to_numpy(zero_copy_only=False)
    padded = pc.ascii_lpad(column.fill_null("0"), HEX_DIGITS, "0")
    hex_R = pc.equal(pc.binary_length(padded), HEX_DIGITS).to_numpy(zero_copy_only=False)
    if hex_R.all():  # so that the text of all rows is one matrix
        text = np.frombuffer(padded.buffers()[2], np.uint8, count=len(padded) * HEX_DIGITS)
        nibbles = _NIBBLE[text].reshape(-1, HEX_DIGITS)
        hex_R = (nibbles < 16).all(axis=1)
    if not hex_R.all():
        row = int(np.argmin(hex_R))
        raise DataError(
            f"{file}, row {first_row + row} (counted from 0): {name} is {column[row].as_py()!r}, but must be up to "
            f"{HEX_DIGITS} hex digits, or empty"
        )
    pairs = nibbles[:, 0::2] << 4 | nibbles[:, 1::2]
    return pa.array(pairs.view(">u4").ravel().astype(np.uint32), mask=~present_R)


def _explain(file: Path, fault: str) -> str:
    """Arrow's complaint, with the row counted from 0 and the column's name where it gives numbers."""
    if fault == "Empty CSV file":
        return f"{file} has no rows; leave it out of the paths or fetch it again"
    row = re.search(r"Row #(\d+): ", fault)
    where = f"{file}, row {int(row[1]) - 1} (counted from 0)" if row else str(file)
    shape = re.search(r"Expected \d+ columns, got (\d+)", fault)
    if shape:
        return f"{where}: {shape[1]} tab-separated fields, but Criteo's rows have {len(COLUMNS)} (label, 13 integers, 26 ids)"
    value = re.search(r"column #(\d+): .*invalid value '(.*)'", fault, re.DOTALL)
    if value:
        return f"{where}: {COLUMNS[int(value[1])]} is {value[2]!r}, but must be an integer, or empty{'; Criteo has no header line' if row and row[1] == '1' else ''}"
    return f"{where}: cannot be read as Criteo's TSV: {fault}"


def _open_triple(dense_path: Path) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    expected = ((13, ("float32",)), (26, ("int32", "int64")), (1, ("int32",)))
    parts = []
    for path, (width, dtypes) in zip(_triple_paths(dense_path), expected, strict=True):
        if not path.exists():
            raise DataError(f"{path} is absent, but belongs to {dense_path}: Criteo's npy format is three files")
        try:
            part = np.load(path, mmap_mode="r", allow_pickle=False)
        except (OSError, ValueError, EOFError) as e:
            raise DataError(f"{path} cannot be read as .npy: {e}") from None
        if part.ndim != 2 or part.shape[1] != width or part.dtype.name not in dtypes:
            raise DataError(
                f"{path} is {part.dtype} of shape {part.shape}, but must be {' or '.join(dtypes)} of shape (rows, {width})"
            )
        parts.append(part)
    dense, sparse, labels = parts
    if not len(dense) == len(sparse) == len(labels):
        raise DataError(
            f"{dense_path} has {len(dense)} rows, but its _sparse.npy has {len(sparse)} and its _labels.npy has {len(labels)}"
        )
    if not len(dense):
        raise DataError(f"{dense_path} has no rows; leave it out of the paths or write it again")
    return dense, sparse, labels


def _triple_paths(dense_path: Path) -> tuple[Path, Path, Path]:
    if not dense_path.name.endswith(NPY_SUFFIX):
        raise DataError(f"{dense_path}: the paths of Criteo's npy format name the *{NPY_SUFFIX} files")
    stem = dense_path.name.removesuffix(NPY_SUFFIX)
    return dense_path, dense_path.with_name(f"{stem}_sparse.npy"), dense_path.with_name(f"{stem}_labels.npy")


def _block_bounds(num_rows: int) -> np.ndarray:
    return np.append(np.arange(0, num_rows, ROWS_PER_BLOCK, dtype=np.int64), num_rows)

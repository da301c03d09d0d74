"""What every source promises, whatever its format: one suite over all of them.

A new file format joins by a `Case` in FORMATS; its `cat_0` holds the row's number, by which rows are told apart.
"""

import shutil
from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dlrm_scale.config import Split
from dlrm_scale.config import SyntheticSource as SyntheticConfig
from dlrm_scale.data.criteo import CriteoNpySource, CriteoTsvSource
from dlrm_scale.data.open import preflight
from dlrm_scale.data.parquet import ParquetSource
from dlrm_scale.data.source import Rows, Source
from dlrm_scale.data.synthetic import SyntheticSource
from dlrm_scale.errors import DataError
from dlrm_scale.features import CategoricalFeature, DenseFeature, FeatureSchema, Sequence, SequenceField, Table

ROWS_OF_FILES = (9000, 1, 300)  # more than one block, one row, less than one block
NUM_ROWS = sum(ROWS_OF_FILES)

Opened = tuple[FeatureSchema, Callable[[], Source]]


def schema_with(sequences: tuple[Sequence, ...] = ()) -> FeatureSchema:
    return FeatureSchema(
        tables={
            "row": Table(num_embeddings=NUM_ROWS, embedding_dim=4),
            "hashed": Table(num_embeddings=1000, embedding_dim=4, out_of_range="modulo"),
        },
        dense=(DenseFeature(name="int_1"),),
        categorical=(CategoricalFeature(name="cat_0", table="row"), CategoricalFeature(name="cat_1", table="hashed")),
        sequences=sequences,
    )


class Case(ABC):
    schema = schema_with()

    def write(self, folder: Path, flipped_row: int | None = None) -> None:
        """Writes NUM_ROWS rows; the label of `flipped_row` is the other one."""
        folder.mkdir()
        first = 0
        for number, num_rows in enumerate(ROWS_OF_FILES):
            row_R = np.arange(first, first + num_rows)
            label_R = (row_R % 7 == 0) ^ (row_R == flipped_row)
            self.write_file(folder / f"part_{number}", row_R, label_R.astype(np.int32))
            first += num_rows

    @abstractmethod
    def write_file(self, stem: Path, row_R: np.ndarray, label_R: np.ndarray) -> None: ...

    @abstractmethod
    def open(self, folder: Path, rows: tuple[float, float] = (0.0, 1.0)) -> Source: ...


class Parquet(Case):
    schema = schema_with((Sequence(name="past", max_length=3, fields=(SequenceField(name="seq", table="row"),)),))

    def write_file(self, stem: Path, row_R: np.ndarray, label_R: np.ndarray) -> None:
        columns = {"cat_0": row_R, "cat_1": row_R * 7919, "int_1": row_R / 2, "label": label_R}
        columns["seq"] = pa.array([list(range(row % 5)) for row in row_R], pa.list_(pa.int32()))
        pq.write_table(pa.table(columns), stem.with_suffix(".parquet"), row_group_size=1000)

    def open(self, folder: Path, rows: tuple[float, float] = (0.0, 1.0)) -> Source:
        return ParquetSource(Split(paths=(f"{folder}/*.parquet",), rows=rows), self.schema)


class CriteoTsv(Case):
    def write_file(self, stem: Path, row_R: np.ndarray, label_R: np.ndarray) -> None:
        lines = [
            "\t".join([str(label), "", str(row % 50), *[""] * 11, f"{row:08x}", f"{row * 7919:x}", *[""] * 24])
            for row, label in zip(row_R.tolist(), label_R.tolist(), strict=True)
        ]
        stem.with_suffix(".tsv").write_text("\n".join(lines) + "\n")

    def open(self, folder: Path, rows: tuple[float, float] = (0.0, 1.0)) -> Source:
        return CriteoTsvSource(Split(paths=(f"{folder}/*.tsv",), rows=rows), self.schema)


class CriteoNpy(Case):
    def write_file(self, stem: Path, row_R: np.ndarray, label_R: np.ndarray) -> None:
        sparse = np.stack([row_R, row_R * 7919, *[row_R] * 24], axis=1)
        np.save(f"{stem}_dense.npy", np.ones((len(row_R), 13), np.float32) * row_R[:, None].astype(np.float32))
        np.save(f"{stem}_sparse.npy", sparse)
        np.save(f"{stem}_labels.npy", label_R[:, None])

    def open(self, folder: Path, rows: tuple[float, float] = (0.0, 1.0)) -> Source:
        return CriteoNpySource(Split(paths=(f"{folder}/*_dense.npy",), rows=rows), self.schema)


FORMATS = (Parquet(), CriteoTsv(), CriteoNpy())


@pytest.fixture(scope="module", params=FORMATS, ids=lambda case: type(case).__name__)
def written(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Case, Path]:
    folder = tmp_path_factory.mktemp("source") / "data"
    request.param.write(folder)
    return request.param, folder


@pytest.fixture(scope="module", params=(*FORMATS, None), ids=lambda case: type(case).__name__ if case else "Synthetic")
def opened(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Opened:
    """Every source, for what does not depend on files: the schema, and a function that opens one more instance."""
    case = request.param
    if case is None:
        config = SyntheticConfig(num_train=NUM_ROWS, num_eval=1)
        return Parquet.schema, lambda: SyntheticSource(config, Parquet.schema, "train", seed=0)
    folder = tmp_path_factory.mktemp("opened") / "data"
    case.write(folder)
    return case.schema, lambda: case.open(folder)


def read_all(source: Source) -> list[Rows]:
    return [source.read_block(block) for block in range(len(source.block_starts) - 1)]


def row_numbers(source: Source) -> np.ndarray:
    return np.concatenate([rows.ids["cat_0"].values for rows in read_all(source)])


def assert_equal_rows(one: Rows, other: Rows) -> None:
    for name in ("dense_RF", "labels_RT", "weights_R", "groups_R"):
        np.testing.assert_array_equal(getattr(one, name), getattr(other, name))
    assert one.ids.keys() == other.ids.keys()
    for name, ids in one.ids.items():
        np.testing.assert_array_equal(ids.values, other.ids[name].values)
        np.testing.assert_array_equal(ids.offsets, other.ids[name].offsets)


def test_blocks_hold_each_row_once_in_the_files_order(written):
    case, folder = written
    source = case.open(folder)
    assert source.block_starts[0] == 0 and source.block_starts[-1] == NUM_ROWS
    assert [rows.num_rows for rows in read_all(source)] == np.diff(source.block_starts).tolist()
    np.testing.assert_array_equal(row_numbers(source), np.arange(NUM_ROWS))


def test_rows_are_ready_to_train_on(opened):
    schema, open_one = opened
    for rows in read_all(open_one()):
        R = rows.num_rows
        assert rows.dense_RF.shape == (R, len(schema.dense)) and rows.dense_RF.dtype == np.float32
        assert rows.labels_RT.shape == (R, 1) and rows.labels_RT.dtype == np.float32
        assert rows.weights_R.shape == (R,) and rows.weights_R.dtype == np.float32
        assert rows.groups_R.shape == (R,) and rows.groups_R.dtype == np.int64
        assert set(np.unique(rows.labels_RT)) <= {0.0, 1.0}
        assert set(rows.ids) == {*schema.bag_keys, *schema.sequence_keys}
        for name, ids in rows.ids.items():
            assert ids.values.dtype == np.int64 and ids.offsets.dtype == np.int64 and len(ids.offsets) == R + 1
            used = ids.values[ids.offsets[0] : ids.offsets[-1]]
            assert not used.size or 0 <= used.min() <= used.max() < schema.tables[schema.table_of[name]].num_embeddings


def test_blocks_read_in_any_order_and_from_any_instance_are_the_same(opened):
    _, open_one = opened
    source, other = open_one(), open_one()
    assert source.fingerprint == other.fingerprint
    np.testing.assert_array_equal(source.block_starts, other.block_starts)
    blocks = range(len(source.block_starts) - 1)
    forward = [source.read_block(b) for b in blocks]
    for b in reversed(blocks):
        assert_equal_rows(forward[b], source.read_block(b))
        assert_equal_rows(forward[b], other.read_block(b))


def test_fractions_partition_the_rows(written):
    case, folder = written
    parts = [case.open(folder, rows) for rows in ((0.0, 0.31), (0.31, 0.9678), (0.9678, 1.0))]
    np.testing.assert_array_equal(np.concatenate([row_numbers(p) for p in parts]), np.arange(NUM_ROWS))
    assert parts[0].block_starts[-1] == int(0.31 * NUM_ROWS)
    assert len({p.fingerprint for p in parts}) == len(parts)


def test_a_fraction_without_rows_is_refused(written):
    case, folder = written
    with pytest.raises(DataError, match=rf"rows \[0.0, 1e-06\] of the {NUM_ROWS} rows .* no row"):
        case.open(folder, (0.0, 1e-6))


def test_fingerprint_is_of_the_data_not_of_where_it_lies(written, tmp_path):
    case, folder = written
    here = case.open(folder).fingerprint
    shutil.copytree(folder, tmp_path / "copy")
    assert case.open(tmp_path / "copy").fingerprint == here
    case.write(tmp_path / "one_label_flipped", flipped_row=4321)
    assert case.open(tmp_path / "one_label_flipped").fingerprint != here


def test_mended_ids_are_counted(written):
    case, folder = written
    source = case.open(folder)
    assert source.mended == {}
    read_all(source)
    assert source.mended["ids of cat_1 taken modulo 1000"] == (np.arange(NUM_ROWS) * 7919 >= 1000).sum()


def test_preflight_reads_whole_blocks_until_enough_rows_are_checked(opened):
    _, open_one = opened
    source = open_one()
    assert preflight(source, 0) == 0
    assert preflight(source, 1) == source.block_starts[1]
    assert preflight(source, 10 * NUM_ROWS) == NUM_ROWS

import re
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dlrm_scale.config import Split
from dlrm_scale.data.parquet import ParquetSource
from dlrm_scale.errors import DataError
from dlrm_scale.features import CategoricalFeature, FeatureSchema, Table

SCHEMA = FeatureSchema(
    tables={"item": Table(num_embeddings=100, embedding_dim=4)},
    categorical=(CategoricalFeature(name="item", table="item"),),
)


def write(file: Path, items: list, **others: pa.Array) -> Path:
    columns = {"item": pa.array(items), "label": pa.array([0] * len(items), pa.int8()), **others}
    pq.write_table(pa.table(columns), file, row_group_size=4)
    return file


def open_source(*files: Path, rows: tuple[float, float] = (0.0, 1.0)) -> ParquetSource:
    return ParquetSource(Split(paths=tuple(map(str, files)), rows=rows), SCHEMA)


def assert_refused(parts: list[str], *files: Path) -> None:
    with pytest.raises(DataError) as e:
        open_source(*files)
    for part in parts:
        assert part in str(e.value)


def test_blocks_are_the_row_groups_cut_by_the_range_of_rows(tmp_path):
    source = open_source(write(tmp_path / "a", list(range(10))), write(tmp_path / "b", [10, 11]), rows=(0.17, 0.95))
    assert [source.read_block(b).ids["item"].values.tolist() for b in range(4)] == [[2, 3], [4, 5, 6, 7], [8, 9], [10]]
    assert source.block_starts.tolist() == [0, 2, 6, 8, 9]


def test_a_bad_value_names_its_row_in_its_file_whatever_the_group_and_the_range(tmp_path):
    good, bad = write(tmp_path / "good", list(range(7))), write(tmp_path / "bad", [*range(6), 100, 7])
    source = open_source(good, bad, rows=(0.9, 1.0))  # rows 6 and 7 of the second file
    with pytest.raises(DataError, match=rf"{re.escape(str(bad))}, row 6 .*item has id 100, .*table item .*\[0, 100\)"):
        source.read_block(0)


def test_unreadable_files_are_refused(tmp_path):
    (tmp_path / "text").write_text("item,label\n1,0\n" * 100)
    (tmp_path / "zero_bytes").touch()
    whole = write(tmp_path / "whole", list(range(100))).read_bytes()
    (tmp_path / "cut_off").write_bytes(whole[:-20])
    for name in ("text", "zero_bytes", "cut_off"):
        assert_refused([str(tmp_path / name), "Parquet"], tmp_path / name)


def test_a_file_without_rows_is_refused_beside_good_ones(tmp_path):
    empty = write(tmp_path / "b", pa.array([], pa.int64()))
    assert_refused([str(empty), "no rows"], write(tmp_path / "a", [1]), empty)


def test_a_later_file_that_lacks_a_column_or_has_it_as_text_is_refused(tmp_path):
    good = write(tmp_path / "a", [1])
    pq.write_table(pa.table({"items": [1], "label": [0]}), tmp_path / "b")
    assert_refused([str(tmp_path / "b"), "no column item", "nearest is items"], good, tmp_path / "b")
    assert_refused(["c does not fit", "column item", "string", "integers"], good, write(tmp_path / "c", ["1"]))


def test_files_that_disagree_on_a_type_are_refused(tmp_path):
    one, other = write(tmp_path / "a", [1]), write(tmp_path / "b", pa.array([1], pa.int32()))
    assert_refused(["item", "int64", str(one), "int32", str(other)], one, other)


def test_columns_that_the_schema_does_not_name_may_be_anything(tmp_path):
    files = [write(tmp_path / "a", [1], note=pa.array(["x"])), write(tmp_path / "b", [2], note=pa.array([1.5]))]
    assert open_source(*files).block_starts.tolist() == [0, 1, 2]


def test_a_damaged_page_names_the_file_and_row_group(tmp_path):
    file = write(tmp_path / "a", list(range(8)))
    source = open_source(file)
    content = bytearray(file.read_bytes())
    start = pq.read_metadata(file).row_group(1).column(0).dictionary_page_offset
    content[start : start + 16] = b"\xff" * 16
    file.write_bytes(content)
    source.read_block(0)
    with pytest.raises(DataError, match=rf"{re.escape(str(file))}, row group 1"):
        source.read_block(1)

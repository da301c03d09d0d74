import gzip
import os
import re
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from torchrec.datasets.criteo import BinaryCriteoUtils

from dlrm_scale.config import Split
from dlrm_scale.config_io import load_config
from dlrm_scale.data import criteo
from dlrm_scale.data.criteo import CriteoNpySource, CriteoTsvSource, read_tsv
from dlrm_scale.errors import ConfigError, DataError
from dlrm_scale.features import CategoricalFeature, DenseFeature, FeatureSchema, Table
from tools import prepare_data

ROOT = Path(__file__).parents[2]
SAMPLE = Path(os.environ.get("DLRM_SCALE_DATA", ROOT / "../shared/data")) / "criteo_80k/day_sample.tsv.gz"
needs_sample = pytest.mark.skipif(not SAMPLE.exists(), reason=f"no Criteo sample at {SAMPLE}")

SCHEMA = FeatureSchema(
    tables={"hashed": Table(num_embeddings=2**32, embedding_dim=4)},
    dense=(DenseFeature(name="int_3", missing=-9.0),),
    categorical=(CategoricalFeature(name="cat_25", table="hashed"),),
)


def line(label: str = "0", int_3: str = "5", cat_25: str = "0a0b0c0d") -> str:
    return "\t".join([label, *[""] * 3, int_3, *[""] * 9, *["ff"] * 25, cat_25])


def open_tsv(file: Path, lines: list[str]) -> CriteoTsvSource:
    text = "\n".join(lines) + "\n"
    file.write_bytes(gzip.compress(text.encode()) if file.suffix == ".gz" else text.encode())
    return CriteoTsvSource(Split(paths=(str(file),)), SCHEMA)


def assert_refused(file: Path, lines: list[str], *parts: str) -> None:
    with pytest.raises(DataError) as e:
        open_tsv(file, lines).read_block(0)
    for part in (str(file), *parts):
        assert part in str(e.value)


@pytest.mark.parametrize("name", ["day.tsv", "day.tsv.gz"])
def test_fields_of_a_row(tmp_path, name):
    source = open_tsv(
        tmp_path / name, [line(), line("1", "-2", ""), line(int_3="", cat_25="F"), line(cat_25="ffffffff")]
    )
    rows = source.read_block(0)
    assert rows.labels_RT.tolist() == [[0], [1], [0], [0]]
    assert rows.dense_RF.tolist() == [[5], [-2], [-9], [5]]
    assert rows.ids["cat_25"].lengths.tolist() == [1, 0, 1, 1]
    assert rows.ids["cat_25"].values.tolist() == [0x0A0B0C0D, 15, 0xFFFFFFFF]


@pytest.mark.parametrize(
    ("bad", "parts"),
    [
        (line() + "\t00", ["41", "40"]),
        (line().rpartition("\t")[0], ["39", "40"]),
        (line(cat_25="12g4"), ["cat_25", "'12g4'", "hex"]),
        (line(cat_25="123456789"), ["cat_25", "'123456789'", "hex"]),
        (line(cat_25="é"), ["cat_25", "'é'", "hex"]),
        (line(int_3="5.5"), ["int_3", "'5.5'", "integer"]),
        (line(label="yes"), ["label", "'yes'", "integer"]),
        (line(label=""), ["label", "null"]),
        (line(label="2"), ["label", "2"]),
        ("", ["label", "null"]),
    ],
)
def test_a_bad_row_is_named(tmp_path, bad, parts):
    assert_refused(tmp_path / "day.tsv", [line(), line(cat_25=""), bad, line()], "row 2 ", *parts)


def test_a_header_line_is_told(tmp_path):
    assert_refused(tmp_path / "day.tsv", ["\t".join(criteo.COLUMNS), line()], "row 0 ", "no header line")


def test_rows_are_counted_over_the_whole_file(tmp_path):
    lines = [line()] * 30_000  # several of the reader's batches
    with pytest.raises(DataError, match=r"row 29500 .*cat_25 is 'x'"):
        open_tsv(tmp_path / "hex.tsv", [*lines[:29_500], line(cat_25="x"), *lines[29_501:]])
    with pytest.raises(DataError, match=r"row 29500 .*41 tab-separated"):
        open_tsv(tmp_path / "width.tsv", [*lines[:29_500], line() + "\t", *lines[29_501:]])


def test_files_that_are_no_tsv_are_refused(tmp_path):
    (tmp_path / "empty.tsv").touch()
    (tmp_path / "text.tsv.gz").write_text("not compressed")
    (tmp_path / "cut.tsv.gz").write_bytes(gzip.compress(line().encode() * 1000)[:-10])
    for name, part in (("empty.tsv", "no rows"), ("text.tsv.gz", "cannot be read"), ("cut.tsv.gz", "cannot be read")):
        with pytest.raises(DataError, match=rf"{name}.*{part}"):
            CriteoTsvSource(Split(paths=(str(tmp_path / name),)), SCHEMA)


def test_a_tsv_too_large_for_memory_is_refused_with_the_way_out(tmp_path, monkeypatch):
    monkeypatch.setattr(criteo, "MAX_TSV_ROWS", 3)
    open_tsv(tmp_path / "three.tsv", [line()] * 3)
    assert_refused(tmp_path / "four.tsv", [line()] * 4, "more than 3 rows", "tools.prepare_data criteo")


def test_columns_that_criteo_has_not_are_refused(tmp_path):
    (tmp_path / "day.tsv").write_text(line())
    schema = FeatureSchema(
        tables=SCHEMA.tables, categorical=(CategoricalFeature(name="cat_26", table="hashed"),), labels=("click",)
    )
    with pytest.raises(DataError, match=r"(?s)no column cat_26:.*nearest is cat_.*no column click:"):
        CriteoTsvSource(Split(paths=(str(tmp_path / "day.tsv"),)), schema)


# ---------------------------------------------------------------- npy
def triple(folder: Path, **changed: np.ndarray) -> Split:
    parts = {
        "dense": np.arange(26, dtype=np.float32).reshape(2, 13),
        "sparse": np.arange(52, dtype=np.int32).reshape(2, 26),
        "labels": np.array([[0], [1]], np.int32),
    }
    for name, part in (parts | changed).items():
        np.save(folder / f"day_{name}.npy", part)
    return Split(paths=(str(folder / "*_dense.npy"),))


def test_npy_columns(tmp_path):
    rows = CriteoNpySource(triple(tmp_path), SCHEMA).read_block(0)
    assert rows.dense_RF.tolist() == [[3], [16]]
    assert rows.ids["cat_25"].values.tolist() == [25, 51]
    assert rows.labels_RT.tolist() == [[0], [1]]


@pytest.mark.parametrize(
    ("changed", "part"),
    [
        ({"dense": np.ones((2, 13))}, r"_dense.npy is float64 .*float32 of shape \(rows, 13\)"),
        ({"sparse": np.ones((2, 27), np.int64)}, r"_sparse.npy is int64 of shape \(2, 27\)"),
        ({"labels": np.ones(2, np.int32)}, r"_labels.npy is int32 of shape \(2,\)"),
        ({"labels": np.ones((3, 1), np.int32)}, "_dense.npy has 2 rows, .* 3"),
    ],
)
def test_a_part_of_another_shape_or_type_is_refused(tmp_path, changed, part):
    with pytest.raises(DataError, match=part):
        CriteoNpySource(triple(tmp_path, **changed), SCHEMA)


def test_absent_and_broken_parts_are_refused(tmp_path):
    split = triple(tmp_path)
    sparse = tmp_path / "day_sparse.npy"
    for content, part in ((sparse.read_bytes()[:200], "cannot be read"), (b"", "cannot be read"), (None, "absent")):
        sparse.unlink()
        if content is not None:
            sparse.write_bytes(content)
        with pytest.raises(DataError, match=rf"day_sparse.npy.*{part}"):
            CriteoNpySource(split, SCHEMA)
        sparse.touch()
    with pytest.raises(DataError, match=r"name the \*_dense.npy files"):
        CriteoNpySource(Split(paths=(str(tmp_path / "day_labels.npy"),)), SCHEMA)


def test_a_second_logarithm_is_refused(tmp_path):
    schema = SCHEMA.model_copy(update={"dense": (DenseFeature(name="int_3", transform="log1p"),)})
    with pytest.raises(ConfigError, match=r"int_3.*log1p"):
        CriteoNpySource(triple(tmp_path), schema)


# ---------------------------------------------------------------- prepare_data criteo
def test_prepared_npy_is_what_torchrecs_tool_writes(tmp_path):
    rng = np.random.default_rng(0)
    columns = [
        rng.integers(0, 2, (500, 1)).astype("U12"),
        rng.integers(-3, 10**6, (500, 13)).astype("U12"),
        np.vectorize("{:08x}".format)(rng.integers(0, 2**32, (500, 26))),
    ]
    fields = np.concatenate(columns, axis=1)
    fields[:, 1:][rng.random((500, 39)) < 0.2] = ""
    source = tmp_path / "day.tsv"
    np.savetxt(source, fields, fmt="%s", delimiter="\t")
    theirs = [str(tmp_path / f"theirs_{part}.npy") for part in ("dense", "sparse", "labels")]
    BinaryCriteoUtils.tsv_to_npys(str(source), *theirs)
    assert prepare_data.main(["criteo", "--input", str(source), "--output", str(tmp_path), "--format", "npy"]) == 0
    for path in theirs:
        assert Path(path).read_bytes() == Path(path.replace("theirs", "day")).read_bytes()


def test_prepared_parquet_holds_what_the_tsv_holds(tmp_path):
    open_tsv(tmp_path / "day.tsv", [line(), line("1", "", ""), line(int_3="-7")])
    args = ["criteo", "--input", str(tmp_path / "day.tsv"), "--output", str(tmp_path / "out"), "--format", "parquet"]
    assert prepare_data.main(args) == 0
    (batch,) = read_tsv(tmp_path / "day.tsv", criteo.COLUMNS)
    assert pq.read_table(tmp_path / "out/day.parquet").to_pylist() == batch.to_pylist()


def test_a_bad_row_leaves_no_prepared_file(tmp_path, capsys):
    source = tmp_path / "day.tsv"
    for bad in (line(cat_25="zz"), line(label="")):
        source.write_text(f"{line()}\n{bad}\n")
        args = ["criteo", "--input", str(source), "--output", str(tmp_path / "out"), "--format", "npy"]
        assert prepare_data.main(args) == 1
        assert re.search(rf"^error: {re.escape(str(source))}, row 1 ", capsys.readouterr().err, re.MULTILINE)
        assert not list((tmp_path / "out").glob("*.npy"))


# ---------------------------------------------------------------- the real sample
@needs_sample
def test_the_sample_under_its_configuration():
    schema = load_config(ROOT / "configs/criteo_80k.yaml").features
    source = CriteoTsvSource(Split(paths=(str(SAMPLE),)), schema)
    blocks = [source.read_block(b) for b in range(len(source.block_starts) - 1)]
    labels = np.concatenate([b.labels_RT for b in blocks])
    assert len(labels) == 80_000 and round(float(labels.mean()), 4) == 0.0322
    assert source.mended["negative values of int_7 taken as 0"] == 4869

    with gzip.open(SAMPLE, "rt") as f:  # the plain way, on the rows of the second block
        plain = [text.rstrip("\n").split("\t") for _, text in zip(range(2 * 8192), f, strict=False)][8192:]
    np.testing.assert_allclose(
        blocks[1].dense_RF, np.log1p([[max(0, int(v or 0)) for v in row[1:14]] for row in plain]), rtol=1e-6
    )
    for number in (0, 13, 25):
        ids, rows = blocks[1].ids[f"cat_{number}"], schema.tables[f"cat_{number}"].num_embeddings
        expected = [int(row[14 + number], 16) % rows for row in plain if row[14 + number]]
        assert ids.values.tolist() == expected
        assert ids.lengths.tolist() == [int(row[14 + number] != "") for row in plain]

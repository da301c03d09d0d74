import re

import numpy as np
import pyarrow as pa
import pytest

from dlrm_scale.data.columns import check_columns
from dlrm_scale.data.decode import Decoder
from dlrm_scale.data.source import Rows
from dlrm_scale.errors import DataError
from dlrm_scale.features import CategoricalFeature, DenseFeature, FeatureSchema, Sequence, SequenceField, Table


def schema_with(policy: str = "error", dense: DenseFeature | None = None, max_length: int = 3) -> FeatureSchema:
    """One of each: item (single, shares its table with a history of two fields), tags (multi-hot), price, weight, group."""
    return FeatureSchema(
        tables={
            "item": Table(num_embeddings=10, embedding_dim=4, out_of_range=policy),
            "tag": Table(num_embeddings=10, embedding_dim=4, out_of_range=policy),
            "kind": Table(num_embeddings=10, embedding_dim=4, out_of_range=policy),
        },
        dense=(dense or DenseFeature(name="price"),),
        categorical=(
            CategoricalFeature(name="item", table="item"),
            CategoricalFeature(name="tags", table="tag", multi_hot=True),
        ),
        sequences=(
            Sequence(
                name="history",
                max_length=max_length,
                fields=(SequenceField(name="seen", table="item"), SequenceField(name="seen_kind", table="kind")),
            ),
        ),
        weight="weight",
        group="user",
    )


GOOD = {
    "price": pa.array([1.0, 2.0, 3.0]),
    "item": pa.array([4, None, 6]),
    "tags": pa.array([[1, 2], None, []], pa.list_(pa.int32())),
    "seen": pa.array([[], [1], [2, 3]], pa.list_(pa.int64())),
    "seen_kind": pa.array([[], [4], [5, 6]], pa.large_list(pa.uint32())),
    "label": pa.array([0, 1, 1]),
    "weight": pa.array([1.0, 0.0, 2.5]),
    "user": pa.array([7, 8, 9]),
}


def decode(schema: FeatureSchema, decoder: Decoder | None = None, **changed: pa.Array) -> Rows:
    columns = GOOD | changed
    check_columns(schema, pa.schema([(name, column.type) for name, column in columns.items()]), "day.parquet")
    return (decoder or Decoder(schema)).decode(columns, "day.parquet", first_row=100)


def assert_refused(*parts: str, schema: FeatureSchema | None = None, **changed: pa.Array) -> None:
    with pytest.raises(DataError) as e:
        decode(schema or schema_with(), **changed)
    for part in parts:
        assert re.search(rf"(?<![\w.]){re.escape(part)}(?![\w])", str(e.value)), f"{part!r} is not in: {e.value}"


def ids_of(rows: Rows, name: str) -> list[list[int]]:
    ids = rows.ids[name]
    return [ids.values[a:b].tolist() for a, b in zip(ids.offsets[:-1], ids.offsets[1:], strict=True)]


def test_each_kind_of_column():
    rows = decode(schema_with())
    assert rows.dense_RF.tolist() == [[1.0], [2.0], [3.0]]
    assert ids_of(rows, "item") == [[4], [], [6]]
    assert ids_of(rows, "tags") == [[1, 2], [], []]
    assert ids_of(rows, "seen") == [[], [1], [2, 3]]
    assert ids_of(rows, "seen_kind") == [[], [4], [5, 6]]
    assert rows.labels_RT.tolist() == [[0.0], [1.0], [1.0]]
    assert rows.weights_R.tolist() == [1.0, 0.0, 2.5]
    assert rows.groups_R.tolist() == [7, 8, 9]


@pytest.mark.parametrize(
    "kind", [pa.list_(pa.int32()), pa.large_list(pa.int64()), pa.list_(pa.uint32()), pa.list_(pa.int8())]
)
def test_a_slice_of_lists_holds_its_own_rows_only(kind):
    lists = pa.array([[99], [1, 2], None, [3], [99]], kind).slice(1, 3)  # 99 would be out of range
    assert ids_of(decode(schema_with(), tags=lists), "tags") == [[1, 2], [], [3]]


def test_ids_under_a_null_list_are_not_read():
    hidden = pa.ListArray.from_arrays([0, 1, 3, 4], pa.array([1, 99, 99, 2]), mask=pa.array([False, True, False]))
    assert ids_of(decode(schema_with(), tags=hidden), "tags") == [[1], [], [2]]


def test_int64_lists_are_views_of_the_files_buffer():
    values = pa.array([1, 2, 3])
    rows = decode(schema_with(), tags=pa.ListArray.from_arrays([0, 2, 3, 3], values))
    assert np.shares_memory(rows.ids["tags"].values, values.to_numpy())


def test_a_list_of_at_most_one_id_is_a_single_id():
    rows = decode(schema_with(), item=pa.array([[3], [], None], pa.list_(pa.int64())))
    assert ids_of(rows, "item") == [[3], [], []]


def test_several_ids_for_a_single_id_feature_are_refused():
    assert_refused("day.parquet", "row 101", "item", "2", "multi_hot", item=pa.array([[3], [1, 2], [4]]))


@pytest.mark.parametrize("bad", [10, -1])
@pytest.mark.parametrize(
    ("column", "table", "values"),
    [
        ("item", "item", lambda bad: pa.array([1, None, bad])),
        ("tags", "tag", lambda bad: pa.array([[1, 2], [], [3, bad]])),
        ("seen", "item", lambda bad: pa.array([[], [1], [bad, 1]])),
    ],
)
def test_an_id_out_of_range_is_named_with_all_that_finds_it(column, table, values, bad):
    named = (column, f"table {table}", "day.parquet", "row 102", f"id {bad}", "[0, 10)", "clip", "modulo")
    assert_refused(*named, **{column: values(bad)})


@pytest.mark.parametrize(
    ("policy", "expected", "done"), [("clip", [9, 0, 9], "clipped to [0, 9]"), ("modulo", [0, 9, 5], "taken modulo 10")]
)
def test_policies_mend_and_count_ids(policy, expected, done):
    schema = schema_with(policy)
    decoder = Decoder(schema)
    rows = decode(schema, decoder, tags=pa.array([[10, -1], [2**40 + 9], [3]]))
    assert ids_of(rows, "tags") == [expected[:2], expected[2:], [3]]
    assert decoder.mended == {f"ids of tags {done}": 3}


def test_unsigned_64_bit_hashes_are_taken_modulo_as_unsigned():
    huge = 2**64 - 1
    rows = decode(schema_with("modulo"), item=pa.array([huge, 3, 4], pa.uint64()))
    assert ids_of(rows, "item") == [[huge % 10], [3], [4]]
    assert_refused(f"id {huge}", "row 100", item=pa.array([huge, 3, 4], pa.uint64()))


def test_a_null_inside_a_list_is_refused():
    assert_refused("tags", "row 102", "null", tags=pa.array([[1], [], [2, None]]))


def test_ragged_fields_of_a_sequence_are_refused():
    assert_refused(
        "day.parquet", "row 102", "history", "seen has 2", "seen_kind has 1", seen_kind=pa.array([[], [4], [5]])
    )


def test_the_most_recent_events_are_kept_and_cut_rows_counted():
    schema = schema_with(max_length=2)
    decoder = Decoder(schema)
    seen, tags = pa.array([[1, 2, 3], [4, 5], [6, 7, 8, 9]]), pa.array([[3, 2, 1], [5, 4], [9, 8, 7, 6]])
    rows = decode(schema, decoder, seen=seen, seen_kind=tags)
    assert ids_of(rows, "seen") == [[2, 3], [4, 5], [8, 9]]
    assert ids_of(rows, "seen_kind") == [[2, 1], [5, 4], [7, 6]]
    assert decoder.mended == {"rows of sequence history cut to the last 2 events": 2}


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf"), 1e39])
@pytest.mark.parametrize("column", ["price", "weight"])
def test_non_finite_values_are_refused_whatever_the_policy(column, bad):
    clipping = schema_with(dense=DenseFeature(name="price", transform="log1p", negative="clip", missing=0.0))
    assert_refused(column, "row 101", str(bad), "finite", schema=clipping, **{column: pa.array([1.0, bad, 2.0])})


def test_negative_values_under_log1p():
    price = pa.array([-2, 0, 5])
    assert_refused(
        "price",
        "row 100",
        "-2.0",
        "log1p",
        "clip",
        schema=schema_with(dense=DenseFeature(name="price", transform="log1p")),
        price=price,
    )
    schema = schema_with(dense=DenseFeature(name="price", transform="log1p", negative="clip"))
    decoder = Decoder(schema)
    np.testing.assert_allclose(decode(schema, decoder, price=price).dense_RF[:, 0], np.log([1, 1, 6]), rtol=1e-6)
    assert decoder.mended == {"negative values of price taken as 0": 1}
    assert decode(schema_with(), price=price).dense_RF[:, 0].tolist() == [-2, 0, 5]  # no transform, no rule


def test_a_null_dense_value_is_refused_or_takes_what_stands_for_it_before_the_transform():
    price = pa.array([1, None, 3])
    assert_refused("price", "row 101", "null", "missing", price=price)
    schema = schema_with(dense=DenseFeature(name="price", transform="log1p", missing=6.0))
    np.testing.assert_allclose(decode(schema, price=price).dense_RF[:, 0], np.log([2, 7, 4]), rtol=1e-6)


@pytest.mark.parametrize(
    "labels", [pa.array([False, True, True]), pa.array([0.0, 1.0, 1.0]), pa.array([0, 1, 1], pa.uint8())]
)
def test_labels_of_any_numeric_type(labels):
    assert decode(schema_with(), label=labels).labels_RT.tolist() == [[0.0], [1.0], [1.0]]


@pytest.mark.parametrize(
    ("labels", "value"), [([0, 1, 2], "2"), ([0, 1, -1], "-1"), ([0.0, 1.0, 0.5], "0.5"), ([0, 1, float("nan")], "nan")]
)
def test_a_label_other_than_0_and_1_is_refused(labels, value):
    assert_refused("day.parquet", "row 102", "label", value, label=pa.array(labels))


def test_a_negative_weight_is_refused():
    assert_refused("weight", "row 100", "-0.5", weight=pa.array([-0.5, 1.0, 1.0]))


@pytest.mark.parametrize(("column", "kind"), [("label", pa.int8()), ("weight", pa.float32()), ("user", pa.int32())])
def test_a_null_where_each_row_needs_a_value_is_refused(column, kind):
    assert_refused(column, "row 101", "null", **{column: pa.array([1, None, 1], kind)})


@pytest.mark.parametrize(
    ("column", "kind", "rule"),
    [
        ("price", pa.string(), "numbers"),
        ("item", pa.string(), "integers"),
        ("item", pa.float64(), "integers"),
        ("tags", pa.int64(), "lists of integers"),
        ("seen", pa.int64(), "lists of integers"),
        ("seen", pa.list_(pa.float32()), "lists of integers"),
        ("label", pa.string(), "0 and 1"),
        ("weight", pa.bool_(), "numbers"),
        ("user", pa.string(), "integers"),
    ],
)
def test_a_column_of_the_wrong_type_is_refused_at_open(column, kind, rule):
    assert_refused("day.parquet", f"column {column}", str(kind), rule, **{column: pa.nulls(3, kind)})


def test_every_absent_column_is_named_with_the_nearest_present_one():
    found = pa.schema(
        [("pricee", pa.float64()), *((n, c.type) for n, c in GOOD.items() if n not in ("price", "label"))]
    )
    with pytest.raises(DataError) as e:
        check_columns(schema_with(), found, "day.parquet")
    assert "no column price:" in str(e.value) and "nearest is pricee" in str(e.value)
    assert "no column label:" in str(e.value)

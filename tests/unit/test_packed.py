"""Packed ids against plain lists of lists: random lengths, empty rows, parts that pack unlike one another."""

import numpy as np
import pytest

from dlrm_scale.data.packed import PackedIds, pack
from dlrm_scale.data.source import Jagged

KEYS = ("full", "may_miss", "bag", "first_event", "second_event", "other_full", "none")
Lists = dict[str, list[list[int]]]


def random_lists(rng: np.random.Generator, num_rows: int, most: int = 4) -> Lists:
    """`most`: ids of a row of the bag and the sequence."""
    bag, events = rng.integers(0, most + 1, (2, num_rows))
    lengths = {
        "full": np.ones(num_rows, int),
        "may_miss": rng.integers(0, 2, num_rows),
        "bag": bag,
        "first_event": events,
        "second_event": events,
        "other_full": np.ones(num_rows, int),
        "none": np.zeros(num_rows, int),
    }
    return {key: [rng.integers(1, 1000, n).tolist() for n in lengths[key]] for key in KEYS}


def jagged_of(lists: Lists) -> dict[str, Jagged]:
    """Values are slices of longer arrays; the two fields of the sequence share their offsets."""
    made: dict[str, Jagged] = {}
    for key, rows in lists.items():
        values = np.array([-1, -2, *(v for row in rows for v in row), -3], np.int64)
        made[key] = Jagged(values, 2 + np.cumsum([0, *map(len, rows)], dtype=np.int64))
    if "second_event" in made:
        made["second_event"] = Jagged(made["second_event"].values, made["first_event"].offsets)
    return made


def packed(lists: Lists) -> PackedIds:
    return pack([jagged_of(lists)], [len(lists["full"])])


def lists_of(ids: PackedIds) -> Lists:
    return {k: [j.values[a:b].tolist() for a, b in zip(j.offsets, j.offsets[1:], strict=False)] for k, j in ids.items()}


@pytest.fixture(params=range(5))
def rng(request: pytest.FixtureRequest) -> np.random.Generator:
    return np.random.default_rng(request.param)


@pytest.mark.parametrize("num_rows", [0, 1, 17])
@pytest.mark.parametrize("most", [1, 4])
def test_packing_changes_no_id_and_no_order(rng, num_rows, most):
    lists = random_lists(rng, num_rows, most)
    ids = packed(lists)
    assert lists_of(ids) == lists and tuple(ids) == KEYS and len(ids) == len(KEYS)
    for jagged in ids.values():
        assert jagged.values.dtype == jagged.offsets.dtype == np.int64


def test_what_has_at_most_one_id_a_row_is_in_the_matrix():
    ids = packed({**random_lists(np.random.default_rng(0), 50), "none": [[]] * 50})
    assert ids.single_keys == ("full", "may_miss", "other_full", "none")
    assert pack([jagged_of({"a": [[1], [2]]})], [2]).present_RK is None
    with pytest.raises(KeyError):
        ids["absent"]


def test_a_row_of_two_and_one_of_none_are_not_one_each():
    ids = pack([jagged_of({"a": [[1, 2], []]})], [2])
    assert ids.single_keys == () and lists_of(ids) == {"a": [[1, 2], []]}


@pytest.mark.parametrize("num_taken", [0, 1, 40])
def test_take_is_the_rows_at_the_index(rng, num_taken):
    lists = random_lists(rng, 17)
    index = rng.integers(0, 17, num_taken)
    taken = packed(lists).take(index)
    assert lists_of(taken) == {key: [rows[i] for i in index] for key, rows in lists.items()}
    assert taken["first_event"].offsets is taken["second_event"].offsets


@pytest.mark.parametrize("already_packed", [True, False])
@pytest.mark.parametrize(
    "most", [(4, 4), (1, 4), (1, 1)]
)  # a bag that is in the matrix of one part and not of the other
def test_parts_stand_behind_one_another(rng, already_packed, most):
    parts = [random_lists(rng, num_rows, m) for num_rows, m in zip((9, 12), most, strict=True)]
    make = packed if already_packed else jagged_of
    ids = pack([make(part) for part in parts], [9, 12])
    assert lists_of(ids) == {key: parts[0][key] + parts[1][key] for key in KEYS}


def test_a_part_where_each_row_has_an_id_beside_one_where_not(rng):
    full, gaps = {"a": [[1], [2]]}, {"a": [[], [3], []]}
    for parts in ([full, gaps], [gaps, full], [full, full]):
        packed_parts = [pack([jagged_of(part)], [len(part["a"])]) for part in parts]
        ids = pack(packed_parts, [len(part["a"]) for part in parts])
        assert lists_of(ids)["a"] == parts[0]["a"] + parts[1]["a"]


@pytest.mark.parametrize("keys", [KEYS, KEYS[::-1], ("full",), ("bag",), ("other_full", "full"), ("may_miss", "bag")])
@pytest.mark.parametrize("num_rows, batch_size", [(0, 3), (6, 6), (6, 9)])
def test_keyed_is_key_after_key_with_empty_rows_behind(rng, keys, num_rows, batch_size):
    lists = random_lists(rng, num_rows)
    values, lengths_KB = packed(lists).keyed(keys, batch_size)
    assert values.tolist() == [v for key in keys for row in lists[key] for v in row]
    missing = [0] * (batch_size - num_rows)
    assert lengths_KB.tolist() == [[*map(len, lists[key]), *missing] for key in keys]
    assert values.dtype == np.int64 and lengths_KB.dtype == np.int32

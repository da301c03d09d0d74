"""Tables without a model: what a file may say, and that a fault in it is named by file, line, table and value."""

import json

import pytest

from dlrm_scale.errors import ConfigError
from tools.plan_sharding.tables import read_tables

HEAD = "name,num_embeddings,embedding_dim,pooling_factor"


def written(folder, text: str, name: str = "tables.csv") -> str:
    (folder / name).write_text(text, encoding="utf-8")
    return str(folder / name)


def test_csv_and_json_say_the_same(tmp_path):
    csv = f"{HEAD},num_features,collection,data_type,pooling\nuser,1000,64,1,,,,\ntag,50,8,2.5,3,bags,fp16,mean\nevent,70,16,9.5,1,sequences,bf16,sum\n"
    entries = [
        {"name": "user", "num_embeddings": 1000, "embedding_dim": 64, "pooling_factor": 1},
        {"name": "tag", "num_embeddings": 50, "embedding_dim": 8, "pooling_factor": 2.5, "num_features": 3, "data_type": "fp16", "pooling": "mean"},
        {"name": "event", "num_embeddings": 70, "embedding_dim": 16, "pooling_factor": 9.5, "collection": "sequences", "data_type": "bf16"},
    ]  # fmt: skip
    specs = read_tables(written(tmp_path, csv))
    assert specs == read_tables(written(tmp_path, json.dumps(entries), "tables.json"))
    assert specs["tag"].expected_ids_by_feature == {"tag_0": 2.5, "tag_1": 2.5, "tag_2": 2.5}
    assert specs["user"].expected_ids_by_feature == {"user": 1.0} and specs["user"].data_type == "fp32"
    assert specs["event"].collection == "sequences"


def test_what_a_spreadsheet_writes_is_read(tmp_path):
    assert list(read_tables(written(tmp_path, f"\ufeff{HEAD}\r\na,10,8,1\r\n"))) == ["a"]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (f"{HEAD}\na,10,8,1\nb,0,8,1\n", ["line 3 (table b)", "num_embeddings", "greater than 0", "'0'"]),
        (f"{HEAD}\na,-5,8,1\n", ["line 2 (table a)", "num_embeddings", "'-5'"]),
        (f"{HEAD}\na,1.5,8,1\n", ["num_embeddings", "integer", "'1.5'"]),
        (f"{HEAD}\na,{10**23},8,1\n", ["num_embeddings", "less than", str(10**23)]),
        (f"{HEAD}\na,10,10,1\n", ["embedding_dim", "multiple of 4", "'10'"]),
        (f"{HEAD}\na,10,8,nan\n", ["pooling_factor", "finite", "'nan'"]),
        (f"{HEAD}\na,10,8,inf\n", ["pooling_factor", "finite", "'inf'"]),
        (f"{HEAD}\na,10,8,-1\n", ["pooling_factor", "'-1'"]),
        (f"{HEAD}\na,10,8,1\na,10,8,1\n", ["line 3", "table a", "second time"]),
        (f"{HEAD}\na,10\n", ["line 2", "not as many values"]),
        (f"{HEAD}\na,10,8,1,7\n", ["line 2", "not as many values"]),
        (f"{HEAD}\n,10,8,1\n", ["line 2", "name"]),
        (f"{HEAD},colour\na,10,8,1,red\n", ["colour", "no such column", "num_features"]),
        (f"{HEAD},name\na,10,8,1,b\n", ["column name stands twice"]),
        ("name,num_embeddings\na,10\n", ["embedding_dim: is required"]),
        ("name;num_embeddings\na;10\n", ["'name;num_embeddings'", "separate values by commas"]),
        (f"{HEAD}\na.b,10,8,1\n", ["table a.b", "may not hold a dot"]),
        (f"{HEAD},data_type\na,10,8,1,int8\n", ["data_type", "'fp32'", "'int8'"]),
        (f"{HEAD},collection\na,10,8,1,sequences\nb,10,16,1,sequences\n", ["one embedding_dim", "a: 8", "b: 16"]),
        (f"{HEAD},collection,pooling\na,10,8,1,sequences,mean\n", ["table a", "sequence's table is not pooled"]),
        (f"{HEAD},num_features\na,10,8,1,2\na_1,10,8,1,1\n", ["tables a and a_1", "feature a_1", "rename"]),
        (HEAD, ["has no tables"]),
        ("", ["has no tables"]),
        (f'{HEAD}\n"a,10,8,1\n', ["not readable as CSV"]),
    ],
)
def test_a_bad_csv_is_refused_with_place_and_value(tmp_path, text, said):
    path = written(tmp_path, text)
    with pytest.raises(ConfigError) as e:
        read_tables(path)
    assert all(part in str(e.value) for part in [path, *said]), str(e.value)
    assert "\n" not in str(e.value) and e.value.exit_code == 2


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('[{"name": "a", "num_embeddings": 10, "embedding_dim": 8, "pooling_factor": NaN}]', ["entry 0 (table a)", "nan"]),
        ('[{"name": "a", "num_embeddings": "10", "embedding_dim": 8, "pooling_factor": 1}]', ["valid integer", "'10'"]),
        ('{"a": {"num_embeddings": 10}}', ["list of objects", "num_embeddings"]),
        ("[1, 2]", ["list of objects"]),
        ("[{]", ["not readable as JSON"]),
        ("[]", ["has no tables"]),
    ],
)  # fmt: skip
def test_bad_json_is_refused(tmp_path, text, said):
    path = written(tmp_path, text, "tables.json")
    with pytest.raises(ConfigError) as e:
        read_tables(path)
    assert all(part in str(e.value) for part in [path, *said]), str(e.value)


def test_a_file_that_cannot_be_read_is_named(tmp_path):
    (tmp_path / "bytes.csv").write_bytes(b"\xff\xfe\x00")
    for path, said in (
        (tmp_path / "none.csv", "No such file"),
        (tmp_path, "Is a directory"),
        (tmp_path / "bytes.csv", "utf-8"),
    ):
        with pytest.raises(ConfigError, match=said) as e:
            read_tables(path)
        assert str(path) in str(e.value)

"""The loader's benchmark: whose rows it counts, and that its parts are the whole."""

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dlrm_scale.config import RunConfig
from dlrm_scale.config_io import parse_config
from dlrm_scale.data.open import open_source
from tests.support.configs import tiny_config
from tools.benchmark.data import summary
from tools.benchmark.data_reading import Pass, read_once, read_plainly
from tools.benchmark.plain_reading import plain_batches


@pytest.mark.parametrize("max_rows, expected", [(10_000, 4_500), (2_000, 1_000)])
def test_one_ranks_rows_are_counted_and_the_parts_add_up(max_rows, expected):
    config = tiny_config(data={"source": {"kind": "synthetic", "num_train": 9000, "num_eval": 1}})
    source = open_source(config.data, config.features, "train", 0)
    found = read_once(config, source, num_ranks=2, max_rows=max_rows)
    assert found.rows == expected
    assert sum(found.parts.values()) == pytest.approx(found.cpu_seconds)
    assert found.parts["read"] > 0 and found.parts["shuffle"] > 0 and found.parts["batch"] > 0


def parquet_config(folder) -> RunConfig:
    """One single id with nulls, one list, in row groups of 30."""
    ids = pa.array(np.arange(100), mask=np.arange(100) % 10 == 0)
    lists = pa.array([list(range(row % 3)) for row in range(100)], pa.list_(pa.int32()))
    table = pa.table({"user": ids, "events": lists, "label": np.zeros(100, np.int32)})
    pq.write_table(table, folder / "part.parquet", row_group_size=30)
    tree = tiny_config().model_dump(mode="json")
    tree["features"] = {
        "tables": {name: {"num_embeddings": 100, "embedding_dim": 4} for name in ("user", "item")},
        "categorical": [{"name": "user", "table": "user"}],
        "sequences": [{"name": "past", "max_length": 3, "fields": [{"name": "events", "table": "item"}]}],
    }
    tree["data"]["source"] = {"kind": "parquet", "train": {"paths": [f"{folder}/*.parquet"]}}
    tree["sharding"]["tables"] = {}
    return parse_config(tree, "the test")


def test_the_plain_loop_reads_whole_row_groups_and_starts_again(tmp_path):
    config = parquet_config(tmp_path)
    assert list(plain_batches(config)) == [30, 30, 30, 10]
    assert read_plainly(config, 50).rows == 60
    assert read_plainly(config, 101).rows == 130


def test_what_is_no_file_has_no_plain_loop():
    assert plain_batches(tiny_config()) is None


def test_ratios_are_of_one_rounds_readings():
    loader = [
        Pass(100, 9.0, 1.0, {"read": 0.5}),
        Pass(100, 9.0, 4.0, {"read": 1.5}),
        Pass(100, 9.0, 2.0, {"read": 1.0}),
    ]
    plain = [Pass(300, 9.0, 1.0, {}), Pass(300, 9.0, 4.0, {}), Pass(300, 9.0, 2.0, {})]
    found = summary(plain, loader)
    assert found["over_loader"] == {"median": 3.0, "p10": 3.0, "p90": 3.0}
    assert summary(loader, loader)["parts_ns_per_row"] == {"read": pytest.approx(1e7)}

"""No rank's memory ever holds a table, or a part of one, that it does not own: not while it builds, shards and fills them."""

import threading
import time
from pathlib import Path

import pytest
import torch

from dlrm_scale.config import RunConfig
from dlrm_scale.models.ranking_model import build_model
from dlrm_scale.sharding.apply import shard_model
from dlrm_scale.sharding.plan import Plan
from tests.support.configs import tiny_config
from tests.support.twin import make_plan

TABLE_BYTES = 400e6
SLACK_BYTES = 120e6  # the blocks that values are drawn in, and what else the process does


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def growth_bytes(config: RunConfig, plan: Plan) -> int:
    """How far this rank's resident memory rises above where it was, at its highest (sampled each 2 ms)."""
    before, peak, done = resident_bytes(), 0, threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.is_set():
            peak = max(peak, resident_bytes())
            time.sleep(0.002)

    watcher = threading.Thread(target=watch)
    watcher.start()
    cpu = torch.device("cpu")
    model = shard_model(build_model(config, dense_device=cpu), plan, config, cpu)
    done.set()
    watcher.join()
    del model
    return peak - before


@pytest.mark.parametrize(
    ("rules", "owned"),
    [
        ({"types": ["row_wise"]}, [0.5, 0.5]),
        ({"types": ["column_wise"], "min_partition": 32}, [0.5, 0.5]),
        ({"types": ["table_wise"], "pin": [1]}, [0.0, 1.0]),
    ],
    ids=["row_wise", "column_wise", "table_wise"],
)
@pytest.mark.parametrize("data_type", ["fp32", "fp16"])
def test_a_rank_holds_its_own_part_alone(two_ranks, rules, owned, data_type):
    rows = int(TABLE_BYTES / 64 / {"fp32": 4, "fp16": 2}[data_type])
    config = tiny_config(
        features={
            "tables": {
                "user": {"num_embeddings": rows, "embedding_dim": 64, "data_type": data_type},
                "item": {"num_embeddings": 300, "embedding_dim": 8},
            },
            "categorical": [{"name": "user", "table": "user"}],
            "sequences": [{"name": "h", "max_length": 3, "fields": [{"name": "hi", "table": "item"}]}],
        },
        sharding={"tables": {"user": rules}},
    )
    for part, grown in zip(owned, two_ranks.run(growth_bytes, config, make_plan(config, 2, 2)), strict=True):
        assert grown <= part * TABLE_BYTES + SLACK_BYTES, (part, grown)
        assert grown >= 0.5 * part * TABLE_BYTES, (part, grown)  # or it was measured past the tables

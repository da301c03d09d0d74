"""No rank's memory ever holds a table, or a part of one, that it does not own: not while it builds, shards and fills them."""

import gc
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from dlrm_scale.config import RunConfig
from dlrm_scale.models.ranking_model import build_model
from dlrm_scale.sharding.apply import ShardedModel, shard_model
from dlrm_scale.sharding.plan import Plan
from tests.support.configs import tiny_config
from tests.support.twin import make_plan

TABLE_BYTES = 400e6
SLACK_BYTES = 60e6  # the blocks that values are drawn in, and what else the process does


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def growth_bytes(config: RunConfig, plan: Plan, small: RunConfig, small_plan: Plan) -> int:
    """How far this rank's resident memory rises above where it was, at its highest (sampled each 2 ms).

    First a small model is made, for what is loaded only once, and what is left of earlier ones (they refer to themselves) let go.
    """
    made(small, small_plan)
    gc.collect()
    before, peak, done = resident_bytes(), 0, threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.is_set():
            peak = max(peak, resident_bytes())
            time.sleep(0.002)

    watcher = threading.Thread(target=watch)
    watcher.start()
    model = made(config, plan)
    done.set()
    watcher.join()
    del model
    gc.collect()
    return peak - before


def made(config: RunConfig, plan: Plan) -> ShardedModel:
    cpu = torch.device("cpu")
    return shard_model(build_model(config, dense_device=cpu), plan, config, cpu)


def config_of(rows: int, data_type: str, rules: dict[str, Any]) -> RunConfig:
    return tiny_config(
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
    config, small = (config_of(n, data_type, rules) for n in (rows, 1000))
    plans = [make_plan(c, 2, 2) for c in (config, small)]
    for part, grown in zip(owned, two_ranks.run(growth_bytes, config, plans[0], small, plans[1]), strict=True):
        assert grown <= part * TABLE_BYTES + SLACK_BYTES, (part, grown)
        assert grown >= 0.5 * part * TABLE_BYTES, (part, grown)  # or it was measured past the tables

"""Exchanges in 16 bits equal the plain fp32 twin to the rounding of their format, for every type of table.

Three steps of Adagrad move weights by 0.4. A row and its gradient are rounded once each a step (sums of row-wise shards once
more): measured, weights end 9e-4 apart with fp16's 11 bits and 5.5e-3 with bf16's 8, logits 2e-4 and 2e-3.
"""

from functools import partial
from typing import Any

import pytest
import torch

from dlrm_scale.config import RunConfig
from dlrm_scale.config_io import parse_config
from dlrm_scale.models.ranking_model import build_model
from dlrm_scale.sharding.apply import shard_model
from dlrm_scale.sharding.plan import Plan
from tests.distributed.test_sharding_parity import SEQUENCE_TYPES, TOLERANCE
from tests.support.twin import BAG_TYPES, case_config, compare, make_plan

TABLES = {"fp16": 2e-3, "bf16": 1.6e-2}  # 2^3 apart, as the formats are
LOGITS = {"fp16": 5e-4, "bf16": 4e-3}


def changed(config: RunConfig, **sections: dict[str, Any]) -> RunConfig:
    tree = config.model_dump(mode="json")
    for name, values in sections.items():
        tree[name] |= values
    return parse_config(tree, "tests")


def worst_of(ranks, config: RunConfig, least_moved: float = 0.1) -> dict[str, float]:
    """By what is compared: the largest difference from the twin on any rank."""
    results = ranks.run(compare, config, make_plan(config, ranks.world_size, 2))
    assert results[0].pop("moved") >= least_moved, "the tables did not train"
    return {name: max(result.get(name, 0.0) for result in results) for name in results[0]}


def check(ranks, config: RunConfig) -> None:
    """Within each format's rounding; and bf16, which TorchRec likes to replace by fp16, is really coarser."""
    logits = {}
    for precision in ("fp16", "bf16"):
        both = {"communication": {"forward": precision, "backward": precision}}
        worst = worst_of(ranks, changed(config, sharding=both))
        tables = {name: diff for name, diff in worst.items() if name.startswith("embeddings.")}
        assert max(tables.values()) <= TABLES[precision], tables
        logits[precision] = worst["logits"]
        assert TOLERANCE / 5 < worst["logits"] <= LOGITS[precision], worst["logits"]
    assert logits["bf16"] > 3 * logits["fp16"]


@pytest.mark.parametrize("bag_type", BAG_TYPES)
def test_bag_tables(four_ranks, bag_type):
    check(four_ranks, case_config(bag_type, "row_wise", {"name": "rowwise_adagrad", "lr": 0.1}))


@pytest.mark.parametrize("sequence_type", SEQUENCE_TYPES)
def test_sequence_tables(two_ranks, sequence_type):
    check(two_ranks, case_config("row_wise", sequence_type, {"name": "rowwise_adagrad", "lr": 0.1}))


def test_one_direction_alone(two_ranks):
    """Of tables whose steps are too small to show: backward only, the logits are fp32's; forward only, they are not."""
    config = partial(changed, case_config("table_wise", "table_wise", {"name": "rowwise_adagrad", "lr": 1e-12}))
    backward, forward = (
        worst_of(two_ranks, config(sharding={"communication": {direction: "bf16"}}), least_moved=0.0)
        for direction in ("backward", "forward")
    )
    assert backward["logits"] <= TOLERANCE / 5 < forward["logits"]


@pytest.mark.parametrize(("precision", "tolerance"), [("fp16", 2e-5), ("bf16", 2e-4)])
def test_dense_gradients_in_16_bits(two_ranks, precision, tolerance):
    config = case_config("table_wise", "table_wise", {"name": "sgd", "lr": 0.5})
    exact, rounded = (
        dense_of(worst_of(two_ranks, changed(config, train={"all_reduce": {"precision": p}}), least_moved=1e-3))
        for p in ("fp32", precision)
    )
    assert 3 * exact < rounded <= tolerance


def dense_of(worst: dict[str, float]) -> float:
    return max(diff for name, diff in worst.items() if name.startswith("dense."))


def bucket_bytes(config: RunConfig, plan: Plan) -> int:
    cpu = torch.device("cpu")
    return shard_model(build_model(config, dense_device=cpu), plan, config, cpu)._dmp_wrapped_module.bucket_bytes_cap


def test_buckets_are_as_large_as_asked(two_ranks):
    config = changed(case_config("table_wise", "table_wise", {}), train={"all_reduce": {"bucket_mb": 3}})
    assert two_ranks.run(bucket_bytes, config, make_plan(config, 2, 2)) == [3 * 2**20] * 2

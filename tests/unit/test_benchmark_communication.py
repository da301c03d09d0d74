"""The collectives of a step, counted by hand."""

import argparse

import yaml
from rich.console import Console

from dlrm_scale.cluster import this_cluster
from dlrm_scale.sharding.plan import plan_request
from dlrm_scale.sharding.planner import find_plan
from tests.support.configs import TINY, tiny_config
from tools.benchmark import communication
from tools.benchmark.communication_ranks import Exchange, Measured, exchanges
from tools.benchmark.ranks import TRAIN_SILENCE_SECONDS

TYPES = {"user": "row_wise", "tag": "column_wise", "item": "row_wise", "category": "table_wise"}


def test_exchanges_are_those_of_the_plan():
    """32 samples a rank, dim 8; a history of 6 events with two fields, beside one id of each of their tables."""
    rules = {name: {"types": [kind]} for name, kind in TYPES.items()} | {
        "tag": {"types": ["column_wise"], "min_partition": 4}
    }
    config = tiny_config(sharding={"tables": rules, "communication": {"backward": "bf16"}})
    plan = find_plan(plan_request(config, this_cluster(2, 2, "cpu"), 0), num_rounds=20).plan
    assert {name: table.sharding_type for name, table in plan.tables.items()} == TYPES
    found = {e.what: (e.collective, e.numbers, e.used) for e in exchanges(config, plan, 99)}
    vectors = 1 + 7 + 7  # of a sample: its pooled tags, and an id and six events of item and of category
    assert found == {
        "ids": ("all-to-all", 32 * (1 + 2 * 3 + 7 + 7), None),  # the tags' ids go to both column shards
        "rows forward": ("all-to-all", 32 * vectors * 8, "fp32"),
        "sums forward": ("reduce-scatter", 32 * 2 * 8, "fp32"),
        "gradients of rows": ("all-to-all", 32 * vectors * 8, "bf16"),
        "gradients of sums": ("all-gather", 32 * 2 * 8, "bf16"),
        "dense gradients": ("all-reduce", 99, "fp32"),
    }


def test_replicated_tables_exchange_their_gradients_only():
    rules = {name: {"types": ["data_parallel"]} for name in ("user", "tag")}
    config = tiny_config(sharding={"tables": rules | {n: {"types": ["table_wise"]} for n in ("item", "category")}})
    plan = find_plan(plan_request(config, this_cluster(2, 2, "cpu"), 0), num_rounds=20).plan
    found = {e.what: e.numbers for e in exchanges(config, plan, 0)}
    rows = {"rows forward": 32 * 14 * 8, "gradients of rows": 32 * 14 * 8}
    assert found == {"ids": 32 * 14, **rows, "gradients of replicated tables": (500 + 100) * 8}


def test_a_step_makes_the_exchanges_of_all_its_micro_batches(tmp_path, monkeypatch):
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(TINY))
    asked = {}

    def ranks(work, arguments, *_, silence_seconds, **__):
        asked["silence"] = silence_seconds
        exchange = Exchange("dense gradients", "all-reduce", 99, "bf16")
        return [([Measured(exchange, {"bf16": 198}, {"fp32": 9.0, "bf16": 5.0})], 100.0)]

    monkeypatch.setattr(communication, "run_on_ranks", ranks)
    changes = ["train.accumulate_steps=4"]
    args = argparse.Namespace(config=str(tmp_path / "config.yaml"), changes=changes, nproc=2, seconds=1)
    result = communication.run(args, Console(stderr=True))
    assert (result["micro_batches"], result["alone_ms"], result["share"]) == (4, 20.0, 0.2)
    assert asked["silence"] == TRAIN_SILENCE_SECONDS

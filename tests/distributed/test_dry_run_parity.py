"""What the dry run builds on meta is what real ranks build: the same shards, bytes and exchanges on four gloo ranks of two hosts."""

from dataclasses import astuple

import torch
import torch.distributed as dist

from dlrm_scale.config import RunConfig
from dlrm_scale.models.ranking_model import build_model
from dlrm_scale.sharding.apply import shard_model, shard_on_meta
from dlrm_scale.sharding.meta_world import meta_world
from dlrm_scale.sharding.plan import Plan, plan_request
from tests.support.plans import EVERY_KIND, cluster, every_kind_config, hand_plan
from tools.plan_sharding.dry_run import built_bytes, built_shardings, built_shards, columns_from_rank, lists_to_rank

CPU = torch.device("cpu")


def described(embeddings: torch.nn.Module, plan: Plan, config: RunConfig) -> dict:
    built = list(built_shardings(embeddings))
    exchanges = {}
    for sharding in built:
        if sharding.sharding_type != "data_parallel":
            lists = lists_to_rank(plan, sharding, sharding.sharding.create_input_dist(CPU))
            columns = columns_from_rank(plan, sharding) if sharding.collection == "bags" else None
            exchanges[sharding.collection, sharding.sharding_type] = (lists, columns)
    shards = sorted(astuple(shard) for shard in built_shards(built))
    return {"shards": shards, "bytes": dict(built_bytes(built, config.train.sparse)), "exchanges": exchanges}


def really(config: RunConfig, plan: Plan) -> dict:
    model = build_model(config, dense_device=CPU)
    sharded = shard_model(model, plan, config, CPU)
    state = sharded.module.state_dict()
    found = described(sharded.module.embeddings, plan, config)
    mine = [
        (name.split(".")[-2], *shard.metadata.shard_offsets, *shard.tensor.shape)
        for name, value in state.items()
        if hasattr(value, "local_shards")
        for shard in value.local_shards()
    ]
    dist.barrier()
    return {**found, "allocated": sorted(mine)}


def on_meta(config: RunConfig, plan: Plan, rank: int) -> dict:
    with meta_world(plan, rank):
        model = build_model(config, dense_device=torch.device("meta"))
        return described(shard_on_meta(model, plan, config.train.sparse).module.embeddings, plan, config)


def test_meta_builds_what_four_ranks_build(four_ranks):
    config = every_kind_config()
    plan = hand_plan(plan_request(config, cluster("cpu", 4, 2), num_dense_parameters=0), EVERY_KIND)
    for rank, real in enumerate(four_ranks.run(really, config, plan)):
        dry = on_meta(config, plan, rank)
        allocated = real.pop("allocated")
        assert dry == real
        assert allocated == [shard[:5] for shard in dry["shards"] if shard[0] != "copied"]

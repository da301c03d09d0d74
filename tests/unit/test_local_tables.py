"""The states that FBGEMM keeps for each optimizer, CUDA's too, built without a GPU: a checkpoint holds these and no others."""

from typing import get_args

import pytest
from torch import nn

from dlrm_scale.config import SparseOptimizer, SparseOptimizerName
from dlrm_scale.models.embeddings import Embeddings
from dlrm_scale.sharding.apply import shard_on_meta
from dlrm_scale.sharding.local_tables import TABLE_STATES, local_shards
from dlrm_scale.sharding.meta_world import meta_world
from dlrm_scale.sharding.plan import plan_request
from tests.support.configs import tiny_config
from tests.support.plans import cluster, hand_plan

KINDS = {"user": "row_wise", "item": "column_wise", "category": "table_wise", "tag": "table_row_wise"}


@pytest.mark.parametrize("optimizer", get_args(SparseOptimizerName))
def test_every_optimizers_states_are_known_by_name_and_shape(optimizer):
    config = tiny_config(train={"sparse": {"name": optimizer}})
    plan = hand_plan(plan_request(config, cluster("cuda", 4, 2), 0), KINDS)
    seen = {}
    for rank in range(4):
        with meta_world(plan, rank):
            model = nn.Module()
            model.embeddings = Embeddings(config.features)
            for shard in local_shards(shard_on_meta(model, plan, SparseOptimizer(name=optimizer)).module):
                planned = [
                    s
                    for s in plan.tables[shard.table].shards
                    if (s.rank, s.row, s.column) == (rank, shard.row, shard.column)
                ]
                assert [tuple(shard.weight.shape)] == [(s.num_rows, s.num_columns) for s in planned]
                rows = len(shard.weight)
                kinds = {(rows,): "row", tuple(shard.weight.shape): "weight"}
                seen[shard.table] = {name: kinds[tuple(state.shape)] for name, state in shard.states.items()}
    assert seen == dict.fromkeys(KINDS, TABLE_STATES[optimizer])

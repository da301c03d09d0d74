"""2D sparse parallelism in the planner: groups of ranks with a copy of the tables each, placed as TorchRec's DMPCollection places them."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from fbgemm_gpu.split_table_batched_embeddings_ops_training import (
    ComputeDevice,
    EmbeddingLocation,
    SplitTableBatchedEmbeddingBagsCodegen,
)
from torchrec.distributed.model_parallel import DMPCollection

from dlrm_scale.config import PLAIN_SPARSE_OPTIMIZERS, TableSharding
from dlrm_scale.errors import ConfigError, PlanError
from dlrm_scale.sharding.apply import to_torchrec
from dlrm_scale.sharding.options import STAGES, enumerate_options
from dlrm_scale.sharding.plan import PlanRequest, load_plan, save_plan
from dlrm_scale.sharding.planner import find_plan, prepare
from dlrm_scale.sharding.sharders import FUSED_OPTIMIZERS
from dlrm_scale.sharding.storage import OPTIMIZER_STATES
from dlrm_scale.training.run import make_plan
from tests.support.configs import tiny_config
from tests.support.requests import cluster, random_request, request_of
from tools.plan_sharding.dry_run import dry_run

GROUPS, STEPS = 2, 10
CUDA = cluster("cuda", 16, 8)


def grouped(request: PlanRequest, groups: int = GROUPS, **update) -> PlanRequest:
    update = {"replica_groups": groups, "replica_sync_steps": STEPS, **update}
    return request.model_copy(update={"sharding": request.sharding.model_copy(update=update)})


@pytest.fixture(scope="module")
def request_16() -> PlanRequest:
    return grouped(random_request(5, CUDA, constrained=False))


@pytest.fixture(scope="module")
def plan(request_16):
    return find_plan(request_16, num_rounds=30).plan


def test_a_group_is_planned_as_a_cluster_of_its_part_of_every_host(request_16, plan):
    small = CUDA.model_copy(update={"num_ranks": 8, "ranks_per_host": 4})
    assert request_16.group == small.model_copy(update={"host_memory_gb": request_16.group.host_memory_gb})
    assert request_16.group.host_bytes_per_rank == pytest.approx(CUDA.host_bytes_per_rank)
    assert len(plan.ranks) == 8 and {r for t in plan.tables.values() for r in t.ranks} <= set(range(8))
    # All stages but the sync, and data_parallel, which all ranks share, cost what they cost on that cluster
    free = {name: TableSharding(kernels=("fused",)) for name in request_16.tables}
    alone, two = (
        enumerate_options(r)
        for r in (
            request_16.model_copy(update={"cluster": small, "sharding": request_16.sharding.model_copy(update={"tables": free, "replica_groups": 1})}),
            request_16.model_copy(update={"sharding": request_16.sharding.model_copy(update={"tables": free})}),
        )
    )  # fmt: skip
    sharded_G = alone.option_type[alone.group_option] != "data_parallel"
    np.testing.assert_array_equal(alone.group_ms[sharded_G, :-1], two.group_ms[sharded_G, :-1])


def test_the_sync_is_a_ring_over_the_copies_spread_over_the_steps(request_16, plan):
    for load in plan.ranks:
        of_tables = {n for n, t in plan.tables.items() if t.sharding_type == "data_parallel"}
        if of_tables:
            continue
        num_bytes = load.device_bytes["weights"] + load.device_bytes["optimizer"]
        spilled = load.host_bytes["weights"] + load.host_bytes["optimizer"]
        expected_ms = 2 * (GROUPS - 1) / GROUPS * (num_bytes / 310e6 + spilled / 47e6) / STEPS
        assert load.step_ms["replica_sync"] == pytest.approx(expected_ms)
    assert max(load.step_ms["replica_sync"] for load in plan.ranks) > 0
    scored = [sum(ms for stage, ms in load.step_ms.items() if stage != "input_dist_comms") for load in plan.ranks]
    assert plan.score_ms == pytest.approx(max(scored))
    one = enumerate_options(grouped(request_16, 1))
    assert not one.group_ms[:, STAGES.index("replica_sync")].any()


def test_torchrec_maps_group_ranks_to_ranks_as_the_plan_says(plan, monkeypatch):
    monkeypatch.setattr("torchrec.distributed.model_parallel.get_local_size", lambda: 8)
    for rank in range(16):
        given = to_torchrec(plan)
        DMPCollection._remap_sharding_plan(
            SimpleNamespace(_device=torch.device("cuda")), given, rank, step=GROUPS, sharding_group_size=8
        )
        for module in given.plan.values():
            for name, table in module.items():
                assert table.ranks == [r * GROUPS + rank % GROUPS for r in plan.tables[name].ranks]


def test_what_cannot_be_averaged_is_left_out_or_refused(request_16):
    assert "fused_uvm_caching" not in enumerate_options(request_16).option_kernel
    assert "fused_uvm_caching" in enumerate_options(grouped(request_16, 1)).option_kernel
    with pytest.raises(ConfigError, match=r"averages copies of tables that train by .*sgd only.*is adam; change"):
        prepare(request_16.model_copy(update={"sparse_optimizer": "adam"}))
    only = {"t0": TableSharding(kernels=("fused_uvm_caching",))}
    with pytest.raises(ConfigError, match="fused_uvm_caching, which cuda does not have with replica groups"):
        prepare(grouped(request_of(dict(list(request_16.tables.items())[:1]), CUDA, only)))
    with pytest.raises(ConfigError, match=r"replica_groups is 3, but each host's 8 ranks.*take one of 1, 2, 4, 8"):
        prepare(grouped(request_16, 3))


def test_a_plan_carries_its_groups_and_is_not_taken_for_another(plan, request_16, tmp_path):
    save_plan(plan, tmp_path / "plan.json")
    assert load_plan(tmp_path / "plan.json", request_16) == plan
    with pytest.raises(PlanError, match=r"sharding.replica_groups is 2 in the plan, 1 here"):
        load_plan(tmp_path / "plan.json", grouped(request_16, 1))


def test_the_dry_run_builds_a_rank_of_the_first_group(plan):
    done = dry_run(None, plan, 7)
    assert done.ok, [row for row in done.rows if not row.ok]
    assert done.subject == "rank 7 of replica group 0"
    with pytest.raises(PlanError, match="ranks 0 to 7"):
        dry_run(None, plan, 8)


def test_the_trainer_refuses_groups():
    with pytest.raises(ConfigError, match=r"replica_groups is 2, which can be planned but not trained"):
        make_plan(tiny_config(sharding={"replica_groups": 2}), SimpleNamespace())


@pytest.mark.parametrize("name", PLAIN_SPARSE_OPTIMIZERS)
def test_torchrec_averages_the_weights_and_state_of_the_optimizers_that_are_allowed(name):
    tbe = SplitTableBatchedEmbeddingBagsCodegen(
        [(7, 8, EmbeddingLocation.HOST, ComputeDevice.CPU)], optimizer=FUSED_OPTIMIZERS[name], learning_rate=0.1
    )
    context = SimpleNamespace(modules_to_sync=[(tbe, None)])
    DMPCollection._cache_sync_tensors(None, [context])
    (weights,) = context.weights_by_dtype[torch.float32]
    states = context.optimizer_tensors_by_dtype.get(torch.float32, [])
    assert weights.data_ptr() == tbe.split_embedding_weights()[0].data_ptr()
    by_weight, by_row = OPTIMIZER_STATES[name]
    assert sum(state.numel() for state in states) == by_weight * 7 * 8 + by_row * 7

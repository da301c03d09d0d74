"""The dry run of plans that are right on every rank, and of plans that lie."""

import json
import os
import resource
import time
from dataclasses import asdict

import pytest
import torch
import torch.distributed as dist
from torchrec.distributed import batched_embedding_kernel, comm

from dlrm_scale.config import RunConfig
from dlrm_scale.errors import PlanError
from dlrm_scale.models.dense_trace import trace_dense
from dlrm_scale.sharding.plan import Plan, PlanRequest, TableSpec, plan_request
from tests.support.plans import EVERY_KIND, cluster, every_kind_config, hand_plan
from tools.plan_sharding.dry_run import DryRun, dry_run


def wrong(done: DryRun) -> dict[str, tuple[str, str]]:
    return {row.what: (row.predicted, row.built) for row in done.rows if not row.ok}


def request_of(config: RunConfig, device: str = "cpu") -> PlanRequest:
    on = cluster(device, 4, 2)
    trace = trace_dense(config, config.train.global_batch_size // 4, on.device)
    return plan_request(config, on, trace.num_parameters, trace.activation_bytes)


@pytest.fixture(scope="module")
def config() -> RunConfig:
    return every_kind_config()


@pytest.fixture(scope="module")
def plan(config) -> Plan:
    return hand_plan(request_of(config), EVERY_KIND)


@pytest.mark.parametrize("rank", range(4))
def test_a_right_plan_holds_on_every_rank(config, plan, rank):
    done = dry_run(config, plan, rank)
    assert done.ok, wrong(done)
    said = " ".join(row.what for row in done.rows)
    for what in (
        "validator",
        "table copied",
        "bytes of optimizer",
        "grid_shard: columns",
        "sequences row_wise",
        "dense",
    ):
        assert what in said
    assert json.loads(json.dumps(asdict(done)))["rank"] == rank


@pytest.mark.parametrize("kernel", ["fused", "fused_uvm", "fused_uvm_caching"])
def test_cuda_kernels_are_built_in_their_tier_without_a_gpu(config, kernel):
    tables = {name: {"num_embeddings": 1_000_003} for name in EVERY_KIND if name not in ("short", "copied")}
    large = config.model_dump(mode="json")
    for name, values in tables.items():
        large["features"]["tables"][name].update(values)
    large = RunConfig.model_validate_json(json.dumps(large))
    done = dry_run(None, hand_plan(request_of(large, "cuda"), EVERY_KIND, kernel), 1)
    assert done.ok, wrong(done)
    built = {row.what: float(row.built.replace(",", "")) for row in done.rows if row.what.startswith("bytes")}
    assert (built.get("bytes of weights, host memory", 0) > 1e9) == (kernel != "fused")
    assert ("bytes of cache_state, device memory" in built) == (kernel == "fused_uvm_caching")


def test_optimizers_that_only_cuda_has_are_built(config):
    kinds = EVERY_KIND | {"copied": "table_wise"}
    adam = request_of(config, "cuda").model_copy(update={"sparse_optimizer": "adam"})
    right = hand_plan(adam, kinds)
    # two fp32 numbers a weight, where hand_plan counts row-wise Adagrad's one a row
    loads = [
        load.model_copy(
            update={
                "device_bytes": {"weights": load.device_bytes["weights"], "optimizer": 2 * load.device_bytes["weights"]}
            }
        )
        for load in right.ranks
    ]
    done = dry_run(None, right.model_copy(update={"ranks": tuple(loads)}), 2)
    assert done.ok, wrong(done)
    assert list(wrong(dry_run(None, right, 2))) == ["bytes of optimizer, device memory", "bytes of tables, all memory"]


@pytest.mark.parametrize("kind", ["weights", "optimizer"])
def test_a_load_that_is_ten_percent_off_is_shown(config, plan, kind):
    load = plan.ranks[3]
    off = load.model_copy(update={"device_bytes": {**load.device_bytes, kind: 1.1 * load.device_bytes[kind]}})
    done = dry_run(config, plan.model_copy(update={"ranks": (*plan.ranks[:3], off)}), 3)
    assert f"bytes of {kind}, device memory" in wrong(done)
    assert all(what.startswith("bytes of") for what in wrong(done))


@pytest.mark.parametrize(("table", "ranks"), [("rows", (1, 0, 2, 3)), ("host_rows", (1, 2)), ("grid", (0, 1, 3, 2))])
def test_ranks_in_an_order_that_torchrec_does_not_follow_are_shown(config, plan, table, ranks):
    """TorchRec gives a row-wise table's i-th shard to rank i (of the world, or of the host of its first rank)."""
    entry = plan.tables[table]
    shards = tuple(s.model_copy(update={"rank": r}) for s, r in zip(entry.shards, ranks, strict=True))
    spoilt = {**plan.tables, table: entry.model_copy(update={"shards": shards, "ranks": ranks})}
    told = plan.model_copy(update={"tables": spoilt})
    label = f"bags {entry.sharding_type}: rows that each rank is sent ids of"
    assert any(label in wrong(dry_run(None, told, rank)) for rank in range(4))


def test_rows_cut_elsewhere_than_torchrec_cuts_ids_are_shown(config, plan):
    """The shards cover the table once, so that the plan loads; but ids would go to ranks that do not have their rows."""
    rows = plan.tables["rows"]
    first, second = rows.shards[:2]
    moved = (
        first.model_copy(update={"num_rows": first.num_rows - 5}),
        second.model_copy(update={"row": second.row - 5, "num_rows": second.num_rows + 5}),
        *rows.shards[2:],
    )
    spoilt = {**plan.tables, "rows": rows.model_copy(update={"shards": moved})}
    done = dry_run(config, plan.model_copy(update={"tables": spoilt}), 2)
    (said,) = wrong(done).items()
    assert said[0] == "bags row_wise: rows that each rank is sent ids of"
    assert said[1] == ("rows: 0 to 22 on 0, 22 to 54 on 1", "rows: 0 to 27 on 0, 27 to 54 on 1")


def test_column_widths_that_an_embedding_collection_would_mix_up_are_shown(config, plan):
    """TorchRec takes one width for the column-wise shards of all its tables."""
    shop = plan.tables["shop"]
    left, right = shop.shards
    narrow = (
        left.model_copy(update={"num_columns": 8}),
        right.model_copy(update={"column": 8, "num_columns": right.num_columns + left.num_columns - 8}),
    )
    spoilt = {**plan.tables, "shop": shop.model_copy(update={"shards": narrow})}
    done = dry_run(config, plan.model_copy(update={"tables": spoilt}), 0)
    assert "sequences column_wise: columns of every shard" in wrong(done)


def test_another_model_than_the_plans_is_shown(config, plan):
    tree = config.model_dump(mode="json")
    tree["features"]["tables"]["whole"]["num_embeddings"] = 200
    other = RunConfig.model_validate_json(json.dumps(tree))
    assert not dry_run(other, plan, 0).ok
    fewer = plan.model_copy(update={"tables": {n: t for n, t in plan.tables.items() if n != "whole"}})
    done = dry_run(config, fewer, 0)
    assert "TorchRec builds the modules of rank 0" in wrong(done)
    none = dry_run(config, plan.model_copy(update={"tables": {}}), 0)
    assert "embeddings.ec" in wrong(none)["TorchRec's validator of modules"][1]
    heads = config.model_copy(update={"model": config.model.model_copy(update={"head_hidden": (32, 32)})})
    assert "dense arch: parameters" in wrong(dry_run(heads, plan, 0))


def test_a_rank_that_the_plan_does_not_have_is_refused(config, plan):
    with pytest.raises(PlanError, match=r"ranks 0 to 3.*rank 4"):
        dry_run(config, plan, 4)


@pytest.mark.parametrize("fails", [False, True])
def test_the_caller_is_left_as_it_was(config, plan, fails):
    before = dict(os.environ), batched_embedding_kernel.SplitTableBatchedEmbeddingBagsCodegen, torch.randn(0).device
    on_cuda = hand_plan(request_of(config, "cuda"), EVERY_KIND)
    if fails:
        fewer = {name: table for name, table in on_cuda.tables.items() if name != "whole"}
        on_cuda = on_cuda.model_copy(update={"tables": fewer})
    assert dry_run(None, on_cuda, 1).ok != fails
    after = dict(os.environ), batched_embedding_kernel.SplitTableBatchedEmbeddingBagsCodegen, torch.randn(0).device
    assert after == before and not dist.is_initialized() and comm._INTRA_PG is None


def test_a_plan_for_128_gpus_is_checked_in_seconds():
    """3.3e11 parameters in 300 tables."""
    kinds = ("table_wise", "column_wise", "row_wise", "table_row_wise", "table_column_wise", "grid_shard")
    tables = {
        f"t{i}": TableSpec(
            collection="bags",
            num_embeddings=8_000_000 + i,
            embedding_dim=(64, 128, 256)[i % 3],
            data_type="fp16",
            pooling="sum",
            expected_ids_by_feature={f"f{i}": 3.0},
        )
        for i in range(300)
    }
    base = request_of(every_kind_config())
    request = base.model_copy(update={"tables": tables, "cluster": cluster("cuda", 128, 8)})
    assert sum(t.num_embeddings * t.embedding_dim for t in tables.values()) > 3e11
    plan = hand_plan(request, {name: kinds[i % len(kinds)] for i, name in enumerate(tables)}, "fused_uvm_caching")
    before_kb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    started = time.monotonic()
    done = dry_run(None, plan, 77)
    assert done.ok, wrong(done)
    assert time.monotonic() - started < 10
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before_kb < 200_000

"""Every sharding type computes what one unsharded process computes: logits, and tables after optimizer steps.

Sharded sums run in another order than the twin's, so results agree to float32 rounding, not bitwise: up to 1e-5 after three
steps, against 1e-2 that the steps move.
"""

import pytest
import torch
from torchrec.distributed.model_parallel import DistributedModelParallel

from dlrm_scale.config import RunConfig
from dlrm_scale.errors import PlanError
from dlrm_scale.models.ranking_model import build_model
from dlrm_scale.sharding.apply import INIT_BLOCK_ROWS, shard_model, to_torchrec
from dlrm_scale.sharding.local_tables import refuse_empty_kernels
from dlrm_scale.sharding.plan import Plan
from dlrm_scale.sharding.sharders import make_sharders
from tests.support.configs import tiny_config
from tests.support.twin import BAG_TYPES, case_config, compare, constraint, make_plan

SEQUENCE_TYPES = ("table_wise", "column_wise", "row_wise")
TOLERANCE = 5e-5


def check(ranks, config: RunConfig, ranks_per_host: int, types: dict[str, str], tolerance: float = TOLERANCE) -> None:
    plan = make_plan(config, ranks.world_size, ranks_per_host)
    assert {name: plan.tables[name].sharding_type for name in types} == types
    results = ranks.run(compare, config, plan)
    assert results[0].pop("moved") > 1e-3, "the tables did not train"
    for worst in results:
        wrong = {name: diff for name, diff in worst.items() if not diff <= tolerance}
        assert not wrong, wrong


@pytest.mark.parametrize("bag_type", BAG_TYPES)
def test_bag_tables_on_two_ranks(two_ranks, bag_type):
    config = case_config(bag_type, "table_wise", {"name": "rowwise_adagrad", "lr": 0.1})
    check(two_ranks, config, 2, {"user": bag_type, "tag": bag_type})


@pytest.mark.parametrize("bag_type", BAG_TYPES)
def test_bag_tables_on_four_ranks_of_two_hosts(four_ranks, bag_type):
    config = case_config(bag_type, "row_wise", {"name": "rowwise_adagrad", "lr": 0.1})
    check(four_ranks, config, 2, {"user": bag_type, "tag": bag_type})


@pytest.mark.parametrize("sequence_type", SEQUENCE_TYPES)
@pytest.mark.parametrize("world", ["two_ranks", "four_ranks"])
def test_sequence_tables(request, world, sequence_type):
    config = case_config("table_wise", sequence_type, {"name": "rowwise_adagrad", "lr": 0.1})
    check(request.getfixturevalue(world), config, 2, {"item": sequence_type, "category": sequence_type})


@pytest.mark.parametrize(
    "sparse",
    [
        {"name": "sgd", "lr": 0.5},
        # with a small eps the first step is lr * sign(g): where g is rounding noise, so is the step
        {"name": "adagrad", "lr": 0.1, "eps": 1e-2},
    ],
    ids=lambda s: s["name"],
)
@pytest.mark.parametrize("bag_type", ["data_parallel", "column_wise", "row_wise"])
def test_other_fused_optimizers(two_ranks, sparse, bag_type):
    check(two_ranks, case_config(bag_type, "row_wise", sparse), 2, {"user": bag_type})


@pytest.mark.parametrize("bag_type", ["data_parallel", "table_wise", "row_wise"])
def test_fp16_tables(two_ranks, bag_type):
    """FBGEMM looks up into float32 and rounds each step's weights; the twin's lookups are float16: 3 digits agree."""
    config = case_config(bag_type, "column_wise", {"name": "rowwise_adagrad", "lr": 0.1}, data_type="fp16")
    check(two_ranks, config, 2, {"user": bag_type}, tolerance=5e-3)


def test_tables_with_fewer_rows_than_ranks(four_ranks):
    """On the planner's own plan: FBGEMM's CPU kernels fail on a rank that holds no row."""
    tables = {
        name: {"num_embeddings": n, "embedding_dim": 8}
        for name, n in (("user", 3), ("item", 5), ("category", 1), ("tag", 1))
    }
    config = tiny_config(
        features={"tables": tables},
        train={
            "sparse": {"name": "rowwise_adagrad", "lr": 0.1},
            "dense": {"name": "sgd", "lr": 0.1},
            "schedule": {"warmup_steps": 2},
        },
    )
    check(four_ranks, config, 2, {})


def refusals(config: RunConfig, plan: Plan) -> str:
    cpu = torch.device("cpu")
    model = DistributedModelParallel(
        build_model(config, dense_device=cpu),
        device=cpu,
        plan=to_torchrec(plan),
        init_parameters=False,
        sharders=make_sharders(config.train.sparse, "cpu"),
    )
    try:
        refuse_empty_kernels(model, torch.distributed.get_rank())
    except PlanError as e:
        return str(e)
    return ""


def test_a_rank_without_any_row_is_refused_before_its_first_lookup(four_ranks):
    """Of the sequences' tables: 5 rows do not reach rank 3, where nothing else is; user's 500 share the bags' kernel with tag's one."""
    sizes = {"user": 500, "item": 5, "category": 5, "tag": 1}
    tables = {name: {"num_embeddings": n, "embedding_dim": 8} for name, n in sizes.items()}
    rules = {name: {"types": ["row_wise"]} for name in tables}
    config = tiny_config(features={"tables": tables}, sharding={"tables": rules})
    *held, said = four_ranks.run(refusals, config, make_plan(config, 4, 2))
    assert held == [""] * 3
    assert "rank 3 would hold no row of table item, category" in said and "types=[table_wise]" in said


def initial_table(config: RunConfig, plan: Plan) -> torch.Tensor:
    sharded = shard_model(
        build_model(config, dense_device=torch.device("cpu")),
        plan,
        config,
        torch.device("cpu"),
    )
    weight = sharded.module.state_dict()["embeddings.ebc.embedding_bags.user.weight"]
    whole = torch.zeros(weight.size())
    weight.gather(dst=0, out=whole if torch.distributed.get_rank() == 0 else None)
    return whole


def test_initial_values_do_not_depend_on_plan_or_world(two_ranks, four_ranks):
    """Also where shards begin within the blocks that the values are drawn in."""
    rows = 2 * INIT_BLOCK_ROWS + 1001
    seen = []
    for ranks, bag_type in ((two_ranks, "row_wise"), (four_ranks, "row_wise"), (two_ranks, "column_wise")):
        config = tiny_config(
            features={
                "tables": {
                    "user": {"num_embeddings": rows, "embedding_dim": 8},
                    "item": {"num_embeddings": 300, "embedding_dim": 8},
                },
                "categorical": [{"name": "user", "table": "user"}],
                "sequences": [{"name": "h", "max_length": 3, "fields": [{"name": "hi", "table": "item"}]}],
            },
            sharding={"tables": {"user": constraint(bag_type, 4)}},
        )
        seen.append(ranks.run(initial_table, config, make_plan(config, ranks.world_size, 2))[0])
    assert torch.equal(seen[0], seen[1]) and torch.equal(seen[0], seen[2])
    assert seen[0].abs().max() <= rows**-0.5 and seen[0].std() > 0.5 * rows**-0.5
    assert len(torch.unique(seen[0])) > 0.5 * seen[0].numel()

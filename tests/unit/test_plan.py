"""Plans without processes: what the planner finds, what plan.json holds, and which plans are refused."""

import json
from types import SimpleNamespace

import pytest
import torch
import yaml
from torchrec.distributed.types import ShardingPlan

from dlrm_scale.cluster import ClusterSpec, Figure, this_cluster
from dlrm_scale.errors import ConfigError, PlanError
from dlrm_scale.models.embeddings import Embeddings
from dlrm_scale.sharding.apply import to_torchrec
from dlrm_scale.sharding.plan import load_plan, plan_request, save_plan
from dlrm_scale.sharding.planner import find_plan
from dlrm_scale.sharding.sharders import make_sharders
from dlrm_scale.training.run import make_plan
from tests.support.configs import tiny_config
from tests.support.twin import constraint


def planned(config, cluster):
    request = plan_request(config, cluster, num_dense_parameters=0)
    return find_plan(request, num_rounds=100).plan, request


@pytest.fixture(scope="module")
def two_ranks_plan():
    rows = {"tables": {"item": {"types": ["row_wise"]}}}
    return planned(tiny_config(sharding=rows), this_cluster(2, 2, "cpu"))


def test_plan_covers_every_table_within_its_collections_types(two_ranks_plan):
    plan, request = two_ranks_plan
    assert set(plan.tables) == set(request.tables) == {"user", "item", "category", "tag"}
    for name in ("item", "category"):
        assert plan.tables[name].sharding_type in ("table_wise", "column_wise", "row_wise")
    assert all(load.total_device_bytes > 0 and sum(load.step_ms.values()) > 0 for load in plan.ranks)


def test_plan_file_reads_back_equal(two_ranks_plan, tmp_path):
    plan, request = two_ranks_plan
    save_plan(plan, tmp_path / "plan.json")
    assert load_plan(tmp_path / "plan.json", request) == plan
    assert isinstance(to_torchrec(plan), ShardingPlan)
    assert [p.name for p in tmp_path.iterdir()] == ["plan.json"]


def test_plan_of_another_batch_or_constraints_may_be_replayed(two_ranks_plan, tmp_path):
    plan, _ = two_ranks_plan
    save_plan(plan, tmp_path / "plan.json")
    other = tiny_config(train={"global_batch_size": 128}, sharding={"tables": {"user": {"types": ["row_wise"]}}})
    assert load_plan(tmp_path / "plan.json", plan_request(other, this_cluster(2, 2, "cpu"), 0)) == plan


def test_plan_of_another_model_or_cluster_is_refused_with_the_difference(two_ranks_plan, tmp_path):
    plan, _ = two_ranks_plan
    save_plan(plan, tmp_path / "plan.json")
    tables = {
        "user": {"num_embeddings": 501, "embedding_dim": 8},
        "item": {"num_embeddings": 300, "embedding_dim": 16, "data_type": "fp16"},
        "category": {"num_embeddings": 20, "embedding_dim": 16},
        "tags": {"num_embeddings": 100, "embedding_dim": 8},
    }
    categorical = [{"name": n, "table": n} for n in ("user", "item", "category", "tags")]
    other = tiny_config(features={"tables": tables, "categorical": categorical})
    with pytest.raises(PlanError) as e:
        load_plan(tmp_path / "plan.json", plan_request(other, this_cluster(4, 2, "cpu"), 0))
    for said in (
        "user: num_embeddings is 500 in the plan, 501",
        "item: embedding_dim is 8 in the plan, 16",
        "item: data_type is fp32 in the plan, fp16",
        "tag: in the plan, not in this model",
        "tags: in this model, not in the plan",
        "num_ranks is 2 in the plan, 4",
    ):
        assert said in str(e.value), str(e.value)


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda plan: plan["request"]["tables"]["user"].update(num_embeddings=7), "altered"),
        (lambda plan: plan["tables"].pop("user"), "user"),
        (lambda plan: plan["tables"]["item"]["shards"][0].update(num_rows=1), "cover"),
        (lambda plan: plan["tables"]["item"]["shards"][0].update(rank=9), r"ranks \[9\] of 2"),
        (lambda plan: plan["tables"]["item"].update(ranks=[5, 5]), r"ranks \[5\] of 2"),
        (
            lambda plan: plan["tables"]["item"].update(ranks=plan["tables"]["item"]["ranks"][::-1]),
            "not those of its shards",
        ),
        (lambda plan: plan["tables"]["item"].update(sharding_type="banana"), "not a plan"),
        (lambda plan: plan["tables"]["item"].update(sharding_type="table_row_wise"), "sequence's table"),
        (lambda plan: plan["tables"]["item"].update(compute_kernel="dense"), "kernel"),
        (lambda plan: plan["tables"]["item"]["shards"][0].update(row=-100), "not a plan"),
        (lambda plan: plan["tables"]["item"]["shards"][1].update(row=0), "cover"),
        (lambda plan: plan["tables"].update(more=plan["tables"]["item"]), "more"),
        (lambda plan: plan.pop("ranks"), "not a plan"),
        (lambda plan: plan.update(extra=1), "not a plan"),
        (lambda plan: plan.update(score_ms=1e-9), "was altered"),
        (lambda plan: plan["ranks"].pop(), "was altered"),
        (lambda plan: plan["ranks"][0]["step_ms"].update(fwd_compute=0.0), "was altered"),
        (lambda plan: plan.pop("digest"), "was altered"),
    ],
)
def test_plan_that_was_spoilt_is_refused(two_ranks_plan, tmp_path, spoil, said):
    plan, request = two_ranks_plan
    save_plan(plan, tmp_path / "plan.json")
    tree = json.loads((tmp_path / "plan.json").read_text())
    spoil(tree)
    (tmp_path / "plan.json").write_text(json.dumps(tree))
    with pytest.raises(PlanError, match=said):
        load_plan(tmp_path / "plan.json", request)


def test_plan_that_is_no_file(two_ranks_plan, tmp_path):
    with pytest.raises(PlanError, match="nowhere"):
        load_plan(tmp_path / "nowhere.json", two_ranks_plan[1])


def test_plan_that_is_no_text(two_ranks_plan, tmp_path):
    (tmp_path / "plan.json").write_bytes(b"PAR1\xff\xfe")
    with pytest.raises(PlanError, match="not a plan"):
        load_plan(tmp_path / "plan.json", two_ranks_plan[1])


def test_constraints_are_kept():
    for kind, shards in (("row_wise", 2), ("column_wise", 2), ("table_wise", 1), ("data_parallel", 0)):
        config = tiny_config(sharding={"tables": {"user": constraint(kind, 4)}})
        plan, _ = planned(config, this_cluster(2, 2, "cpu"))
        assert plan.tables["user"].sharding_type == kind and len(plan.tables["user"].shards) == shards


def test_a_plan_with_a_combination_that_computes_wrong_is_refused(tmp_path):
    summed = tiny_config().model_dump(mode="json")["features"]["tables"] | {
        "tag": {"num_embeddings": 100, "embedding_dim": 8}
    }
    constraint = {"tables": {"tag": {"types": ["grid_shard"], "min_partition": 8}}}
    plan, _ = planned(tiny_config(features={"tables": summed}, sharding=constraint), this_cluster(2, 2, "cpu"))
    save_plan(plan, tmp_path / "plan.json")
    with pytest.raises(PlanError, match=r"grid_shard.*tag.*mean"):
        load_plan(tmp_path / "plan.json", plan_request(tiny_config(), this_cluster(2, 2, "cpu"), 0))


def test_tables_that_do_not_fit_say_so_with_bytes_and_ways_out():
    config = tiny_config(
        features={
            "tables": {
                **tiny_config().model_dump(mode="json")["features"]["tables"],
                "user": {"num_embeddings": 10**9, "embedding_dim": 128},
            }
        }
    )
    with pytest.raises(PlanError, match=r"table user puts at least \d+\.\d+ GB on one rank.*\n.*keeps.*GB"):
        planned(config, this_cluster(2, 2, "cpu"))


def test_a_trillion_parameters_are_planned_for_a_cluster_that_is_not_here():
    tables = {f"t{i}": {"num_embeddings": 400_000_000, "embedding_dim": 128, "data_type": "fp16"} for i in range(20)}
    config = tiny_config(
        features={"tables": tables, "categorical": [{"name": n, "table": n} for n in tables], "sequences": []},
        data={"lanes": 128},
        train={"global_batch_size": 65536},
        model={"mode": "sole"},
    )
    cluster = ClusterSpec(
        device="cuda",
        num_ranks=128,
        ranks_per_host=8,
        hbm_gb=Figure(value=80, source="datasheet"),
        host_memory_gb=Figure(value=1024, source="guess"),
        hbm_gb_per_s=Figure(value=3350, source="datasheet"),
        host_memory_gb_per_s=Figure(value=50, source="guess"),
        host_link_gb_per_s=Figure(value=50, source="guess"),
        intra_host_gb_per_s=Figure(value=450, source="datasheet"),
        inter_host_gb_per_s=Figure(value=50, source="datasheet"),
    )
    plan, request = planned(config, cluster)
    assert sum(t.num_embeddings * t.embedding_dim for t in request.tables.values()) > 1e12
    assert max(load.total_device_bytes for load in plan.ranks) < 0.85 * 80e9


def test_an_optimizer_that_the_device_lacks_is_refused():
    config = tiny_config(train={"sparse": {"name": "adam"}})
    with pytest.raises(ConfigError, match=r"adam.*CUDA only.*rowwise_adagrad"):
        make_sharders(config.train.sparse, "cpu")
    assert len(make_sharders(config.train.sparse, "cuda")) == 2
    assert "data_parallel" not in make_sharders(config.train.sparse, "cuda")[0].sharding_types("cuda")
    decayed = tiny_config(train={"sparse": {"name": "rowwise_adagrad", "weight_decay": 0.1}})
    with pytest.raises(ConfigError, match=r"weight_decay is 0\.1.*CPU"):
        make_sharders(decayed.train.sparse, "cpu")


def test_planning_leaves_tables_on_meta():
    config = tiny_config()
    assert all(p.device == torch.device("meta") for p in Embeddings(config.features).parameters())


def test_the_trainer_plans_for_the_cluster_that_the_configuration_names(tmp_path):
    mine = this_cluster(2, 2, "cpu")
    slow = mine.model_copy(update={"intra_host_gb_per_s": Figure(value=0.1, source="measured: here")})
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(slow.model_dump(mode="json", exclude_defaults=True)))
    config = tiny_config(sharding={"cluster": str(tmp_path / "mine.yaml"), "search_seconds": 0.1})
    two_ranks = SimpleNamespace(world_size=2, ranks_per_host=2, device=torch.device("cpu"))
    assert make_plan(config, two_ranks).request.cluster == slow
    assert make_plan(tiny_config(), two_ranks).request.cluster == mine
    four_ranks = SimpleNamespace(world_size=4, ranks_per_host=2, device=torch.device("cpu"))
    with pytest.raises(
        ConfigError, match=r"mine.yaml, which is not of these ranks: num_ranks is 2 there, 4 here; name"
    ):
        make_plan(config, four_ranks)


def test_rules_that_a_replayed_plan_does_not_follow_are_told(two_ranks_plan, tmp_path, capsys):
    plan, request = two_ranks_plan
    save_plan(plan, tmp_path / "plan.json")
    ranks = SimpleNamespace(world_size=2, ranks_per_host=2, device=torch.device("cpu"))
    other = {"plan": str(tmp_path / "plan.json"), "tables": {"user": {"types": ["data_parallel"]}}}
    had = request.sharding.tables.get("user")
    assert had is None or had.types != ("data_parallel",)
    assert make_plan(tiny_config(sharding=other), ranks) == plan
    said = capsys.readouterr().out
    assert "followed as it is" in said and "sharding.tables.user.types is" in said and "('data_parallel',) here" in said

"""What a run works out before and after training, without ranks."""

import numpy as np
import pytest

from dlrm_scale.data.open import open_source
from dlrm_scale.errors import ConfigError, NoPlanError
from dlrm_scale.training.ranks import Rank
from dlrm_scale.training.run import _too_many_activations, answers, make_plan, oracle_metrics, prepare
from dlrm_scale.training.run_folder import RunFolder
from tests.support.configs import TINY, tiny_config
from tests.unit.test_metrics import pairwise_auc


@pytest.mark.parametrize("max_samples", [None, 700])
def test_the_oracle_is_judged_on_the_held_out_rows_that_the_model_sees(max_samples):
    config = tiny_config(eval={"max_samples": max_samples})
    source = open_source(config.data, config.features, "eval", config.seed)
    metrics = oracle_metrics(config, source)["click"]
    num_rows = max_samples or 1000
    p, labels = source.oracle_probabilities_RT()[:num_rows, 0], source.labels_RT()[:num_rows, 0]
    assert metrics["base_rate"] == pytest.approx(labels.mean())
    assert metrics["auc"] == pytest.approx(pairwise_auc(p, labels, np.ones(num_rows)))
    assert metrics["log_loss"] == pytest.approx(-np.log(np.where(labels == 1, p, 1 - p)).mean())


def test_a_run_folder_gets_its_configuration_and_nothing_before_the_plan_is_made(tmp_path, cpu_rank):
    config = tiny_config(output={"dir": str(tmp_path / "run"), "records": str(tmp_path / "records.jsonl")})
    folder = RunFolder(config)
    assert prepare(config, cpu_rank, folder).plan is not None
    assert sorted(p.name for p in folder.path.iterdir()) == [".lock", "config.yaml"]
    folder.close()


def test_an_arch_that_the_features_do_not_suit_is_refused_before_training(tmp_path, cpu_rank):
    features = {
        "tables": {"user": {"num_embeddings": 10, "embedding_dim": 8}},
        "dense": [],
        "categorical": [{"name": "user", "table": "user"}],
        "sequences": [],
    }
    config = tiny_config(features=features, model={"mode": "sole"}, output={"dir": str(tmp_path / "run")})
    with pytest.raises(ConfigError, match=r"dot.*interactions"):
        prepare(config, cpu_rank, RunFolder(config))
    assert not (tmp_path / "run").exists()


def test_an_earlier_plan_is_replayed_on_a_like_machine_and_only_there(cpu_rank):
    config = tiny_config()
    plan = make_plan(config, cpu_rank)
    roomier = plan.request.cluster.host_memory_gb.model_copy(update={"value": 1e4})
    elsewhere = plan.request.model_copy(
        update={"cluster": plan.request.cluster.model_copy(update={"host_memory_gb": roomier})}
    )
    assert answers(plan, elsewhere)
    assert make_plan(config, cpu_rank, plan) is plan
    constrained = tiny_config(sharding={"tables": {"user": {"types": ["row_wise"]}}})
    assert make_plan(constrained, cpu_rank, plan) is not plan
    two = plan.request.cluster.model_copy(update={"num_ranks": 2, "ranks_per_host": 2})
    assert not answers(plan, plan.request.model_copy(update={"cluster": two}))


@pytest.fixture
def cpu_rank() -> Rank:
    import torch

    return Rank(0, 1, 0, 1, torch.device("cpu"))


def test_a_model_that_fits_nowhere_is_sent_to_the_planner(cpu_rank):
    tables = {name: dict(table) for name, table in TINY["features"]["tables"].items()}
    tables["user"]["num_embeddings"] = 10**12
    config = tiny_config(features={"tables": tables})
    with pytest.raises(NoPlanError, match=r"(?s)no sharding plan fits.*table user.*python -m tools.plan_sharding"):
        make_plan(config, cpu_rank)


def test_a_replayed_plan_does_not_say_how_many_activations_there_are(tmp_path, cpu_rank):
    small, large = tiny_config(), tiny_config(train={"global_batch_size": 2**24})
    plan_of = {config.train.global_batch_size: make_plan(config, cpu_rank) for config in (small, large)}
    cluster = plan_of[2**24].request.cluster
    assert _too_many_activations(large, plan_of[small.train.global_batch_size], cluster)
    for_large = plan_of[2**24].model_copy(update={"ranks": plan_of[small.train.global_batch_size].ranks})
    assert _too_many_activations(small, for_large, cluster) is None


@pytest.mark.parametrize(("samples", "told"), [(64, False), (2**24, True)])
def test_more_activations_than_memory_are_told_of_before_training(tmp_path, capsys, cpu_rank, samples, told):
    config = tiny_config(train={"global_batch_size": samples}, output={"dir": str(tmp_path / "run")})
    folder = RunFolder(config)
    prepare(config, cpu_rank, folder)
    folder.close()
    said = capsys.readouterr().out
    assert (
        "memory may run out" in said and "16,777,216 samples" in said and "activation_checkpointing" in said
    ) is told

"""What a run works out before and after training, without ranks."""

import numpy as np
import pytest

from dlrm_scale.data.open import open_source
from dlrm_scale.errors import ConfigError, NoPlanError
from dlrm_scale.training.ranks import Rank
from dlrm_scale.training.run import make_plan, oracle_metrics, prepare
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


def test_a_run_folder_is_claimed_by_one_run(tmp_path, cpu_rank):
    config = tiny_config(output={"dir": str(tmp_path / "run"), "records": str(tmp_path / "records.jsonl")})
    prepared = prepare(config, cpu_rank)
    assert sorted(p.name for p in prepared.run_dir.iterdir()) == ["config.yaml", "plan.json"]
    with pytest.raises(ConfigError, match="not a new or empty folder"):
        prepare(config, cpu_rank)


def test_an_arch_that_the_features_do_not_suit_is_refused_before_training(tmp_path, cpu_rank):
    features = {
        "tables": {"user": {"num_embeddings": 10, "embedding_dim": 8}},
        "dense": [],
        "categorical": [{"name": "user", "table": "user"}],
        "sequences": [],
    }
    config = tiny_config(features=features, model={"mode": "sole"}, output={"dir": str(tmp_path / "run")})
    with pytest.raises(ConfigError, match=r"dot.*interactions"):
        prepare(config, cpu_rank)
    assert not (tmp_path / "run").exists()


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

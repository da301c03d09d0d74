"""A kept batch comes back as it was, and a replay names what is not finite first."""

import math
from pathlib import Path

import pytest
import torch

from dlrm_scale.config import RunConfig
from dlrm_scale.data.batch import RecBatch
from dlrm_scale.errors import DataError
from dlrm_scale.models.length_chunks import CHUNK_SAMPLES
from dlrm_scale.resilience.guards import LOSS, NonFinite
from dlrm_scale.training.bad_batches import load_bad_batch, save_bad_batch
from dlrm_scale.training.ranks import Rank
from tests.support.configs import TINY, tiny_config
from tests.support.model_inputs import random_batch
from tools.replay_batch import main, not_finite, rebuild

RANK = Rank(1, 2, 1, 2, torch.device("cpu"))
BAD = NonFinite(seen={1: [LOSS]}, losses={0: 0.5, 1: math.nan})


@pytest.fixture
def config() -> RunConfig:
    return tiny_config()


def keep(path: Path, batch: RecBatch, config: RunConfig) -> list[str]:
    save_bad_batch(path, batch, config, RANK, 17, BAD)
    return [str(path)]


def test_a_kept_batch_comes_back_as_it_was(tmp_path, config):
    batch = random_batch(config.features, 8)
    keep(tmp_path / "b.pt", batch, config)
    saved, again = load_bad_batch(tmp_path / "b.pt")
    assert (saved["step"], saved["rank"], saved["seed"], saved["seen"]) == (17, 1, config.seed, {1: [LOSS]})
    for name in ("dense_BF", "labels_BT", "weights_B", "groups_B", "mean_rank_weight"):
        assert torch.equal(getattr(again, name), getattr(batch, name))
    for name in ("bags", "sequences"):
        mine, theirs = getattr(batch, name), getattr(again, name)
        assert mine.keys() == theirs.keys()
        assert torch.equal(mine.values(), theirs.values()) and torch.equal(mine.lengths(), theirs.lengths())


def test_a_bad_feature_is_named_before_what_it_spoils(tmp_path, config, capsys):
    batch = random_batch(config.features, 8)
    batch.dense_BF[3, 1] = math.inf
    assert main(keep(tmp_path / "b.pt", batch, config)) == 1
    out = capsys.readouterr().out
    assert "step 17, rank 1 of 2" in out and "rank 1: the loss" in out
    assert "first not finite: dense feature price: rows 3" in out
    assert out.index("dense feature price") < out.index("output of dense")


def test_rows_are_those_of_the_batch_where_a_run_sorts_samples_into_chunks(config):
    batch = random_batch(config.features, CHUNK_SAMPLES + 50)
    batch.dense_BF[3, 1] = math.nan
    outputs = [place for place in not_finite(config, rebuild(config, None), batch) if place.startswith("output of")]
    assert any(".interactions." in place for place in outputs) and any(".sequences." in place for place in outputs)
    assert {place.partition(": ")[2] for place in outputs} == {"rows 3"}


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_an_event_is_named_with_its_sample(precision):
    """Before events are padded, a row of the arch is one event of one sequence."""
    tables = {name: {**table, "embedding_dim": 16} for name, table in TINY["features"]["tables"].items()}
    (history,) = TINY["features"]["sequences"]
    other = {"name": "carts", "max_length": 4, "fields": [{"name": "cart_category", "table": "category"}]}
    config = tiny_config(
        features={**TINY["features"], "tables": tables, "sequences": [history, other]}, train={"precision": precision}
    )
    model, batch = rebuild(config, None), random_batch(config.features, 8)
    batch.dense_BF.zero_()
    assert batch.sequences["cart_category"].lengths().tolist() != batch.sequences["history_item"].lengths().tolist()
    ids = batch.sequences["cart_category"]
    sample = next(b for b in range(1, 8) if ids.lengths()[b] > 1)
    batch.sequences.values()[:] = 0  # and the one event of another category
    ids.values()[ids.offsets()[sample] + 1] = 7
    model.get_parameter("embeddings.ec.embeddings.category.weight").data[7] = math.nan
    places = dict(place.split(": ") for place in not_finite(config, model, batch) if place.startswith("output of"))
    events = f"rows {sample} (event 1)"
    for name in ("events.project.by_table.category", "events.project"):
        assert places[f"output of dense.arch.{name}"] == events
    assert places["output of dense.arch.events.unify"] == f"rows {sample}"


def test_layers_that_a_run_computes_twice_are_told_once(config):
    twice = tiny_config(train={"activation_checkpointing": True})
    batch = random_batch(config.features, 8)
    batch.dense_BF[3, 1] = math.nan
    assert not_finite(twice, rebuild(twice, None), batch) == not_finite(config, rebuild(config, None), batch)


def test_a_run_with_kernels_of_a_gpu_and_compiled_is_replayed_plainly(tmp_path, capsys):
    config = tiny_config(model={"pffn_kernel": "triton"}, train={"compile": True})
    assert main(keep(tmp_path / "b.pt", random_batch(config.features, 8), config)) == 0
    assert "another configuration" not in capsys.readouterr().out
    arch = rebuild(config, None).dense.arch
    assert "forward" not in vars(arch.features)  # what compiling replaces


def test_bad_weights_are_named_and_finite_ones_pass(tmp_path, config, capsys):
    files = keep(tmp_path / "b.pt", random_batch(config.features, 8), config)
    assert main(files) == 0
    assert "all is finite" in capsys.readouterr().out
    state = rebuild(config, None).state_dict()
    state["embeddings.ec.embeddings.item.weight"][7, 2] = math.nan
    torch.save(state, tmp_path / "weights.pt")
    assert main([*files, "--weights", str(tmp_path / "weights.pt")]) == 1
    assert "first not finite: table embeddings.ec.embeddings.item.weight: rows 7" in capsys.readouterr().out


def test_files_of_something_else_are_refused(tmp_path, config, capsys):
    torch.save({"a": torch.zeros(2)}, tmp_path / "a.pt")
    with pytest.raises(DataError, match=r"a\.pt is not a kept batch"):
        load_bad_batch(tmp_path / "a.pt")
    with pytest.raises(DataError, match="No such file"):
        load_bad_batch(tmp_path / "none.pt")
    files = keep(tmp_path / "b.pt", random_batch(config.features, 8), config)
    assert main([*files, "--weights", str(tmp_path / "a.pt")]) == 1
    assert "does not hold this model's weights" in capsys.readouterr().err

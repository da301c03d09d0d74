"""A kept batch comes back as it was, and a replay names what is not finite first."""

import math
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import yaml

from dlrm_scale.config import RunConfig
from dlrm_scale.data.batch import RecBatch
from dlrm_scale.errors import DataError
from dlrm_scale.models.length_chunks import CHUNK_SAMPLES
from dlrm_scale.resilience.guards import LOSS, NonFinite
from dlrm_scale.training.bad_batches import load_bad_batch, save_bad_batch
from dlrm_scale.training.ranks import Rank
from tests.support.checkpoints import STEP, model_state, plan_of, save_state
from tests.support.configs import TINY, tiny_config
from tests.support.model_inputs import random_batch
from tools.checkpoint.cli import main as checkpoint_tool
from tools.replay_batch import main, not_finite, rebuild

RANK = Rank(1, 2, 1, 2, torch.device("cpu"))
TRAINED = tiny_config().model_copy(update={"seed": 7})  # its first weights stand for those of a run that has learned
BAD = NonFinite(seen={1: [LOSS]}, losses={0: 0.5, 1: math.nan})


@pytest.fixture
def config() -> RunConfig:
    return tiny_config()


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory) -> Iterator[Path]:
    """A run's folder with one checkpoint, after STEP steps, of TRAINED's weights."""
    folder = tmp_path_factory.mktemp("runs") / "my run"
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    state = model_state(TRAINED, plan_of(TRAINED, 1, 1, "table_wise", "table_wise"))
    save_state(state, TRAINED, str(folder / "checkpoints"))
    yield folder
    dist.destroy_process_group()


@pytest.fixture
def exported(run_dir, tmp_path, capsys) -> Path:
    assert checkpoint_tool(["export", str(run_dir), "--output", str(tmp_path / "weights")]) == 0
    capsys.readouterr()
    return tmp_path / "weights"


def change(file: Path, **values: torch.Tensor | None) -> None:
    """Of a file's state dict; None: takes that parameter out."""
    state = torch.load(file, weights_only=True) | values
    torch.save({name: tensor for name, tensor in state.items() if tensor is not None}, file)


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


def test_a_checkpoints_weights_are_those_of_the_replay(config, exported):
    replayed, trained, initial = (
        rebuild(*of).state_dict() for of in ((config, exported), (TRAINED, None), (config, None))
    )
    assert not torch.equal(initial["dense.arch.head.0.weight"], trained["dense.arch.head.0.weight"])
    assert [name for name in trained if not torch.equal(replayed[name], trained[name])] == []


def test_bad_weights_are_named_and_finite_ones_pass(tmp_path, config, exported, capsys):
    files = [*keep(tmp_path / "b.pt", random_batch(config.features, 8), config), "--weights", str(exported)]
    assert main(files) == 0
    out = capsys.readouterr().out
    assert f"with weights {exported}: all is finite" in out and "may matter" not in out
    item = torch.load(exported / "table_item.pt", weights_only=True)
    item[7, 2] = math.nan
    torch.save(item, exported / "table_item.pt")
    assert main(files) == 1
    assert "first not finite: table embeddings.ec.embeddings.item.weight: rows 7" in capsys.readouterr().out


PARAMETER = "arch.head.0.weight"


@pytest.mark.parametrize(
    ("spoil", "told"),
    [
        (lambda folder: (folder / "dense.pt").unlink(), "dense.pt is missing"),
        (lambda folder: (folder / "table_item.pt").unlink(), "table_item.pt is missing"),
        (lambda folder: (folder / "table_item.pt").write_bytes(b"PK"), "table_item.pt cannot be read"),
        (
            lambda folder: torch.save(torch.zeros(4, 8), folder / "table_item.pt"),
            "table_item.pt has the shape [4, 8], the model's has [300, 8]",
        ),
        (lambda folder: torch.save(torch.zeros(4, 8), folder / "table_city.pt"), "table_city.pt is of no table"),
        (lambda folder: torch.save(torch.zeros(4), folder / "dense.pt"), "dense.pt holds no state dict"),
        (lambda folder: change(folder / "dense.pt", **{PARAMETER: None}), f"dense.pt has no {PARAMETER};"),
        (
            lambda folder: change(folder / "dense.pt", **{PARAMETER: torch.zeros(3)}),
            f"dense.pt: {PARAMETER} has the shape [3], the model's has [",
        ),
        (
            lambda folder: torch.save({0: 1, **torch.load(folder / "dense.pt")}, folder / "dense.pt"),
            "dense.pt: 0 is no",
        ),
        (lambda folder: change(folder / "dense.pt", other=torch.zeros(3)), "dense.pt: other is no parameter"),
        (lambda folder: [path.unlink() for path in folder.iterdir()], "and 2 more;"),
        (lambda folder: folder.rename(folder.parent / "elsewhere"), "there is no such folder"),
    ],
)
def test_what_a_folder_lacks_is_one_line_with_the_command_that_makes_one(
    tmp_path, config, exported, capsys, spoil, told
):
    files = keep(tmp_path / "b.pt", random_batch(config.features, 8), config)
    spoil(exported)
    assert main([*files, "--weights", str(exported)]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: {exported} does not hold this model's weights: ") and told in line
    assert "python -m tools.checkpoint export RUN_DIR --output FOLDER" in line and len(line) < 600


def test_a_plain_state_dict_is_refused(tmp_path, config, capsys):
    files = keep(tmp_path / "b.pt", random_batch(config.features, 8), config)
    torch.save(rebuild(config, None).state_dict(), tmp_path / "weights.pt")
    assert main([*files, "--weights", str(tmp_path / "weights.pt")]) == 1
    assert (
        "weights.pt does not hold this model's weights: there is no such folder; python -m" in capsys.readouterr().err
    )


def test_the_last_line_is_commands_that_replay_with_the_weights(run_dir, config, tmp_path, monkeypatch, capsys):
    (run_dir / "bad_batches").mkdir(exist_ok=True)
    file = run_dir / "bad_batches" / "step_17_rank_1.pt"
    batch = random_batch(config.features, 8)
    batch.dense_BF.zero_()
    assert main(keep(file, batch, config)) == 0
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.startswith(
        "the weights at that step may matter; with those of the last checkpoint before it: python -m "
    )
    export, replay = (shlex.split(command)[2:] for command in last.partition(": ")[2].split(" && "))
    assert export == [
        "tools.checkpoint",
        "export",
        str(run_dir / "checkpoints" / f"step_{STEP}"),
        "--output",
        "weights_step_3",
    ]
    assert replay == ["tools.replay_batch", str(file), "--weights", "weights_step_3"]
    monkeypatch.chdir(tmp_path)
    assert checkpoint_tool(export[1:]) == 0 and main(replay[1:]) == 0
    assert "with weights weights_step_3: all is finite" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("place", "step", "told"),
    [
        ("bad_batches", STEP, ("the last checkpoint before it: ", "/checkpoints/step_3' --output weights_step_3")),
        ("bad_batches", STEP - 1, ("the first checkpoint after it", "/checkpoints/step_3' --output weights_step_3")),
        (
            "elsewhere",
            17,
            ("with those of a checkpoint of the run: ", " export RUN_DIR/checkpoints --output weights &&"),
        ),
    ],
)
def test_the_checkpoint_is_the_nearest_that_can_be_found(run_dir, config, capsys, place, step, told):
    (run_dir / place).mkdir(exist_ok=True)
    file = run_dir / place / f"step_{step}_rank_1.pt"
    save_bad_batch(file, random_batch(config.features, 8), config, RANK, step, BAD)
    assert main([str(file)]) == 0
    last = capsys.readouterr().out.splitlines()[-1]
    assert all(part in last for part in told), last


def test_a_run_without_checkpoints_is_told_so(tmp_path, config, capsys):
    (tmp_path / "bad_batches").mkdir()
    assert main(keep(tmp_path / "bad_batches" / "b.pt", random_batch(config.features, 8), config)) == 0
    last = capsys.readouterr().out.splitlines()[-1]
    assert f"a checkpoint ({tmp_path}/checkpoints holds none here): python -m tools.checkpoint export" in last


def test_a_store_out_of_reach_still_has_its_commands(tmp_path, capsys):
    config = tiny_config(checkpoint={"dir": "far://mine", "path_handlers": ["no_such_module:Handler"]})
    assert main(keep(tmp_path / "b.pt", random_batch(config.features, 8), config)) == 0
    last = capsys.readouterr().out.splitlines()[-1]
    assert "python -m tools.checkpoint --path-handler=no_such_module:Handler export far://mine --output weights" in last


def test_a_configuration_of_other_features_is_refused_and_other_sections_may_differ(tmp_path, config, capsys):
    files = keep(tmp_path / "b.pt", random_batch(config.features, 8), config)
    features = {**TINY["features"], "dense": [{"name": "age"}]}
    features["tables"] = {**features["tables"], "item": {"num_embeddings": 400, "embedding_dim": 8}}
    other = tmp_path / "other.yaml"
    other.write_text(yaml.safe_dump({**TINY, "features": features}))
    assert main([*files, "--config", str(other)]) == 2
    told = capsys.readouterr()
    assert told.out == "" and f"--config {other} has other features than the batch in {files[0]}" in told.err
    assert "  features.tables.item.num_embeddings: 300 there, 400 now\n" in told.err
    assert "  features.dense.1.name: price there, not set now\n" in told.err and "features.dense.0" not in told.err
    assert "leave out --config" in told.err
    other.write_text(yaml.safe_dump({**TINY, "model": {**TINY["model"], "num_layers": 2}}))
    assert main([*files, "--config", str(other)]) == 0
    out = capsys.readouterr().out
    assert "note: replayed with another configuration" in out and f" --config {other} --weights " in out


def test_features_of_quite_another_configuration_fill_one_screen(tmp_path, config, capsys):
    files = keep(tmp_path / "b.pt", random_batch(config.features, 8), config)
    features = {"tables": {"a": {"num_embeddings": 5, "embedding_dim": 8}}, "labels": ["sale"]}
    features["categorical"] = [{"name": "a", "table": "a"}]
    (tmp_path / "other.yaml").write_text(yaml.safe_dump({**TINY, "features": features, "model": {"arch": "logistic"}}))
    assert main([*files, "--config", str(tmp_path / "other.yaml")]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 23 and lines[-2].startswith("  ... and ")


def test_files_of_something_else_are_refused(tmp_path):
    torch.save({"a": torch.zeros(2)}, tmp_path / "a.pt")
    with pytest.raises(DataError, match=r"a\.pt is not a kept batch"):
        load_bad_batch(tmp_path / "a.pt")
    with pytest.raises(DataError, match="No such file"):
        load_bad_batch(tmp_path / "none.pt")

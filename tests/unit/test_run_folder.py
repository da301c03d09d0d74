"""Which folder a run may begin or go on in, and what a run that goes on may change."""

import json
import shlex
from pathlib import Path

import pytest

from dlrm_scale.errors import ConfigError
from dlrm_scale.training.run_folder import STARTED, RunFolder, differences, how_to_go_on
from tests.support.configs import tiny_config


def config_in(tmp_path, **sections):
    return tiny_config(output={"dir": str(tmp_path / "run"), "records": str(tmp_path / "records.jsonl")}, **sections)


def begun(tmp_path, **sections) -> RunFolder:
    folder = RunFolder(config_in(tmp_path, **sections))
    folder.claim()
    return folder


@pytest.mark.parametrize(
    ("sections", "lines"),
    [
        ({}, []),
        ({"train": {"max_steps": 99, "epochs": 7, "pipeline": "none"}}, []),
        ({"train": {"compile": True, "activation_checkpointing": True, "index_dedup": True}}, []),
        ({"train": {"all_reduce": {"bucket_mb": 3}}}, []),
        ({"train": {"nonfinite": "skip", "max_skipped": 3}, "resilience": {"watchdog_seconds": 7}}, []),
        ({"train": {"all_reduce": {"precision": "bf16"}}}, ["train.all_reduce.precision: fp32 there, bf16 now"]),
        (
            {"sharding": {"communication": {"forward": "bf16"}}},
            ["sharding.communication.forward: fp32 there, bf16 now"],
        ),
        ({"log": {"every_steps": 1}, "eval": {"every_steps": 3}, "checkpoint": {"every_steps": 3}}, []),
        ({"sharding": {"tables": {"user": {"types": ["row_wise"]}}}, "data": {"prefetch_batches": 1}}, []),
        ({"train": {"global_batch_size": 128}}, ["train.global_batch_size: 64 there, 128 now"]),
        ({"train": {"sparse": {"lr": 0.5}}}, ["train.sparse.lr: 0.02 there, 0.5 now"]),
        ({"data": {"lanes": 8}}, ["data.lanes: 4 there, 8 now"]),
        ({"model": {"arch": "interformer", "dim": 16}}, ["model.dim: 8 there, 16 now"]),
        ({"features": {"labels": ["click", "buy"]}}, ["features.labels.1: not set there, buy now"]),
    ],
)
def test_what_decides_learning_may_not_differ(sections, lines):
    then, now = (tiny_config(**s).model_dump(mode="json") for s in ({}, sections))
    assert differences(then, now) == lines


def test_a_folder_of_the_same_run_is_gone_on_with_and_another_is_refused(tmp_path):
    begun(tmp_path).close()
    again = RunFolder(config_in(tmp_path, train={"max_steps": 40}))
    assert again.holds_run
    again.close()
    with pytest.raises(ConfigError, match=r"(?s)train.global_batch_size: 64 there, 128 now.*output\.dir"):
        RunFolder(config_in(tmp_path, train={"global_batch_size": 128}))


def test_two_runs_never_share_a_folder(tmp_path):
    first = begun(tmp_path)
    with pytest.raises(ConfigError, match="in use by a run"):
        RunFolder(config_in(tmp_path))
    first.close()
    RunFolder(config_in(tmp_path)).close()


def test_of_two_runs_that_begin_at_once_one_gets_the_folder(tmp_path):
    one, other = RunFolder(config_in(tmp_path)), RunFolder(config_in(tmp_path))
    one.claim()
    with pytest.raises(ConfigError, match="in use by a run"):
        other.claim()
    one.close()


def test_two_runs_never_share_a_folder_of_checkpoints(tmp_path):
    one = begun(tmp_path / "one")
    one.hold(tmp_path / "checkpoints")
    one.hold(one.path / "checkpoints")  # within its own folder: held already
    other = begun(tmp_path / "other")
    with pytest.raises(ConfigError, match=r"checkpoint.dir .* is in use by a run"):
        other.hold(tmp_path / "checkpoints")
    one.close()
    other.hold(tmp_path / "checkpoints")
    other.close()


def test_a_checkpoint_folder_that_cannot_be_made_is_told_with_its_own_key(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"name another place: checkpoint\.dir=\.\.\."):
        begun(tmp_path).hold(tmp_path / "file" / "checkpoints")


def test_a_folder_of_something_else_is_left_alone(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.tex").touch()
    with pytest.raises(ConfigError, match=r"neither new, empty, nor a run's folder"):
        RunFolder(config_in(tmp_path))
    assert [p.name for p in (tmp_path / "run").iterdir()] == ["thesis.tex"]


def test_the_launch_gives_the_time_in_the_folders_name(tmp_path, monkeypatch):
    monkeypatch.setenv(STARTED, "20260102-030405")
    config = tiny_config(output={"dir": str(tmp_path / "{name}/{time}")})
    assert RunFolder(config).path == tmp_path / "tiny" / "20260102-030405"


def test_a_finished_run_is_known_and_its_record_is_not_lost_or_doubled(tmp_path):
    folder, records = begun(tmp_path), tmp_path / "records.jsonl"
    line = json.dumps({"config": config_in(tmp_path).model_dump(mode="json"), "losses": [1.0]}) + "\n"
    folder.finish(line)
    folder.close()
    for _ in range(2):
        again = RunFolder(config_in(tmp_path))
        assert again.is_finished()
        assert records.read_text() == line
        again.close()
    records.write_text("")  # the run died before the line was there
    again = RunFolder(config_in(tmp_path))
    assert again.is_finished() and records.read_text() == line
    again.close()
    longer = RunFolder(config_in(tmp_path, train={"max_steps": 40}))
    assert not longer.is_finished()
    longer.close()


@pytest.mark.parametrize(
    ("output", "checkpoints", "told"),
    [
        ("runs/{name}/{time}", "{run}/checkpoints", "the same command with output.dir=runs/tiny/1"),
        ("runs/mine", "{run}/checkpoints", "the same command"),
        (
            "runs/{time}",
            "elsewhere",
            "the same command",
        ),  # where checkpoints are, a launch goes on, whatever its folder
    ],
)
def test_how_to_go_on_names_the_folder_where_the_same_command_would_make_another(output, checkpoints, told):
    config = tiny_config(output={"dir": output}, checkpoint={"dir": checkpoints})
    assert how_to_go_on(config, Path("runs/tiny/1")) == told


def test_how_to_go_on_can_be_pasted_into_a_shell():
    told = how_to_go_on(tiny_config(output={"dir": "my runs/{time}"}), Path("my runs/1"))
    assert shlex.split(told)[-1] == "output.dir=my runs/1"

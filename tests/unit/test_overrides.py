"""The overrides file: between the configuration and the command line, and only for the configuration it was made for."""

import json

import pytest
import yaml

from dlrm_scale.config_io import fingerprint, load_config
from dlrm_scale.errors import ConfigError
from dlrm_scale.overrides import load_tuned, read_overrides
from dlrm_scale.overrides import main as print_launch
from dlrm_scale.training.main import main
from tests.support.configs import TINY


@pytest.fixture
def tiny(tmp_path):
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump(TINY))
    return path


@pytest.fixture
def tuned(tiny, tmp_path):
    path = tmp_path / "best.json"
    overrides = {"train.global_batch_size": 128, "train.max_steps": 9, "sharding.tables.user.types": ["row_wise"]}
    made_for = {"config": load_config(tiny).model_dump(mode="json"), "space": "0123456789ab"}
    launch = {"num_ranks": 4, "threads_per_rank": 3}
    path.write_text(json.dumps({"made_for": made_for, "overrides": overrides, "launch": launch}))
    return path


def test_the_command_line_has_the_last_word(tiny, tuned):
    config = load_tuned(tiny, tuned, ["train.max_steps=5"])
    same = load_config(
        tiny, ["train.global_batch_size=128", "train.max_steps=5", "sharding.tables.user.types=[row_wise]"]
    )
    assert config == same


def test_the_trainer_takes_it(tiny, tuned, capsys):
    assert main(["--config", str(tiny), "--overrides", str(tuned), "--print-config"]) == 0
    assert f"# fingerprint {fingerprint(load_tuned(tiny, tuned, []))}\n" in capsys.readouterr().out


def test_another_configuration_is_refused_with_each_difference(tiny, tuned):
    tiny.write_text(yaml.safe_dump({**TINY, "model": {**TINY["model"], "num_layers": 2, "head_hidden": [16, 8]}}))
    with pytest.raises(ConfigError) as refused:
        load_tuned(tiny, tuned, [])
    lines = str(refused.value).splitlines()
    assert "model.num_layers: 1 there, 2 now" in lines[2] and "model.head_hidden.1: not set there, 8 now" in lines[1]
    assert len(lines) == 4 and "tune anew" in lines[-1]


def test_a_file_from_before_a_key_was_there_is_taken_with_the_keys_default(tiny, tuned):
    file = json.loads(tuned.read_text())
    del file["made_for"]["config"]["train"]["compile"], file["made_for"]["config"]["resilience"]
    tuned.write_text(json.dumps(file))
    assert load_tuned(tiny, tuned, []).train.global_batch_size == 128
    with pytest.raises(ConfigError, match=r"train\.compile: False there, True now"):
        tiny.write_text(yaml.safe_dump({**TINY, "train": {**TINY["train"], "compile": True}}))
        load_tuned(tiny, tuned, [])


def test_an_override_that_the_configuration_does_not_know_is_named(tiny, tuned):
    file = json.loads(tuned.read_text())
    file["overrides"] = {"train.global_batchsize": 3}
    tuned.write_text(json.dumps(file))
    with pytest.raises(ConfigError, match=r"train\.global_batchsize: no such key; the nearest is global_batch_size"):
        load_tuned(tiny, tuned, [])


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (None, "cannot read the overrides"),
        ("{", "is no overrides file"),
        ('{"overrides": {}}', "made_for"),
        ('{"made_for": {"config": {}, "space": "a"}, "overrides": {}, "launch": {"num_ranks": 0, "threads_per_rank": 1}}', "num_ranks"),
    ],
)  # fmt: skip
def test_a_file_that_is_none_is_named(tmp_path, text, says):
    path = tmp_path / "best.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(ConfigError) as refused:
        read_overrides(path)
    assert says in str(refused.value) and str(path) in str(refused.value)


def test_the_launcher_is_told_ranks_and_threads(tuned, tmp_path, capsys):
    assert print_launch([str(tuned)]) == 0
    assert capsys.readouterr().out == "4 3\n"
    assert print_launch([str(tmp_path / "none.json")]) == 2
    assert capsys.readouterr().err.startswith("error: cannot read the overrides")

"""What a user sees of the configuration: overrides, round trip, fingerprint, and one screen for each mistake."""

from pathlib import Path

import pytest
import yaml

from dlrm_scale.config_io import dump_config, fingerprint, load_config
from dlrm_scale.errors import ConfigError
from dlrm_scale.training.main import main
from tests.support.configs import TINY

ROOT = Path(__file__).parents[2] / "configs"
CONFIGS = sorted([*ROOT.glob("*.yaml"), *ROOT.glob("benchmark/*.yaml")])


@pytest.fixture
def tiny(tmp_path):
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump(TINY))
    return path


def test_dump_reads_back_equal_and_keeps_the_fingerprint(tiny, tmp_path):
    config = load_config(tiny, ["train.max_steps=7", "model.head_hidden=[8]"])
    again = tmp_path / "again.yaml"
    again.write_text(dump_config(config))
    assert load_config(again) == config
    assert fingerprint(load_config(again)) == fingerprint(config) != fingerprint(load_config(tiny))
    assert config.train.max_steps == 7 and config.model.head_hidden == (8,)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_every_shipped_configuration_is_valid(path):
    assert load_config(path).name == path.stem


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        ("train.global_batchsize=3", ["train.global_batchsize", "nearest is global_batch_size"]),
        ("trian.epochs=3", ["trian", "nearest is train"]),
        ("data.source.num_tran=3", ["data.source.num_tran", "nearest is num_train"]),
        ("features.tables.user.embeding_dim=8", ["features.tables.user.embeding_dim", "nearest is embedding_dim"]),
        ("model.num_hads=2", ["model.num_hads", "nearest is num_heads"]),
        ("train.global_batch_size=many", ["train.global_batch_size", "valid integer", "'many'"]),
        ("train.epochs=1.5", ["train.epochs", "1.5"]),
        ("train.global_batch_size=63", ["(63)", "data.lanes (4)", "60 and 64"]),
        ("model.num_heads=3", ["model.dim (8)", "model.num_heads (3)", "set model.num_heads to"]),
        ("sharding.tables={itm: {types: [row_wise]}}", ["itm", "category, item, tag, user"]),
        (
            "sharding.tables={item: {types: [data_parallel]}}",
            ["item", "data_parallel", "table_wise, column_wise, row_wise"],
        ),
        ("sharding.tables={tag: {types: [grid_shard]}}", ["tag", "grid_shard", "pooling: mean"]),
        ("features.categorical=[{name: user, table: usr}]", ["user", "usr"]),
        ("train.sparse={name: sgd, weight_decay: 0.1}", ["sgd", "weight_decay"]),
        ("model.arch=transformer", ["transformer", "interformer"]),
        ("train.dense.lr=.nan", ["train.dense.lr"]),
        ("train={global_batch_size: 64, tf32: true, precision: bf16}", ["train.tf32", "fp32 products", "bf16"]),
        (
            "train={global_batch_size: 64, pipeline: prefetch, nonfinite: skip}",
            ["train.pipeline is prefetch", "train.nonfinite is skip", "set train.nonfinite=stop"],
        ),
    ],
)
def test_a_mistake_is_named_with_its_way_out(tiny, override, parts):
    with pytest.raises(ConfigError) as e:
        load_config(tiny, [override])
    assert all(part in str(e.value) for part in parts), str(e.value)
    assert len(str(e.value).splitlines()) < 12


def test_numbers_as_people_write_them_are_numbers(tiny):
    for text in ("1e-3", "1E-3", "1.e-3", ".1e-2", "0.001", "+1e-3"):
        assert load_config(tiny, [f"train.dense.lr={text}"]).train.dense.lr == 1e-3
    assert load_config(tiny, ["name=v1e3"]).name == "v1e3"


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"name: a\ntrain: {}\nname: b\n", r"name stands twice, in lines 1 and 3"),
        (b"features: {tables: {a: 1, b: 2, a: 3}}\n", r"a stands twice"),
        (b"name: \xff\xfe\n", "UTF-8"),
    ],
)
def test_a_file_that_would_be_misread_is_refused(tmp_path, content, said):
    (tmp_path / "bad.yaml").write_bytes(content)
    with pytest.raises(ConfigError, match=said):
        load_config(tmp_path / "bad.yaml")


@pytest.mark.parametrize("override", ["train.epochs", "=3", "--epochs=3", "train.epochs.x=3", "train.epochs=[1"])
def test_an_override_that_is_none_is_refused(tiny, override):
    with pytest.raises(ConfigError, match="override"):
        load_config(tiny, [override])


def test_multi_hot_feature_cannot_share_a_sequences_table(tiny):
    with pytest.raises(ConfigError, match=r"tags.*item.*table of its own"):
        load_config(
            tiny, ["features.categorical=[{name: tags, table: item, multi_hot: true}, {name: user, table: user}]"]
        )


def test_files_that_are_no_configuration(tmp_path):
    with pytest.raises(ConfigError, match=r"nowhere\.yaml"):
        load_config(tmp_path / "nowhere.yaml")
    for text, said in (("a: [", "not valid YAML"), ("- 1", "mapping")):
        (tmp_path / "bad.yaml").write_text(text)
        with pytest.raises(ConfigError, match=said):
            load_config(tmp_path / "bad.yaml")


def test_command_line_prints_the_resolved_configuration_without_running(tiny, capsys):
    assert main(["--config", str(tiny), "--print-config", "train.epochs=3"]) == 0
    printed = capsys.readouterr().out
    config = load_config(tiny, ["train.epochs=3"])
    assert fingerprint(config) in printed.splitlines()[0]
    assert yaml.safe_load(printed)["train"]["epochs"] == 3
    assert main(["--config", str(tiny), "train.epoch=3"]) == 2
    assert "nearest is epochs" in capsys.readouterr().err

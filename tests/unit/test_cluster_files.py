"""Cluster files: those of configs/clusters, and what is said of a file that is none."""

import re
from pathlib import Path

import pytest
import yaml

from dlrm_scale.cluster import CLUSTERS, ClusterSpec, Figure, load_cluster
from dlrm_scale.errors import ConfigError

ROOT = Path(__file__).parents[2]
FILES = sorted((ROOT / CLUSTERS).glob("*.yaml"))
SOURCE = re.compile(r"(datasheet|measured|guess): |reported by the system")


@pytest.fixture
def wrong(tmp_path, monkeypatch):
    """The message for 8xh100 with changes; None deletes a key."""
    monkeypatch.chdir(ROOT)

    def message(changes: dict, name: str = "8xh100") -> str:
        tree = yaml.safe_load((CLUSTERS / f"{name}.yaml").read_text()) | changes
        path = tmp_path / "mine.yaml"
        path.write_text(yaml.safe_dump({key: value for key, value in tree.items() if value is not None}))
        with pytest.raises(ConfigError) as e:
            load_cluster(str(path))
        head, _, problems = str(e.value).partition("\n")
        assert head == f"{path} is not a valid cluster:" and e.value.exit_code == 2
        return problems.strip()

    return message


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_every_shipped_file_is_the_cluster_of_its_name(file, monkeypatch):
    monkeypatch.chdir(ROOT)
    cluster = load_cluster(file.stem)
    assert cluster == load_cluster(str(file))
    num_ranks, device = re.match(r"(\d+)x([a-z]+)", file.stem).groups()
    assert (cluster.num_ranks, cluster.device == "cpu") == (int(num_ranks), device == "cpu")
    figures = [getattr(cluster, name) for name in ClusterSpec.model_fields]
    assert all(SOURCE.match(figure.source) for figure in figures if isinstance(figure, Figure))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"hbm_gbs": 3}, ["hbm_gbs: no such key; the nearest is hbm_gb"]),
        ({"hbm_gb": {"value": 80, "sorce": "x", "source": "guess: x"}}, ["hbm_gb.sorce: no such key; the nearest is source"]),
        ({"num_ranks": None}, ["num_ranks: is required"]),
        ({"num_ranks": 12}, ["num_ranks (12)", "multiple of ranks_per_host (8)"]),
        ({"num_ranks": 4}, ["ranks_per_host (8)", "num_ranks (4)", "set it to 4"]),
        ({"device": "tpu"}, ["device: ", "'cpu' or 'cuda'", "'tpu'"]),
        ({"hbm_gb_per_s": {"value": -1, "source": "guess: x"}}, ["hbm_gb_per_s.value: ", "greater than 0", "but is -1"]),
        ({"inter_host_gb_per_s": {"value": 0, "source": "guess: x"}}, ["inter_host_gb_per_s.value: ", "greater than 0", "is 0"]),
        ({"intra_host_gb_per_s": {"value": float("nan"), "source": "guess: x"}}, ["intra_host_gb_per_s.value: ", "finite", "nan"]),
        ({"intra_host_gb_per_s": {"value": float("inf"), "source": "guess: x"}}, ["intra_host_gb_per_s.value: ", "finite", "inf"]),
        ({"hbm_gb": {"value": "80", "source": "guess: x"}}, ["hbm_gb.value: ", "valid number", "'80'"]),
        ({"hbm_gb": {"value": 80}}, ["hbm_gb: the source of the number 80 is missing", "write source: 'datasheet: "]),
        ({"hbm_gb": {"source": "guess: x"}}, ["hbm_gb.value: is required"]),
        ({"hbm_gb": 80}, ["hbm_gb: a number comes with its source", "{value: 80, source: 'datasheet: "]),
        ({"hbm_gb": None}, ["a cuda cluster needs hbm_gb;", "or set device to cpu"]),
        ({"device": "cpu"}, ["a cpu cluster must not have hbm_gb, hbm_gb_per_s, host_link_gb_per_s", "set device to cuda"]),
    ],
)  # fmt: skip
def test_a_mistake_is_named_with_its_way_out(wrong, changes, said):
    message = wrong(changes)
    assert all(part in message for part in said), message
    assert len(message.splitlines()) == 1


def test_every_mistake_of_a_file_is_named_at_once(wrong):
    said = wrong({"ranks_per_host": 0, "hbm_gb": 80, "colour": "red"})
    assert [line.split(":")[0].strip() for line in said.splitlines()] == ["ranks_per_host", "hbm_gb", "colour"]


def test_an_unknown_name_is_answered_with_the_known_ones(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    with pytest.raises(ConfigError, match=r"no cluster 8xh10 in configs/clusters.*128xh100.*8xh100.*ends in \.yaml"):
        load_cluster("8xh10")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=r"no cluster 8xh100 .*is this the repository\?"):
        load_cluster("8xh100")


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"device: cpu\ndevice: cuda\n", "device stands twice, in lines 1 and 2"),
        (b"device: [\n", "not valid YAML"),
        (b"- device\n", r"must hold a mapping of keys \(device, num_ranks, .*holds list"),
        (b"", "must hold a mapping of keys"),
        (b"device: \xff\n", "UTF-8"),
    ],
)
def test_a_file_that_would_be_misread_is_refused(tmp_path, content, said):
    path = tmp_path / "bad.yaml"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=said) as e:
        load_cluster(str(path))
    assert str(path) in str(e.value)


def test_a_path_that_cannot_be_read_is_named(tmp_path):
    (tmp_path / "folder.yaml").mkdir()
    for name, why in (("folder.yaml", "Is a directory"), ("nowhere.yaml", "No such file")):
        with pytest.raises(ConfigError, match=rf"cannot read the cluster .*{name}: {why}"):
            load_cluster(str(tmp_path / name))

"""The replay table: a call that goes on, and records that the benchmarks read."""

import argparse
from pathlib import Path

import pytest

from dlrm_scale.errors import ConfigError
from dlrm_scale.tuning.records import read_records
from dlrm_scale.tuning.space import load_space
from tests.support.spaces import write_space
from tools.benchmark.replay_table import Part, _write, draw, record, summary

KNOBS = {
    "ranks": {"kind": "categorical", "key": "launch.num_ranks", "values": [1, 2]},
    "batch": {"kind": "categorical", "key": "train.global_batch_size", "values": [64, 128]},
}
MADE_FOR = {"space": "a", "points": 2, "steps": 8, "seed": 0}


@pytest.fixture
def space(tmp_path):
    return load_space(write_space(tmp_path, KNOBS))


def times(p50: float) -> dict[str, float]:
    return {"p10": p50 - 1, "p50": p50, "p90": p50 + 2}


def test_a_call_goes_on_behind_the_last_whole_line(tmp_path):
    path = tmp_path / "table.part"
    Part(path, MADE_FOR).add(0, 1, times(5.0))
    with path.open("a") as f:
        f.write('{"repeat": 1, "ind')  # as a kill leaves it
    part = Part(path, MADE_FOR)
    assert part.times == {(0, 1): times(5.0)}
    part.add(1, 1, times(6.0))
    assert Part(path, MADE_FOR).times == {(0, 1): times(5.0), (1, 1): times(6.0)}


def test_another_table_is_refused(tmp_path):
    Part(tmp_path / "table.part", MADE_FOR)
    with pytest.raises(ConfigError, match="is of another table"):
        Part(tmp_path / "table.part", {**MADE_FOR, "steps": 9})


@pytest.mark.parametrize("name", ["table.jsonl", "table.jsonl.gz"])
def test_its_records_are_read_back(space, tmp_path, name):
    rows = draw(space, 4, seed=0)
    assert len({row.point for row in rows}) == 4
    args = argparse.Namespace(steps=8, seed=0)
    records = [record(row, [times(8.0), times(2.0), times(4.0)], args) for row in rows]
    _write(tmp_path / name, records)
    history = read_records([tmp_path / name])
    assert history.problems == () and [r.step_ms for r in history.records] == [4.0] * 4
    assert {(r.job.launch.num_ranks, r.trial.point["ranks"]) for r in history.records} == {(1, 1), (2, 2)}
    assert summary("t", records)["noise"] == pytest.approx(6.0 / 4.0)


@pytest.mark.parametrize("content", [b"no gzip", b"\x1f\x8b\x08\x00\x00\x00\x00\x00\x00\x03"])
def test_a_table_that_is_cut_off_is_named(tmp_path, content):
    (tmp_path / "table.jsonl.gz").write_bytes(content)
    with pytest.raises(ConfigError, match=r"cannot read the records .*table\.jsonl\.gz"):
        read_records([tmp_path / "table.jsonl.gz"])


def test_the_table_that_is_kept_is_of_the_space_beside_it():
    """It ends when configs/criteo_80k.yaml or the cluster file changes: measure it anew then, with the command in docs/results/tuner.md."""
    replay = Path(__file__).parents[2] / "docs" / "results" / "replay"
    space = load_space(replay / "criteo_80k.yaml")
    history = read_records([replay / "criteo_80k.jsonl.gz"])
    assert history.problems == ()
    assert {space.point(r.trial.point) for r in history.records} == set(space.enumerate())
    assert {r.trial.space for r in history.records} == {space.fingerprint} and {
        len(r.repeats_ms) for r in history.records
    } == {2}

"""The replay table, measured on real ranks."""

import json

import pytest

from dlrm_scale.tuning.records import read_records
from tests.support.configs import TINY
from tests.support.spaces import write_space
from tools.benchmark.__main__ import main

KNOBS = {
    "ranks": {"kind": "categorical", "key": "launch.num_ranks", "values": [1, 2]},
    "batch": {"kind": "categorical", "key": "train.global_batch_size", "values": [64, 1024]},
}


@pytest.mark.timeout(300)
def test_every_point_is_measured_in_every_round(tmp_path, capsys):
    space = write_space(tmp_path, KNOBS, TINY)
    out = tmp_path / "table.jsonl.gz"
    sizes = ["--points", "4", "--repeats", "2", "--steps", "8"]
    assert main(["replay_table", "--space", str(space), *sizes, "--out", str(out), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["points"] == 4
    history = read_records([out])
    assert history.problems == () and len(history.records) == 4
    ms = {(r.job.launch.num_ranks, r.job.config.train.global_batch_size): r.step_ms for r in history.records}
    assert len(ms) == 4 and ms[1, 1024] > ms[1, 64] and ms[2, 1024] > ms[2, 64]
    assert [path.name for path in tmp_path.glob("*.part")] == []

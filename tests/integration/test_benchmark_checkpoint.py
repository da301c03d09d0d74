"""The benchmark of saves, on a state small enough for a test: that it measures what it says, not how fast it is."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def benchmark(*arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "tools.benchmark", "checkpoint", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=110)


@pytest.mark.timeout(120)
def test_every_way_of_saving_is_measured_and_nothing_stays(tmp_path):
    done = benchmark("--gb", "0.02", "--rounds", "2", "--folder", str(tmp_path), "--json")
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["state_bytes"] == pytest.approx(0.02e9, rel=0.05)
    assert set(result["seconds"]) == {"sync", "plain_write", "async_stall", "async_written"}
    assert all(0 < spread["p10"] <= spread["median"] <= spread["p90"] for spread in result["seconds"].values())
    assert result["seconds"]["async_stall"]["median"] < result["seconds"]["async_written"]["median"]
    assert list(tmp_path.iterdir()) == []


def test_a_disk_without_room_is_refused_before_anything_is_built(tmp_path):
    done = benchmark("--gb", "1e9", "--folder", str(tmp_path))
    assert done.returncode == 2 and "GB left" in done.stderr, done.stderr
    assert list(tmp_path.iterdir()) == []

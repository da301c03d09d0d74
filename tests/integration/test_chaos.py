"""Real jobs under faults, through the chaos runner: the small schedule. `make chaos` runs the full one."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.timeout(420)
def test_a_job_that_is_killed_and_damaged_ends_with_the_bytes_of_an_unbroken_one(tmp_path):
    command = [sys.executable, "-m", "tools.chaos", "--small", "--seed", "1", "--folder", str(tmp_path), "--json"]
    command.append("resilience.watchdog_seconds=120")  # nothing freezes here, and a busy machine is no hang
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr
    [job] = json.loads(done.stdout)["jobs"]
    assert job["num_faults"] == 5 and job["num_launches"] == 2
    assert job["largest_difference"] == 0.0 and job["problems"] == []


def test_an_unknown_job_is_a_usage_error_that_names_the_known_ones():
    done = subprocess.run(
        [sys.executable, "-m", "tools.chaos", "--jobs", "meteor"], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 2 and "kill in each phase of a load" in done.stderr

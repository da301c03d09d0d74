"""The benchmark of predictions as a user runs it: plans that differ, each trained as planned and timed."""

import json
import subprocess
import sys
from pathlib import Path

import yaml

from dlrm_scale.cluster import this_cluster

ROOT = Path(__file__).parents[2]
NUM_PLANS, REPEATS = 4, 2


def test_every_plan_is_predicted_and_trained_as_planned(tmp_path):
    cluster = this_cluster(2, 2, "cpu").model_dump(mode="json", exclude_defaults=True)
    (tmp_path / "two.yaml").write_text(yaml.safe_dump(cluster))
    command = [
        sys.executable,
        "-m",
        "tools.benchmark",
        "truth",
        "--nproc",
        "2",
        "--cluster",
        str(tmp_path / "two.yaml"),
    ]
    command += ["--plans", str(NUM_PLANS), "--repeats", str(REPEATS), "--steps", "2", "--local-batch", "64", "--json"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=110)
    assert (done.returncode, done.stderr) == (0, "")
    result = json.loads(done.stdout)
    assert result["setup"]["cluster"] == cluster
    plans = result["plans"]
    assert len({json.dumps(plan["tables"]) for plan in plans}) == NUM_PLANS
    for plan in plans:
        assert len(plan["tables"]) == 8
        for name, table in plan["tables"].items():
            assert table["built_type"] == table["sharding_type"], (plan["plan"], name)
        assert len(plan["repeat_ms"]) == REPEATS
        assert 0 < min(plan["repeat_ms"]) <= plan["measured_ms"] <= max(plan["repeat_ms"])
        assert plan["spread"] >= 0 and min(plan["predicted_ms"].values()) > 0
    kinds = {table["built_type"] for plan in plans for table in plan["tables"].values()}
    assert len(kinds) >= 3, kinds
    for found in result["objectives"].values():
        assert -1 <= found["low"] <= found["tau"] <= found["high"] <= 1 and found["regret"] >= 0
    assert -1 <= result["noise"]["repeat_tau"] <= 1

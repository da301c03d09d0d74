"""The training benchmark as a user runs it, on real ranks."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from dlrm_scale.training.clock import STAGES
from tests.support.configs import TINY

ROOT = Path(__file__).parents[2]
DLRM = {
    **TINY,
    "features": {
        "tables": {f"cat_{i}": {"num_embeddings": 200, "embedding_dim": 8} for i in range(3)},
        "dense": [{"name": "age"}],
        "categorical": [{"name": f"cat_{i}", "table": f"cat_{i}"} for i in range(3)],
    },
    "model": {"arch": "dlrm_dcnv2", "bottom_hidden": [16], "cross_layers": 2, "cross_rank": 8, "top_hidden": [16]},
}


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    folder = tmp_path_factory.mktemp("train")
    (folder / "config.yaml").write_text(yaml.safe_dump(DLRM))
    command = [sys.executable, "-m", "tools.benchmark", "train", "--config", str(folder / "config.yaml")]
    command += [
        "--steps",
        "12",
        "--repeats",
        "1",
        "--stock",
        "--skip",
        "data",
        "dense",
        "--trace",
        str(folder / "trace"),
    ]
    command += ["--variant", "one rank", "launch.num_ranks=1", "train.pipeline=none", "--json"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr
    return folder, done


@pytest.mark.timeout(300)
def test_it_compares_variants_and_says_where_time_goes(done):
    _, done = done
    result = json.loads(done.stdout)
    assert set(result["variants"]) == {"base", "one rank", "without data", "without dense", "stock TorchRec"}
    for name, found in result["variants"].items():
        [run] = found["runs"]
        assert run["samples_per_s"] > 0 and 0 < run["step_ms"]["p10"] <= run["step_ms"]["p50"] <= run["step_ms"]["p90"]
        assert len(run["peak_memory"]) == (1 if name == "one rank" else 2)
        assert run["peaks"]["flops_per_s"]["fp32"] > 1e9 and 0 < run["mbu"] < 1
        assert (run["mfu"]["fp32"] is None) == (name == "without dense")
    assert set(result["variants"]["base"]["runs"][0]["stage_ms"]) == set(STAGES)
    assert "Self CPU time total" in result["costliest"]


@pytest.mark.timeout(300)
def test_its_traces_are_there_and_its_log_is_quiet(done):
    folder, done = done
    traces = sorted(path.name for path in (folder / "trace").glob("*.pt.trace.json"))
    assert [name.split(".")[0] for name in traces] == ["rank_0", "rank_1"]
    assert all("aten::addmm" in (folder / "trace" / name).read_text() for name in traces)
    assert "Warning" not in done.stderr and "Traceback" not in done.stderr

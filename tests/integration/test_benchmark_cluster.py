"""The cluster benchmark as a user runs it, and what it says of ranks that die."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dlrm_scale.cluster import ClusterSpec, Figure, load_cluster
from dlrm_scale.errors import ConfigError, NoPlanError, PeerError
from tools.benchmark import ranks
from tools.benchmark.ranks import run_on_ranks

ROOT = Path(__file__).parents[2]


def test_it_writes_a_cluster_file_whose_figures_lie_among_what_it_measured(tmp_path):
    out = tmp_path / "mine.yaml"
    command = [sys.executable, "-m", "tools.benchmark", "cluster", "--device", "cpu", "--nproc", "2", "--seconds", "1"]
    command += ["--json", "--out", str(out)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=110)
    assert (done.returncode, done.stderr) == (0, "")
    cluster, rows = load_cluster(str(out)), json.loads(done.stdout)["rows"]
    assert (cluster.device, cluster.num_ranks, cluster.ranks_per_host) == ("cpu", 2, 2)
    for name in ClusterSpec.model_fields:
        figure = getattr(cluster, name)
        if isinstance(figure, Figure):
            assert figure.value > 0
            assert "tools.benchmark cluster --device cpu --nproc 2" in figure.source or name == "host_memory_gb"
    speeds = {(row["what"], row["bytes"]): row["median_gb_per_s"] for row in rows}
    exchanges = [speeds[what, 2**24] for what in ("all-to-all", "reduce-scatter", "all-gather")]
    exchanges += [speeds[what, 2**26] for what in ("all-to-all", "reduce-scatter", "all-gather")]
    assert min(exchanges) <= cluster.intra_host_gb_per_s.value * 1.01
    assert cluster.intra_host_gb_per_s.value <= max(exchanges) * 1.01
    assert all(row["p10_gb_per_s"] <= row["median_gb_per_s"] <= row["p90_gb_per_s"] for row in rows)


def be_killed(tell):
    if os.environ["RANK"] == "1":
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(60)


def fail(tell, error):
    if os.environ["RANK"] == "1":
        raise error
    time.sleep(60)


def lose_the_other(tell, error):
    if os.environ["RANK"] == "1":
        time.sleep(0.5)
        raise error
    raise RuntimeError("Connection closed by peer")


def sleep(tell):
    time.sleep(60)


def add(tell, number):
    tell(os.environ["WORLD_SIZE"])
    return int(os.environ["RANK"]) + number


def test_ranks_that_die_or_hang_are_reported(monkeypatch):
    with pytest.raises(PeerError, match=r"rank 1 was ended by SIGKILL.*take fewer ranks"):
        run_on_ranks(be_killed, (), 2, 2)
    with pytest.raises(RuntimeError, match=r"(?s)rank 1 failed: Traceback.*ZeroDivisionError: of ours"):
        run_on_ranks(fail, (ZeroDivisionError("of ours"),), 2, 2)
    with pytest.raises(ConfigError, match=r"^the user's$"):
        run_on_ranks(fail, (ConfigError("the user's"),), 2, 2)
    with pytest.raises(NoPlanError, match=r"^of the other$"):
        run_on_ranks(lose_the_other, (NoPlanError("of the other"),), 2, 2)
    with pytest.raises(
        ranks.NoMemoryError, match=r"rank 1 has no memory left: RuntimeError: .*can't allocate memory.*fewer"
    ):
        run_on_ranks(lose_the_other, (RuntimeError("[fail] can't allocate memory: 4 bytes"),), 2, 2)
    monkeypatch.setattr(ranks, "SILENCE_SECONDS", 5.0)
    with pytest.raises(PeerError, match="no sign for 5 s"):
        run_on_ranks(sleep, (), 2, 2)


def tell_pid(tell):
    tell(os.getpid())
    time.sleep(60)


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel's own way")
def test_ranks_end_with_a_call_that_is_killed():
    call = (
        "from tests.integration.test_benchmark_cluster import tell_pid\n"
        "from tools.benchmark.ranks import run_on_ranks\n"
        "run_on_ranks(tell_pid, (), 2, 2, told=lambda pid: print(pid, flush=True))"
    )
    with subprocess.Popen([sys.executable, "-c", call], cwd=ROOT, stdout=subprocess.PIPE, text=True) as parent:
        pids = [int(parent.stdout.readline()) for _ in range(2)]
        assert all(map(_runs, pids))
        parent.kill()
    deadline = time.monotonic() + 20
    while any(map(_runs, pids)) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not any(map(_runs, pids))


def _runs(pid: int) -> bool:
    """A zombie, whose parent is gone and which nobody has waited for, has ended."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def test_results_come_by_rank_and_words_as_they_are_said():
    said = []
    assert run_on_ranks(add, (5,), 2, 2, told=said.append) == [5, 6]
    assert said == ["2", "2"]

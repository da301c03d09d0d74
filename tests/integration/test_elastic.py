"""How a job ends, with real ranks under the real launcher."""

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
# Rank 1 behaves as told; rank 0 would go on, until the launcher ends it.
RANKS = """
import os, signal, sys, time
rank, how = int(os.environ["RANK"]), sys.argv[1]
if how == "well":
    os.write(1, f"rank {rank} of {os.environ['WORLD_SIZE']}\\n".encode())
    sys.exit(0)
if rank == 1 and how == "refuse":
    print("the config asks for 3 lanes", file=sys.stderr)
    sys.exit(2)
if rank == 1 and how == "die":
    os.kill(os.getpid(), signal.SIGKILL)
# one write: two ranks share the pipe, and print() may write the line and its end apart
os.write(1, b"waiting\\n")
time.sleep(60)
"""


@pytest.fixture
def start(tmp_path):
    script = tmp_path / "ranks.py"
    script.write_text(RANKS)
    jobs = []

    def launch(how: str, *rendezvous: str, nproc: int = 2) -> subprocess.Popen:
        command = [sys.executable, "-m", "launchers.elastic", *rendezvous, "--nproc-per-node", str(nproc)]
        env = os.environ | {"OMP_NUM_THREADS": "1"}
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        jobs.append(subprocess.Popen([*command, str(script), how], cwd=ROOT, env=env, **pipes))
        return jobs[-1]

    yield launch
    for job in jobs:
        job.kill()


def test_a_refusing_rank_has_the_word_and_its_exit_code_is_the_jobs(start):
    job = start("refuse", "--standalone")
    _, errors = job.communicate(timeout=60)
    assert job.returncode == 2
    assert errors == (
        "the config asks for 3 lanes\n"
        "The job failed: rank 1 ended with exit code 2 (its message stands above, first).\n"
    )


def test_a_killed_rank_ends_the_job_and_is_named(start):
    job = start("die", "--standalone")
    _, errors = job.communicate(timeout=60)
    assert job.returncode == 128 + signal.SIGKILL
    assert errors.startswith("The job failed: rank 1 ended with signal 9 (SIGKILL)")


def test_stopping_the_launcher_stops_the_ranks_without_a_traceback(start):
    job = start("wait", "--standalone")
    assert job.stdout.readline() == "waiting\n"
    job.send_signal(signal.SIGTERM)
    _, errors = job.communicate(timeout=60)
    assert job.returncode == 128 + signal.SIGTERM
    assert "Traceback" not in errors


def test_two_launchers_meet_as_two_machines_would(start):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        endpoint = f"127.0.0.1:{free.getsockname()[1]}"
    rendezvous = ("--nnodes", "2", "--rdzv-backend", "c10d", "--rdzv-endpoint", endpoint, "--rdzv-id", "test")
    # the one that does not host comes first and must wait
    jobs = [start("well", *rendezvous, "--rdzv-conf", f"is_host={is_host}", nproc=1) for is_host in ("false", "true")]
    outputs = [job.communicate(timeout=60) for job in jobs]
    assert [job.returncode for job in jobs] == [0, 0], outputs
    assert sorted(out for out, _ in outputs) == ["rank 0 of 2\n", "rank 1 of 2\n"]


def test_a_machine_that_finds_no_host_says_where_it_looked(start):
    conf = "is_host=false,read_timeout=1"
    job = start(
        "well", "--nnodes", "2", "--rdzv-backend", "c10d", "--rdzv-endpoint", "127.0.0.1:1", "--rdzv-conf", conf
    )
    _, errors = job.communicate(timeout=60)
    assert job.returncode == 1
    assert "could not join the job at 127.0.0.1:1" in errors and "Traceback" not in errors

"""SIGTERM and SIGUSR1: the first asks, the second ends; what a process that stopped as asked, or failed, does with later ones."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dlrm_scale.data.loader import StepAgreement, StepStatus
from dlrm_scale.resilience import preemption
from dlrm_scale.resilience.preemption import Preemption

ROOT = Path(__file__).parents[2]
WAIT = """
import sys, time
from dlrm_scale.resilience.preemption import Preemption
with Preemption() as asked:
    print("ready", flush=True)
    while asked.requested is None:
        time.sleep(0.01)
    print(asked.requested.name, flush=True)
    time.sleep(float(sys.argv[1]))
    if sys.argv[2] == "fail":
        raise SystemExit(7)
print("out", flush=True)
time.sleep(0.5)
"""


@pytest.fixture
def start():
    started = []

    def run(seconds: float, how: str = "well") -> subprocess.Popen:
        command = [sys.executable, "-c", WAIT, str(seconds), how]
        started.append(subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True))
        assert started[-1].stdout.readline() == "ready\n"
        return started[-1]

    yield run
    for process in started:
        process.kill()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_the_first_signal_lets_the_process_finish_and_later_ones_cannot_disturb_its_end(start, number):
    process = start(0.1)
    process.send_signal(number)
    assert process.stdout.readline() == f"{number.name}\n"
    assert process.stdout.readline() == "out\n"
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=10) == 0


def test_what_follows_at_once_is_the_same_request_and_what_follows_later_ends_the_process(start):
    process = start(60)
    process.send_signal(signal.SIGUSR1)
    assert process.stdout.readline() == "SIGUSR1\n"
    process.send_signal(signal.SIGTERM)
    time.sleep(preemption.SAME_REQUEST_SECONDS + 0.2)
    assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=10) == -signal.SIGTERM


def test_a_process_that_failed_can_be_ended_as_before():
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(ZeroDivisionError), Preemption() as asked:
        os.kill(os.getpid(), signal.SIGUSR1)
        assert asked.requested is signal.SIGUSR1
        raise ZeroDivisionError
    assert signal.getsignal(signal.SIGTERM) is before


def test_without_a_signal_nothing_is_left_behind():
    before = [signal.getsignal(s) for s in preemption.SIGNALS]
    with Preemption() as asked:
        assert asked.requested is None
    assert [signal.getsignal(s) for s in preemption.SIGNALS] == before


def test_a_status_asks_for_nothing_unless_told():
    assert not StepStatus(1.0, ended=False, failed=False).stop
    assert not StepAgreement(1.0, all_ended=False, any_failed=False).any_stop

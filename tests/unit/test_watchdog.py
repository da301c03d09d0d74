"""Who is named when a job hangs, and that a process that hangs ends."""

import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from dlrm_scale.errors import EXIT_HUNG
from dlrm_scale.resilience.watchdog import Beat, Watchdog, culprits, report

ROOT = Path(__file__).parents[2]
NOW = 1000.0
WAITING = Beat("backward", 7, 40, 5.0, NOW - 0.1, True, False, "torch/autograd/graph.py:1 run")


@pytest.mark.parametrize(
    ("beats", "named", "why"),
    [
        ([WAITING, replace(WAITING, time=NOW - 3)], [1], "frozen"),
        ([None, WAITING], [0], "frozen"),
        ([WAITING, replace(WAITING, entered=39, phase="forward")], [1], "behind"),
        ([replace(WAITING, entered=38), WAITING, replace(WAITING, entered=38)], [0, 2], "behind"),
        ([WAITING, replace(WAITING, waits=False)], [1], "code of its own"),
        ([replace(WAITING, phase="data", reader_waits=True), replace(WAITING, phase="data")], [1], "reading"),
        ([WAITING, WAITING], [], "no rank is behind"),
        ([replace(WAITING, entered=1), replace(WAITING, time=NOW - 3)], [1], "frozen"),
    ],
)
def test_the_rank_that_holds_up_the_others_is_named(beats, named, why):
    ranks, said = culprits(dict(enumerate(beats)), NOW, beat_seconds=0.5)
    assert ranks == named and why in said


def test_the_report_has_one_line_a_rank_and_marks_the_culprit():
    beats = {0: WAITING, 1: replace(WAITING, phase="data", step=6, time=NOW - 9, age_seconds=1.0), 2: None}
    first, *ranks, last = report(beats, NOW, 0.5, "runs/x/hung").splitlines()
    assert first == "error: the job hangs; rank 1, 2 is frozen: its process gives no sign of life"
    assert ranks[0].startswith("  rank 0: backward, step 7, no progress for 5.1 s, at torch/autograd")
    assert ranks[1].startswith("->rank 1: data, step 6, no progress for 10.0 s, silent for 9.0 s")
    assert ranks[2] == "  rank 2: never heard of"
    assert "runs/x/hung" in last and str(EXIT_HUNG) in last


HANG = """
import sys, time
from pathlib import Path
from dlrm_scale.resilience.watchdog import Watchdog
def stuck_here():
    time.sleep(60)
with Watchdog(0, 1, 0.6, 1.6) as watchdog:
    watchdog.folder = Path(sys.argv[1])
    for _ in range(10):  # slower than the limit in sum, not each
        watchdog.enter("data")
        time.sleep(0.1)
    print("hangs", flush=True)
    watchdog.enter(sys.argv[2])
    stuck_here()
"""


@pytest.mark.parametrize(("phase", "seconds"), [("forward", 0.6), ("save", 1.6)])
def test_a_process_without_progress_ends_within_its_limit_and_leaves_its_stacks(tmp_path, phase, seconds):
    command = [sys.executable, "-c", HANG, str(tmp_path / "hung"), phase]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "hangs\n"
        start = time.monotonic()
        _, errors = process.communicate(timeout=20)
        took = time.monotonic() - start
    assert process.returncode == EXIT_HUNG
    assert seconds <= took < seconds + 2
    assert f"->rank 0: {phase}, step 0" in errors or f"  rank 0: {phase}, step 0" in errors
    [stacks] = (tmp_path / "hung").iterdir()
    assert "stuck_here" in stacks.read_text()


def test_switched_off_it_watches_nothing():
    with Watchdog(0, 1, 0, 1) as watchdog:
        watchdog.since -= 1e6
        time.sleep(0.5)  # this process would have ended


def test_a_reader_that_agrees_is_marked_as_waiting():
    watchdog = Watchdog(0, 1, 0, 1)
    seen = []
    watched = watchdog.watched(lambda status: seen.append(watchdog.reader_waits) or status)
    assert watched(5) == 5 and seen == [True] and not watchdog.reader_waits

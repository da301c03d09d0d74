"""The trainer's ranks with one fault armed: what `tools.chaos` launches instead of `dlrm_scale.training.main`.

The environment's CHAOS_FAULTS is a JSON list of faults; attempt i of the launcher (counted from 0) meets the i-th one.
"""

import json
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

from dlrm_scale.libraries import loading_libraries
from dlrm_scale.training.main import main
from tools.chaos.faults import Fault

FAULTS = "CHAOS_FAULTS"
SLOW_SECONDS = 0.2  # of each batch of a slow rank


def armed() -> Fault | None:
    """This rank's fault in this attempt."""
    faults = json.loads(os.environ[FAULTS])
    attempt = int(os.environ["TORCHELASTIC_RESTART_COUNT"])
    if attempt >= len(faults):
        return None
    fault = Fault(**faults[attempt])
    return fault if fault.rank == int(os.environ["RANK"]) else None


def arm(fault: Fault) -> None:
    if fault.strike in ("disk_full", "slow_disk"):
        from tools.chaos.disk import Disk

        Disk.trouble, Disk.nth = fault.strike, fault.nth
        return
    times = 0

    def strike(batch: Any = None) -> None:
        nonlocal times
        times += 1
        if fault.strike == "slow":
            time.sleep(SLOW_SECONDS)
        elif times == fault.nth:
            STRIKES[fault.strike](batch)

    if fault.at in ("batch", "evaluation"):
        with loading_libraries():
            from dlrm_scale.training.readers import EvalReader, TrainReader

        reader = TrainReader if fault.at == "batch" else EvalReader
        reader.batches = _struck(reader.batches, strike)
    else:
        from dlrm_scale.checkpoint import phases

        phases.on_phase.append(lambda phase: strike() if phase == fault.at else None)


def _struck(
    batches: Callable[..., AbstractContextManager[Iterator[Any]]], strike: Callable[[Any], None]
) -> Callable[..., AbstractContextManager[Iterator[Any]]]:
    """A reader's `batches` that strikes when the trainer takes one."""

    @contextmanager
    def replacement(*args: Any) -> Iterator[Iterator[Any]]:
        with batches(*args) as stream:

            def struck() -> Iterator[Any]:
                for batch in stream:
                    strike(batch)
                    yield batch

            yield struck()

    return replacement


def _nan(batch: Any) -> None:
    batch.dense_BF[0, 0] = float("nan")


STRIKES: dict[str, Callable[[Any], None]] = {
    "kill": lambda _: os.kill(os.getpid(), signal.SIGKILL),
    "freeze": lambda _: os.kill(os.getpid(), signal.SIGSTOP),
    "kill_launcher": lambda _: os.kill(os.getppid(), signal.SIGKILL),
    "preempt": lambda _: os.kill(os.getppid(), signal.SIGTERM),
    "preempt_usr1": lambda _: os.kill(os.getppid(), signal.SIGUSR1),
    "nan": _nan,
}


if __name__ == "__main__":
    if fault := armed():
        arm(fault)
    sys.exit(main(sys.argv[1:]))

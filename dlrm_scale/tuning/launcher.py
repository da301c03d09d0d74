"""Starts trials through TorchX, watches them, and turns however they end into a record.

    launcher = Launcher(folder, Limits(time_limit_s=600), scheduler="local_cwd")
    launcher.launch(trial); ended = launcher.poll(best_samples_per_s)

A scheduler that runs trials elsewhere must see the tuning folder under the same path: progress and results come through it.
"""

import fcntl
import math
import os
import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torchx.runner import get_runner
from torchx.schedulers import get_scheduler_factories
from torchx.specs import AppState, is_terminal

from dlrm_scale.errors import ConfigError, UserError
from dlrm_scale.tuning.space import cores
from dlrm_scale.tuning.trial import (
    Trial,
    clean,
    failed_record,
    finished_record,
    kernel_kills,
    prepare,
    progress,
    stopped_record,
    why_failed,
)

COMPONENT = "launchers/torchx_component.py:train"  # relative to the working directory, as configurations are
POLL_SECONDS = 0.2
LEAST_LOGS = 2  # between which a trial's speed must be known before it may be called hopeless
LOG_LINES = 200


class LaunchError(UserError):
    """The scheduler took no job: nothing was learned of the trial."""


@dataclass(frozen=True)
class Limits:
    """Of trials of speed; one of quality takes what training takes, and the trainer's own watchdog ends it if it hangs.

    hopeless: a trial that is slower than this part of the best so far is stopped; 0: none is.
    """

    time_limit_s: float = math.inf
    hopeless: float = 0.5
    parallel: int = 1


@dataclass
class Running:
    trial: Trial
    handle: str
    folder: Path
    started: float | None  # when it was first seen running
    kernel_kills: int


@dataclass(frozen=True)
class Ended:
    trial: Trial
    record: dict[str, Any]


class Launcher:
    """Raises ConfigError: there is no such scheduler, or it knows no such setting."""

    def __init__(
        self, folder: Path, limits: Limits, scheduler: str = "local_cwd", settings: str = "", job: Sequence[str] = ()
    ) -> None:
        known = list(get_scheduler_factories())
        if scheduler not in known:
            raise ConfigError(f"there is no scheduler {scheduler}; TorchX has {', '.join(known)}: name one of them")
        self.folder, self.limits, self.scheduler, self.job_arguments = folder, limits, scheduler, tuple(job)
        self.is_local = scheduler.startswith("local")
        self.running: list[Running] = []
        os.environ.setdefault("PYTHON", sys.executable)  # what launchers/torchrun.sh starts on this machine
        self.runner = get_runner()
        try:
            self.options = self.runner.scheduler_run_opts(scheduler)
        except Exception as e:  # its client library is missing, or it cannot be reached: each scheduler raises its own
            raise LaunchError(f"scheduler {scheduler} cannot be used here: {_first_line(e)}") from None
        for number in (signal.SIGINT, signal.SIGTERM):  # TorchX's handlers raise an exception of its own
            signal.signal(number, signal.default_int_handler)
        self.settings = self.options.cfg_from_str(settings)
        strange = [
            pair for pair in settings.replace(";", ",").split(",") if pair and pair.split("=")[0] not in self.settings
        ]
        if strange:
            raise ConfigError(
                f"scheduler {scheduler} has no setting {strange[0]}; it has {', '.join(dict(self.options._opts))}"
            )

    def __enter__(self) -> "Launcher":
        return self

    def __exit__(self, *args: object) -> None:
        """Ends what still runs: its trials have no result and are launched anew by whoever goes on."""
        for running in self.running:
            self._cancel(running)
            clean(running.folder)
        self.running = []
        self.runner.close()

    @property
    def may_start(self) -> bool:
        """Whether there may be room for another trial: a place, and on this machine a core that is not taken."""
        if not self.running:
            return True
        return len(self.running) < self.limits.parallel and (not self.is_local or self._threads_taken < cores())

    def has_room(self, trial: Trial) -> bool:
        """Whether it may start beside those that run: on this machine, only if all of their threads have a core each, and on its
        GPUs not at all, since ranks take them from the first on."""
        if not self.running:
            return True
        if not self.may_start or (self.is_local and trial.job.cluster.device == "cuda"):
            return False
        return not self.is_local or self._threads_taken + _threads(trial) <= cores()

    @property
    def _threads_taken(self) -> int:
        return sum(_threads(running.trial) for running in self.running)

    def launch(self, trial: Trial) -> None:
        """Raises LaunchError: the scheduler did not take it."""
        folder = self.folder / "trials" / trial.name
        wait_for_earlier(folder)
        arguments = [*_options(self.job_arguments), *prepare(trial, folder)]
        settings = dict(self.settings)
        if self.is_local and "log_dir" not in settings:
            settings["log_dir"] = str(folder / "logs")
        try:
            handle = self.runner.run_component(COMPONENT, arguments, self.scheduler, cfg=settings)
        except (Exception, SystemExit) as e:  # TorchX, its schedulers' clients and argparse each raise their own
            raise LaunchError(f"scheduler {self.scheduler} did not take the trial: {_first_line(e)}") from None
        self.running.append(Running(trial, handle, folder, None, kernel_kills()))

    def poll(self, best_samples_per_s: float) -> list[Ended]:
        """Those that have ended since the last call, or are stopped now: too late, or hopeless beside the best."""
        ended = []
        for running in list(self.running):
            record = self._result(running, best_samples_per_s)
            if record is not None:
                self.running.remove(running)
                clean(running.folder)
                ended.append(Ended(running.trial, record))
        return ended

    def _result(self, running: Running, best_samples_per_s: float) -> dict[str, Any] | None:
        trial, status = running.trial, self.runner.status(running.handle)
        if status is None or is_terminal(status.state):
            record = finished_record(trial, running.folder)
            if record is None or (status and status.state != AppState.SUCCEEDED):
                return self._failure(running, status.state.name if status else "gone from its scheduler")
            return record
        if status.state == AppState.RUNNING and running.started is None:
            running.started = time.monotonic()
        if not trial.steps:
            return None
        if running.started is not None and time.monotonic() - running.started > self.limits.time_limit_s:
            self._cancel(running)
            reason = f"not done after the time limit of {self.limits.time_limit_s:g} s (--time-limit)"
            return failed_record(trial, reason, False, self.is_local)
        seen = progress(running.folder, trial)
        if len(seen.step_ms) < LEAST_LOGS or not self.limits.hopeless or seen.steps >= trial.steps:
            return None
        speed = trial.job.config.train.global_batch_size / min(seen.step_ms) * 1e3
        if speed >= self.limits.hopeless * best_samples_per_s:
            return None
        self._cancel(running)
        reason = f"stopped after {seen.steps} steps: {speed:,.0f} samples/s at best, beside {best_samples_per_s:,.0f}"
        return stopped_record(trial, seen, reason, self.is_local)

    def _failure(self, running: Running, state: str) -> dict[str, Any]:
        reason = why_failed(self._lines(running), state)
        killed = self.is_local and "SIGKILL" in reason and kernel_kills() > running.kernel_kills
        return failed_record(running.trial, reason, killed, self.is_local)

    def _lines(self, running: Running) -> list[str]:
        try:
            lines = list(self.runner.log_lines(running.handle, "trainer", 0))
        except Exception:  # not every scheduler keeps logs, nor for long; the record then says so
            return []
        return lines[-LOG_LINES:]

    def _cancel(self, running: Running) -> None:
        try:
            self.runner.cancel(running.handle)
        except Exception as e:  # it may have ended in between
            print(f"note: could not cancel {running.handle}: {_first_line(e)}", file=sys.stderr)


def wait_for_earlier(folder: Path) -> None:
    """A tuner that was killed leaves its trial running: it would write into the folder of the next one, and slow it down."""
    try:
        lock = (folder / "run" / ".lock").open()  # which a run holds as long as it lives
    except OSError:
        return
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"note: {folder.name} of an earlier call still runs; waiting for it to end", file=sys.stderr)
            fcntl.flock(lock, fcntl.LOCK_EX)


def _threads(trial: Trial) -> int:
    return trial.job.launch.num_ranks * trial.job.launch.threads_per_rank


def _options(settings: Sequence[str]) -> list[str]:
    return [word for setting in settings for word in ("--" + setting.partition("=")[0], setting.partition("=")[2])]


def _first_line(e: BaseException) -> str:
    return f"{type(e).__name__}: {e}".splitlines()[0]

"""torchrun, except for how a job ends and what it is started again for.

torchrun prints some forty lines of its own stack below the rank's error, turns every exit code into 1, and starts ranks again
whatever they ended with. This runs the same launcher with the same arguments, says in one line which rank failed, passes its
exit code on, and uses --max-restarts only where another start may help: see FINAL.
SIGTERM and SIGUSR1 go to the ranks, which save and end with EXIT_RESUME within --shutdown-timeout seconds.
Used by launchers/torchrun.sh: `python -m launchers.elastic <arguments of torchrun>`.
"""

import logging
import os
import signal
import sys
import time
from datetime import datetime
from functools import partial
from types import FrameType
from typing import Any

from dlrm_scale.allocator import keep_freed_memory
from dlrm_scale.errors import EXIT_FAILED, EXIT_INTERRUPTED, EXIT_RESUME, EXIT_USAGE
from dlrm_scale.libraries import loading_libraries

with loading_libraries():
    from torch.distributed.elastic.agent.server.api import RunResult, WorkerGroup, WorkerState
    from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure
    from torch.distributed.elastic.rendezvous import RendezvousError
    from torch.distributed.launcher import api
    from torch.distributed.run import parse_args, run

FINAL = (
    EXIT_FAILED,
    EXIT_USAGE,
    EXIT_RESUME,
    EXIT_INTERRUPTED,
)  # the same start would end the same way, or is not wanted
GRACE_SECONDS = 30  # from the request to stop until ranks are killed
PEERS_SECONDS = 5  # ranks whose peer has failed have nothing left to save; a frozen one heeds only SIGKILL


class Stop:
    """The request to stop that this launcher got, if any, and how long its ranks have."""

    def __init__(self, grace_seconds: float) -> None:
        self.grace_seconds = grace_seconds
        self.signal: signal.Signals | None = None
        self.deadline = float("inf")
        self.agent: Agent | None = None

    def handle(self, number: int, frame: FrameType | None) -> None:
        if self.signal is None:
            self.signal, self.deadline = signal.Signals(number), time.monotonic() + self.grace_seconds
        if self.agent is None or not self.agent.forward(number):
            raise SignalException("no rank runs yet", signal.Signals(number))


class Agent(LocalElasticAgent):
    """torchrun's agent, with our say on when and how ranks are ended and started again."""

    def __init__(self, *args: Any, stop: Stop, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.stop = stop
        self.stop.agent = self
        self.starting = False
        self.ended_pids: set[int] = set()  # of ranks that still ran when another had failed

    def forward(self, number: int) -> bool:
        """Sends a signal to the ranks that run; False if none does or is about to."""
        running = [process for process in self._processes() if process.poll() is None]
        for process in running:
            process.send_signal(number)
        return bool(running) or self.starting

    def _processes(self) -> list[Any]:
        return [handler.proc for handler in self._pcontext.subprocess_handlers.values()] if self._pcontext else []

    def _start_workers(self, worker_group: WorkerGroup) -> dict[int, Any]:
        self.starting = True
        os.environ["DLRM_SCALE_RESTART"] = self._agreed_restart(worker_group)
        pids = super()._start_workers(worker_group)
        self._end_processes = self._pcontext.close
        self._pcontext.close = self._close
        self.starting = False
        if self.stop.signal:
            self.forward(self.stop.signal)
        return pids

    def _agreed_restart(self, group: WorkerGroup) -> str:
        """Machine 0's count of restarts. An agent that starts again only because another did does not count that itself."""
        if group.group_rank == 0:
            group.store.set("restart", str(group.spec.max_restarts - self._remaining_restarts))
        return group.store.get("restart").decode()

    def _close(self, death_sig: signal.Signals | None = None, timeout: int = 0) -> None:
        """How ranks are ended: those that may still save are waited for, others get PEERS_SECONDS."""
        while self.stop.signal and time.monotonic() < self.stop.deadline:
            if all(process.poll() is not None for process in self._processes()):
                break
            time.sleep(0.1)
        self.ended_pids |= {process.pid for process in self._processes() if process.poll() is None}
        self._end_processes(signal.SIGKILL if self.stop.signal else death_sig, PEERS_SECONDS)

    def _monitor_workers(self, worker_group: WorkerGroup) -> RunResult:
        if time.monotonic() > self.stop.deadline:
            self._end_processes(signal.SIGKILL, PEERS_SECONDS)
        result = super()._monitor_workers(worker_group)
        if result.state == WorkerState.FAILED:
            causes = self.causes(result.failures)
            if self.stop.signal or causes[0][1].exitcode in FINAL:
                self._remaining_restarts = 0
            if left := self._remaining_restarts:
                print(f"{_summary(causes)} Starting all ranks again; {left - 1} more restarts left.", file=sys.stderr)
        return result

    def causes(self, failures: dict[int, ProcessFailure]) -> list[tuple[int, ProcessFailure]]:
        """The ranks that ended by themselves, earliest first."""
        by_time = sorted(failures.items(), key=lambda item: item[1].timestamp)
        return [item for item in by_time if item[1].pid not in self.ended_pids] or by_time


def main(argv: list[str]) -> int:
    """Runs the job; returns 0, the first failing rank's exit code, or 128 + the signal that ended it."""
    args = parse_args(argv)
    # It would report each rank that it stops; `failure_summary` says the same in one line.
    for part in ("multiprocessing", "agent.server"):
        logging.getLogger(f"torch.distributed.elastic.{part}.api").setLevel(logging.CRITICAL)
    keep_freed_memory(os.environ)
    os.environ["DLRM_SCALE_STARTED"] = datetime.now().strftime("%Y%m%d-%H%M%S")  # one for all restarts
    stop = Stop(GRACE_SECONDS if args.shutdown_timeout is None else args.shutdown_timeout)
    args.signals_to_handle = "SIGINT,SIGHUP,SIGQUIT"  # torchrun's own handling: end the ranks, and itself
    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, stop.handle)
    api.LocalElasticAgent = partial(Agent, stop=stop)
    try:
        run(args)
    except ChildFailedError as error:
        causes = stop.agent.causes(error.failures)
        code = _shell_code(causes[0][1].exitcode)
        if code == EXIT_RESUME:
            print(f"Stopped as asked (exit code {code}); rank 0 says how to go on.", file=sys.stderr)
            return code
        if stop.signal is None or code not in (128 + stop.signal, 128 + signal.SIGKILL):
            print(_summary(causes), file=sys.stderr)
            return code
        late = f"; not within {stop.grace_seconds:g} s, so they were killed" if code == 128 + signal.SIGKILL else ""
        print(f"Stopped by {stop.signal.name}; all ranks have ended{late}.", file=sys.stderr)
        return 128 + stop.signal
    except RendezvousError as error:
        print(
            f"This machine could not join the job at {args.rdzv_endpoint}: {error}\n"
            "Every machine needs the same --rdzv-endpoint and --nnodes, one of them --node-rank 0, and the port must be open.",
            file=sys.stderr,
        )
        return 1
    except SignalException as stopped:
        print(f"Stopped by {signal.Signals(stopped.sigval).name}; all ranks have ended.", file=sys.stderr)
        return 128 + int(stopped.sigval)
    return 0


def _summary(causes: list[tuple[int, ProcessFailure]]) -> str:
    """One line on the ranks that failed, without those that the launcher stopped because of them."""
    ended = ", ".join(f"rank {rank} ended with {_describe(failure.exitcode)}" for rank, failure in causes)
    killed = any(failure.exitcode == -signal.SIGKILL for _, failure in causes)
    hint = "often the kernel's answer to no memory left: see dmesg" if killed else "its message stands above, first"
    return f"The job failed: {ended} ({hint})."


def _describe(exitcode: int) -> str:
    return f"signal {-exitcode} ({signal.Signals(-exitcode).name})" if exitcode < 0 else f"exit code {exitcode}"


def _shell_code(exitcode: int) -> int:
    return 128 - exitcode if exitcode < 0 else exitcode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

"""torchrun, except for how a failed job ends: with the failing rank's own message, not with the launcher's.

torchrun prints some forty lines of its own stack below the rank's error and turns every exit code into 1. This runs
the same launcher with the same arguments, says in one line which rank failed, and passes its exit code on.
Used by launchers/torchrun.sh: `python -m launchers.elastic <arguments of torchrun>`.
"""

import logging
import signal
import sys

from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure
from torch.distributed.elastic.rendezvous import RendezvousError
from torch.distributed.run import parse_args, run


def main(argv: list[str]) -> int:
    """Runs the job; returns 0, the first failing rank's exit code, or 128 + the signal that ended it."""
    args = parse_args(argv)
    # It would report each rank that it stops; `failure_summary` says the same in one line.
    for part in ("multiprocessing", "agent.server"):
        logging.getLogger(f"torch.distributed.elastic.{part}.api").setLevel(logging.CRITICAL)
    try:
        run(args)
    except ChildFailedError as error:
        print(failure_summary(error.failures), file=sys.stderr)
        return _shell_code(_causes(error.failures)[0][1].exitcode)
    except RendezvousError as error:
        print(
            f"This machine could not join the job at {args.rdzv_endpoint}: {error}\n"
            "Every machine needs the same --rdzv-endpoint and --nnodes, one of them --node-rank 0, and the port must be open.",
            file=sys.stderr,
        )
        return 1
    except SignalException as stop:
        print(f"Stopped by {signal.Signals(stop.sigval).name}; all ranks have ended.", file=sys.stderr)
        return 128 + int(stop.sigval)
    return 0


def failure_summary(failures: dict[int, ProcessFailure]) -> str:
    """One line on the ranks that failed, without those that the launcher stopped because of them."""
    causes = _causes(failures)
    ended = ", ".join(f"rank {rank} ended with {_describe(failure.exitcode)}" for rank, failure in causes)
    killed = any(failure.exitcode == -signal.SIGKILL for _, failure in causes)
    hint = "often the kernel's answer to no memory left: see dmesg" if killed else "its message stands above, first"
    return f"The job failed: {ended} ({hint})."


def _causes(failures: dict[int, ProcessFailure]) -> list[tuple[int, ProcessFailure]]:
    """The ranks that ended by themselves, earliest first. torchrun stops the others with SIGTERM."""
    by_time = sorted(failures.items(), key=lambda item: item[1].timestamp)
    return [item for item in by_time if item[1].exitcode != -signal.SIGTERM] or by_time


def _describe(exitcode: int) -> str:
    return f"signal {-exitcode} ({signal.Signals(-exitcode).name})" if exitcode < 0 else f"exit code {exitcode}"


def _shell_code(exitcode: int) -> int:
    return 128 - exitcode if exitcode < 0 else exitcode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

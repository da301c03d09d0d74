"""Faults of the user's making: shown as one screen of text, never as a traceback; and how a process says how it ended.

Each message gives the rule, the values that break it and the way out. Faults of ours stay ordinary
exceptions (or `assert`) and keep their traceback.
"""

import re

# as PyTorch, NumPy, Python, C++, the kernel and the planner put it; "does not fit" alone is also said of columns and checkpoints
SHORT_OF_MEMORY = re.compile(
    r"out of memory|(?:can(?:no|')t|unable to) allocate|bad_alloc|MemoryError|no sharding plan (?:was found that )?fits",
    re.IGNORECASE,
)
LOST_PEER = ("Connection closed by peer", "Connection reset by peer")  # gloo's words

# Exit codes of a rank, and of the launcher that started it; docs/reliability.md says who does what on each.
EXIT_FAILED = 1  # a user's fault: the same command would end the same way
EXIT_USAGE = 2
EXIT_LOST_PEER = 69  # EX_UNAVAILABLE: another rank is gone
EXIT_CRASHED = 70  # EX_SOFTWARE: a fault of ours, with its traceback
EXIT_HUNG = 71  # the watchdog ended the job
EXIT_RESUME = 75  # EX_TEMPFAIL: state saved as asked by a signal, start me again
EXIT_INTERRUPTED = 130  # Ctrl-C; 128 + n: ended by signal n


def first_lines(lines: list[str], most: int) -> str:
    """Of a list in a message: the first `most`, one below the other and indented, and how many more there are."""
    more = [f"... and {len(lines) - most} more"] if len(lines) > most else []
    return "\n  ".join(["", *lines[:most], *more])


class UserError(ValueError):
    """A fault that the user can mend; the process ends with `exit_code`."""

    exit_code = EXIT_FAILED


class ConfigError(UserError):
    """The command line or a configuration file asks for something that is not valid."""

    exit_code = EXIT_USAGE


class DataError(UserError):
    """A data file breaks the schema: names file, row, feature, table and value."""


class PlanError(UserError):
    """No sharding plan exists, or a given plan is not one for this model and cluster."""


class NoPlanError(PlanError):
    """Memory is short for every plan, or constraints leave a table no way to be sharded: another request may have a plan."""


class DivergedError(UserError):
    """A loss or a gradient is no number any more, and the configuration says to stop at that."""


class RollbackRequested(DivergedError):  # noqa: N818
    """A loss or a gradient is no number any more, and the configuration says to go back to the last checkpoint.

    Attributes:
        step: the 0-based step to leave out when its turn comes again.
    """

    def __init__(self, message: str, step: int) -> None:
        super().__init__(message)
        self.step = step


class CheckpointError(UserError):
    """No checkpoint can be written, or none that is there can be gone on from; the same on every rank."""


class PeerError(DataError):
    """Another rank could not go on; what it says itself is what matters."""


class LostPeerError(PeerError):
    """The connection to another rank broke: it died, or its machine did."""

    exit_code = EXIT_LOST_PEER

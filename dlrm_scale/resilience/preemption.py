"""A signal that asks the job to stop: finish the steps under way, save, and end with a code that means "start me again"."""

import os
import signal
import time
from types import FrameType, TracebackType

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
# Slurm signals the launcher and its ranks at once, and the launcher forwards: what comes so soon is the same request.
SAME_REQUEST_SECONDS = 2.0


class Preemption:
    """While the context is open, the first SIGTERM or SIGUSR1 only sets `requested`; a second one ends the process at once.

    One rank's signal is enough: the readers carry it to all ranks in their agreement on each step (data/loader.py).
    """

    def __init__(self) -> None:
        self.requested: signal.Signals | None = None

    def __enter__(self) -> "Preemption":
        self.before = {s: signal.signal(s, self._note) for s in SIGNALS}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """A rank that failed can be ended by SIGTERM again. One that stopped as asked leaves in peace: its state is saved."""
        for s, handler in self.before.items():
            signal.signal(s, signal.SIG_IGN if self.requested and kind is None else handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self.requested is None:
            self.requested, self.at = signal.Signals(number), now
        elif now - self.at > SAME_REQUEST_SECONDS:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)

"""A rank does not outlive what started it.

Ranks whose launcher was killed would train on beside the ones that the next launch starts, in the same run folder.
"""

import ctypes
import os
import signal
import sys

PR_SET_PDEATHSIG = 1  # linux/prctl.h


def end_with_parent() -> None:
    """Has the kernel kill this process when the one that started it ends; nothing if not on Linux.

    SIGKILL, as a rank may be stopped or stuck; checkpoints are made to survive it.
    """
    if sys.platform == "linux":
        parent = os.getppid()
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:  # it ended meanwhile
            os.kill(os.getpid(), signal.SIGKILL)

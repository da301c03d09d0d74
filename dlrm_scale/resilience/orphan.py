"""A rank does not outlive its launcher.

Ranks whose launcher was killed would train on beside the ones that the next launch starts, in the same run folder.
"""

import ctypes
import os
import signal
import sys

PR_SET_PDEATHSIG = 1  # linux/prctl.h


def end_with_launcher() -> None:
    """Has the kernel kill this process when the launcher that started it ends; nothing if none did, or not on Linux.

    SIGKILL, as a rank may be stopped or stuck; checkpoints are made to survive it.
    """
    if sys.platform == "linux" and "TORCHELASTIC_RUN_ID" in os.environ:
        launcher = os.getppid()
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != launcher:  # it ended meanwhile
            os.kill(os.getpid(), signal.SIGKILL)

"""What processes of one run know of each other."""

from __future__ import annotations

import ctypes
import os
import signal
import sys


def die_with_parent() -> None:
    """Have the system kill this process when the thread that started it ends, however it ends. Linux only."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


def launched() -> int:
    """How many processes `accelerate launch` has started beside and with this one."""
    return int(os.environ.get("WORLD_SIZE", "1"))

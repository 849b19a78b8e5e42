"""Commands for child processes that end when we are killed. Called by the embedded store and the command line."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

# Runs in the child before the program: the kernel's parent-death signal survives exec. A `preexec_fn` could do the same
# but may deadlock when the parent has threads.
_LAUNCHER = """
import ctypes, os, signal, sys
if sys.platform == "linux":
    ctypes.CDLL(None).prctl(1, int(signal.SIGTERM))
    if os.getppid() != int(sys.argv[1]):
        sys.exit("the parent died while its child was starting")
os.execv(sys.argv[2], sys.argv[2:])
"""


def dies_with_parent(command: Sequence[str]) -> list[str]:
    """The command, started so that the kernel sends it SIGTERM when the calling thread's process ends, however it ends.

    On Linux; elsewhere the command is started as it is. The thread that starts the child must live as long as the
    process.

    Args:
        command: an absolute path and its arguments.
    """
    return [sys.executable, "-I", "-S", "-c", _LAUNCHER, str(os.getpid()), *command]

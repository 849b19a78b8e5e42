"""How the process's allocator treats large arrays. Called once by the command line and the benchmarks."""

from __future__ import annotations

import ctypes
import sys

_M_TRIM_THRESHOLD = -1
_M_MMAP_THRESHOLD = -3

_LARGEST_MMAP_THRESHOLD = 32 << 20
"""glibc accepts no more on 64-bit machines."""

_KEPT_BYTES = 512 << 20


def keep_freed_memory() -> bool:
    """Let glibc keep up to half a gigabyte of freed memory for the next arrays; False where the C library is another.

    Folding allocates a few matrices of d² numbers per block. By default glibc maps each afresh and gives it back, and
    on loaded machines the page faults of that cost up to as much as the arithmetic (docs/experiments.md).
    """
    if sys.platform != "linux":
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    return bool(mallopt(_M_MMAP_THRESHOLD, _LARGEST_MMAP_THRESHOLD) and mallopt(_M_TRIM_THRESHOLD, _KEPT_BYTES))

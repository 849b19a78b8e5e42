"""Memory of a process that serves: what was freed is kept for the next arrays, what is loaded is left alone.

Called by `service.cli.serve`, and by the benchmark of the posterior.
"""

from __future__ import annotations

import ctypes
import gc
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


def leave_loaded_objects_alone() -> None:
    """Take all objects that are alive now out of the garbage collector's passes: modules, the pool, tokenizers.

    They stay until the process ends. Without this each full pass visits all of them again, a hundred thousand, and
    batches, which hold thousands of objects at once, set off full passes (loadtests/README.md has what it gains).
    """
    gc.collect()
    gc.freeze()

"""How many threads torch uses for one operation, while a block lasts. Called by the offline stage and the demo."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def torch_threads(count: int) -> Iterator[None]:
    """Let torch use `count` threads; then as many as before.

    Small matrices are no faster with more, results would depend on the number of cores, and on busy cores threads that
    wait for each other made the same work five times slower.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)

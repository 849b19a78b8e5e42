"""What a process that serves does with its memory; in a process of its own, since it lasts."""

from __future__ import annotations

import subprocess
import sys

SCRIPT = """
import gc
from service.app import create_app
from service.memory import keep_freed_memory, leave_loaded_objects_alone
before = len(gc.get_objects())
keep_freed_memory()
leave_loaded_objects_alone()
later = [[] for _ in range(10)]
print(before, gc.get_freeze_count(), len(gc.get_objects()), sum(one is later for one in gc.get_objects()))
"""


def test_what_is_loaded_is_out_of_the_collectors_passes_and_what_comes_later_is_not() -> None:
    out = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=True, timeout=60).stdout
    before, frozen, visited, later = map(int, out.split())
    assert before > 10_000
    assert frozen > 0.9 * before
    assert visited < 1_000
    assert later == 1

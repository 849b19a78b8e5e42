"""A wall clock that is off by the seconds in the file `STEPPED_CLOCK`, as it reads them at each look.

Python imports this module at its start where its folder is on `PYTHONPATH`. The monotonic clock stays as it is.
"""

from __future__ import annotations

import os
import time
from pathlib import Path

if "STEPPED_CLOCK" in os.environ:
    _file = Path(os.environ["STEPPED_CLOCK"])
    _time, _time_ns = time.time, time.time_ns

    def _offset() -> float:
        try:
            return float(_file.read_text() or 0)
        except OSError:
            return 0.0

    time.time = lambda: _time() + _offset()
    time.time_ns = lambda: _time_ns() + int(_offset() * 1e9)

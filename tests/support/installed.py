"""Programs that Python packages bring along lie beside the Python that runs the tests, which need not be on PATH."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import pytest


def installed(name: str, package: str) -> str:
    """Path of the program beside this Python, else of one on the PATH; skips the test where there is neither."""
    beside = Path(sys.executable).with_name(name)
    found = str(beside) if beside.exists() else shutil.which(name)
    if found is None:
        pytest.skip(f"needs {name}: pip install {package}")
    return found

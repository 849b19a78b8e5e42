"""`python -m loadtests.workers`: real processes at one port, every figure there."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.long
def test_one_and_two_processes_are_measured_in_turns(tmp_path: Path) -> None:
    out = tmp_path / "figures.json"
    command = [sys.executable, "-m", "loadtests.workers", "--rounds", "1", "--requests", "60", "--json", str(out)]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    assert ended.returncode == 0, ended.stderr[-2000:]
    figures = json.loads(out.read_text())["by_workers"]
    assert set(figures) == {"1", "2"}
    for row in figures.values():
        assert min(row.values()) > 0

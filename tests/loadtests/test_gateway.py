"""`python -m loadtests.gateway --against`: real gateways of two checkouts (here twice this one), every figure there."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.long  # starts ten processes, seven of them gateways
def test_the_benchmark_takes_turns_with_another_checkout(tmp_path: Path) -> None:
    out = tmp_path / "figures.json"
    command = [sys.executable, "-m", "loadtests.gateway", "--rounds", "1", "--requests", "20", "--json", str(out)]
    command += ["--tracing", "--against", str(ROOT)]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=240, check=False)
    assert ended.returncode == 0, ended.stderr[-2000:]
    figures = json.loads(out.read_text())
    texts = ("look-up encoder d=64, short", "look-up encoder d=576, short", "look-up encoder d=576, long")
    for what in (*texts, "static encoder d=128, long"):
        for who in ("ours", "the other checkout"):
            assert figures["single"][f"{who}, {what}"]["requests_per_second_c16"] > 0
            assert figures["batch_256"][f"{who}, {what}"]["pairs_per_second"] > 0
        for kind, measures in (("one pair", ("p50", "CPU")), ("batch", ("time", "CPU"))):
            for measure in measures:
                ratio = figures["against"][f"{kind}, {what}: {measure}"]
                assert 0 < ratio["smallest"] <= ratio["median"] <= ratio["largest"]
    assert figures["single"]["ours, spans on, static encoder d=128, long"]["requests_per_second_c16"] > 0
    assert "ours / the other checkout" in ended.stdout

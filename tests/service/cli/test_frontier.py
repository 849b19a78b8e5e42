"""`reward-router frontier`: the table, the JSON and the picture of one run, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

pytest.importorskip("torch")

from router_core.dataset import write_pairs
from service.cli import app
from tests.support.offline import two_domains


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("frontier") / "pairs.jsonl"
    write_pairs(path, two_domains(120))
    return path


def test_table_json_and_picture_say_the_same(data: Path, tmp_path: Path) -> None:
    out, picture = tmp_path / "deep" / "frontier.json", tmp_path / "frontier.png"
    result = CliRunner().invoke(
        app, ["frontier", str(data), "--budgets", "1.5", "--folds", "2", "--price", "talker=2",
              "--json", str(out), "--plot", str(picture)],
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    document = json.loads(out.read_text())
    policies = [point["policy"] for point in document["points"]]
    assert {"single:best", "offline", "cascade:1.5", "random-cascade:1.5", "majority", "stacked"} <= set(policies)
    assert document["prices"] == {"coder": 1.0, "talker": 2.0}
    assert document["undominated"][-1] in policies
    assert all(policy in result.output for policy in policies)
    assert picture.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("option", "value", "told"),
    [("--budgets", "0.5", "above 1"), ("--budgets", "many", "above 1"), ("--price", "nobody=2", "NAME=PRICE"),
     ("--price", "coder=-1", "positive price")],
)  # fmt: skip
def test_budgets_and_prices_that_cannot_be_are_refused(data: Path, option: str, value: str, told: str) -> None:
    result = CliRunner().invoke(app, ["frontier", str(data), option, value])
    assert result.exit_code == 2
    assert told in " ".join(result.output.replace("│", " ").split())

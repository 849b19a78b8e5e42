"""`reward-router models`: the table of a running gateway's pool."""

from __future__ import annotations

import json
from typing import Any

import pytest
from typer.testing import CliRunner

pytest.importorskip("tokenizers")

from service.cli import app
from service.cli.first_request import askable_lines
from service.scorers.rm.client import ArmConfig, VllmArm
from tests.service.scorers.rm.test_tokens import byte_rendering
from tests.service.scorers.transport.test_load import steady
from tests.service.scorers.worker_servers import ScriptedWorker, Serve
from tests.support.arms import ScriptedArm
from tests.support.live import live_gateway


def test_the_table_says_how_each_model_is_asked_and_how_much_it_reads(serve: Serve, valkey_url: str) -> None:
    worker = ScriptedWorker("by-ids")
    worker.answer = steady
    served = VllmArm(ArmConfig(name="by-ids", urls=(serve(worker),), rendering=byte_rendering(), max_model_len=300))
    arms: list[Any] = [ScriptedArm("scripted"), served]
    with live_gateway(valkey_url, arms=arms) as gateway:
        words = ["models", "--url", gateway.url]
        table = CliRunner().invoke(app, words, env={"COLUMNS": "200"})
        assert table.exit_code == 0, table.output
        rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in table.output.splitlines() if "│" in line]
        assert [row[:2] + row[3:6] for row in rows] == [
            ["scripted", "yes", "–", "–", "0"],
            ["by-ids", "yes", "tokens", "300 tokens", "0"],
        ]
        printed = json.loads(CliRunner().invoke(app, [*words, "--json"]).output)
        assert [model["rendering"] for model in printed["models"]] == [None, "tokens"]
        listed = json.loads(CliRunner().invoke(app, ["runs", "--url", gateway.url, "--json"]).output)
        mine = next(one for one in listed if one["run"] == gateway.run)
        assert (mine["events"], mine["pool"]) == (0, ["scripted", "by-ids"])


def test_scorers_that_cannot_be_asked_are_named_with_the_reason() -> None:
    away = {"name": "away", "available": False, "replicas": [{"url": "http://a", "problem": None}]}
    silly = {"name": "silly", "available": False, "replicas": [{"url": "http://b", "problem": "gives sigmoids"}]}
    fine = {"name": "fine", "available": True, "replicas": []}
    assert askable_lines([away, fine, silly]) == [
        "1 of 3 scorers can be asked",
        "away: http://a does not answer",
        "silly: http://b gives sigmoids",
    ]

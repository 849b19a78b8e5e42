"""`reward-router models`: the table of a running gateway's pool."""

from __future__ import annotations

import json
from typing import Any

import pytest
from typer.testing import CliRunner

pytest.importorskip("tokenizers")

from service.cli import app
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

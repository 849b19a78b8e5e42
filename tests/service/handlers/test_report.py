"""`/report`, its command and its metrics, against the real application."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from typer.testing import CliRunner

from service.cli import app
from service.cli.report import show
from service.usecases.report import Estimate, KindRecord, RefereeRecord, RunReport, ScorerRecord
from tests.support.gateway import open_gateway, pair
from tests.support.live import live_gateway
from tests.support.processes import fetch
from tests.support.rules import call

if TYPE_CHECKING:
    from tests.conftest import ValkeyProcess

KINDS = ("python, function, list", "capital, country, population", "rest")
EVERY = {"referee": "rm-c", "rate": 1.0, "schedule": "even"}


async def test_a_report_counts_who_agrees_with_the_referee_and_gold(valkey_server: ValkeyProcess) -> None:
    async with open_gateway(valkey_server.url, audit=EVERY) as gateway:
        gateway.arm("rm-b").score_of = lambda _, response: -float(len(response))
        items = [{**pair(index), "policy": "single:rm-a"} for index in range(20)]
        results = (await gateway.client.ok("/reward/batch", {"items": items}))["results"]
        await gateway.learned(20)
        ids = [result["decision_id"] for result in results]
        await gateway.client.ok("/feedback", {"decision_id": ids[0], "preferred": 1})
        await gateway.client.ok("/audits/judge", {"decision_id": ids[1], "preferred": 0})
        await gateway.learned(22)  # The report says what was learned, and no more.
        report = (await gateway.client.get("/report")).json
        text = (await gateway.client.get("/metrics")).body.decode()
    accuracy = {one["model"]: one["accuracy"]["value"] for one in report["scorers"]}
    assert accuracy == {"rm-a": 1.0, "rm-b": 0.0, "rm-c": 1.0}
    assert report["router"]["accuracy"]["value"] == 1.0
    assert report["scorers"][1]["against_gold"]["value"] == 0.5
    (referee,) = report["referees"]
    assert (referee["referee"], referee["audits"], referee["judged"]) == ("rm-c", 20, 2)
    assert referee["accuracy"]["value"] == 0.5
    assert report["scorers"][1]["fall"] > 0.5
    label = f'{{model="rm-b",run="{gateway.run}"}}'
    assert f"reward_router_audited_accuracy{label} 0.0" in text
    assert f'reward_router_referee_accuracy{{referee="rm-c",run="{gateway.run}"}} 0.5' in text
    assert f"reward_router_accuracy_fall{label}" in text
    assert f"reward_router_length_excess{label}" in text


async def test_a_gateway_that_starts_later_reports_the_same(valkey_server: ValkeyProcess) -> None:
    async with open_gateway(valkey_server.url, audit=EVERY) as gateway:
        await gateway.client.ok("/reward/batch", {"items": [pair(index) for index in range(5)]})
        await gateway.learned(5)
        first = (await gateway.client.get("/report")).json
    async with open_gateway(valkey_server.url, run=gateway.run) as other:
        again = (await other.client.get("/report")).json
        missing = await other.client.get("/report?run=nobody")
    assert again == first
    assert missing.status == 404


def test_the_command_shows_tables_json_and_a_picture(valkey_server: ValkeyProcess, tmp_path: Path) -> None:
    with live_gateway(valkey_server.url, audit=EVERY) as gateway:
        items: list[dict[str, Any]] = [pair(index) for index in range(10)]
        assert call(f"{gateway.url}/reward/batch", {"items": items})[0] == 200
        gateway.until(10)
        words = ["report", gateway.run, "--url", gateway.url]
        done = CliRunner().invoke(app, words, env={"COLUMNS": "160"})
        picture = CliRunner().invoke(app, [*words, "--json", "--plot", str(tmp_path / "report.png")])
        _, document = fetch(f"{gateway.url}/report")
    assert done.exit_code == 0, done.output
    assert "10 audits" in done.output
    assert "rm-a" in done.output
    assert "Referees against gold" in done.output
    assert json.loads(picture.output) == document
    assert (tmp_path / "report.png").read_bytes().startswith(b"\x89PNG")


async def test_a_run_without_audits_has_an_empty_report(valkey_server: ValkeyProcess) -> None:
    async with open_gateway(valkey_server.url) as gateway:
        report = (await gateway.client.get("/report")).json
    assert (report["audits"], report["referees"], report["scorers"][0]["accuracy"]) == (0, [], None)


def test_the_report_finds_the_only_run_and_names_several(valkey_url: str) -> None:
    with live_gateway(valkey_url) as gateway:
        call(f"{gateway.url}/reward", pair())
        words = ["report", "--url", gateway.url]
        assert f"run {gateway.run}: 0 audits" in CliRunner().invoke(app, words).stdout
        call(f"{gateway.url}/reward", {**pair(), "run": f"{gateway.run}-2"})
        assert f"{gateway.run}, {gateway.run}-2" in str(CliRunner().invoke(app, words).exception)


def test_the_report_keeps_names_whole_on_80_columns() -> None:
    names = ["skywork-reward-v2-llama-3.2-3b", "grm-gemma2-2b-rewardmodel-ft"]
    estimate = Estimate(value=0.812, low=0.61, high=0.98, audits=9)
    records = [
        ScorerRecord.model_construct(
            model=name, accuracy=estimate, against_gold=estimate, over_time=[0.8, None], fall=0.0, follows={},
            kinds=dict.fromkeys(KINDS, estimate), liked=None,
        )
        for name in (*names, "router")
    ]  # fmt: skip
    kinds = [KindRecord(kind=kind, audits=3, share=0.3) for kind in KINDS]
    referee = RefereeRecord(
        referee="a-judge-with-a-long-name-of-its-own", audits=9, ties=0, trust=0.9, judged=3, accuracy=estimate,
        scorers=0.8, teaches=True,
    )  # fmt: skip
    found = RunReport.model_construct(
        run="r", audits=9, waiting=0, scorers=records[:2], router=records[2], kinds=kinds, referees=[referee]
    )
    out = io.StringIO()
    show(found, Console(file=out, width=80))
    lines = out.getvalue().splitlines()
    for name in names:
        assert sum(name in line for line in lines) == 1 + len(KINDS)
    assert max(len(line) for line in lines if line.startswith(("│", "┃"))) <= 80

"""The command `export`: from the store of a running gateway or of a stopped one, to a file."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from click.testing import Result
from typer.testing import CliRunner

from service.cli import app
from service.errors import ConfigurationError
from service.lab.eventlog.export import read_events
from service.stores.embedded import EmbeddedStore
from tests.support.gateway import fresh_run, open_gateway, pair

if TYPE_CHECKING:
    from tests.conftest import ValkeyProcess

pytest.importorskip("pyarrow", reason="needs reward-router[export]")


def export(*options: object) -> Result:
    return CliRunner().invoke(app, ["export", *map(str, options)])


async def fill(url: str, run: str, count: int) -> None:
    """So many events in the run."""
    async with open_gateway(url, run=run) as gateway:
        for index in range(count):
            reply = await gateway.client.ok("/reward", pair(index))
            await gateway.client.ok("/feedback", {"decision_id": reply["decision_id"], "preferred": 1})


def test_a_run_of_a_server_is_exported_and_said(valkey_server: ValkeyProcess, tmp_path: Path) -> None:
    run, out = fresh_run(), tmp_path / "deep" / "log.parquet"
    asyncio.run(fill(valkey_server.url, run, 3))
    done = export(run, "--store", valkey_server.url, "--out", out)
    assert done.exit_code == 0, done.output
    rows = list(read_events(out))
    assert f"3 events of run {run}" in done.output
    assert rows[-1].event_id in done.output
    asyncio.run(fill(valkey_server.url, run, 2))
    again = export(run, "--store", valkey_server.url, "--out", out, "--resume", "--json")
    report = json.loads(again.stdout)
    assert (report["events"], report["added"], report["exact_rewards"]) == (5, 2, True)
    assert list(read_events(out))[:3] == rows


@pytest.mark.usefixtures("valkey_binary")
def test_an_embedded_store_is_exported_while_its_gateway_runs_and_after(tmp_path: Path) -> None:
    run, data = fresh_run(), tmp_path
    with EmbeddedStore(data / "store") as store:
        asyncio.run(fill(store.url, run, 2))
        during = export(run, "--data-dir", data, "--out", tmp_path / "during.jsonl")
        assert during.exit_code == 0, during.output
        assert store.pid is not None
    after = export(run, "--data-dir", data, "--out", tmp_path / "after.jsonl")
    assert after.exit_code == 0, after.output
    assert list(read_events(tmp_path / "after.jsonl")) == list(read_events(tmp_path / "during.jsonl"))
    assert len(list(read_events(tmp_path / "after.jsonl"))) == 2


def test_a_directory_without_a_store_is_left_alone(tmp_path: Path) -> None:
    done = export("any", "--data-dir", tmp_path / "nothing", "--out", tmp_path / "log.jsonl")
    assert isinstance(done.exception, ConfigurationError)
    assert "there is no embedded store in" in str(done.exception)
    assert list(tmp_path.iterdir()) == []


def test_since_and_resume_exclude_each_other(tmp_path: Path) -> None:
    done = export("any", "--out", tmp_path / "log.jsonl", "--since", "1-0", "--resume")
    assert isinstance(done.exception, ConfigurationError)
    assert "exclude each other" in str(done.exception)


@pytest.mark.usefixtures("valkey_binary")
def test_runs_are_listed_and_an_unknown_one_is_answered_with_them(tmp_path: Path) -> None:
    run = fresh_run()
    with EmbeddedStore(tmp_path / "store") as store:
        asyncio.run(fill(store.url, run, 2))
        (listed,) = json.loads(CliRunner().invoke(app, ["runs", "--data-dir", str(tmp_path), "--json"]).stdout)
        assert (listed["run"], listed["events"], listed["signal"]) == (run, 2, "preference")
        assert run in CliRunner().invoke(app, ["runs", "--data-dir", str(tmp_path)]).output
        words = ["models", "--data-dir", str(tmp_path), "--run", run, "--json"]
        learned = json.loads(CliRunner().invoke(app, words).stdout)
        assert learned["events"] == 2
        assert sum(one["feedbacks"] for one in learned["models"]) >= 2
        unknown = export("other", "--data-dir", tmp_path, "--out", tmp_path / "out.jsonl")
    assert f"known runs: {run}" in str(unknown.exception)

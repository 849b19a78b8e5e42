"""The command `runs`: list, archive, export, import and delete, each with its place in a log."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from click.testing import Result
from typer.testing import CliRunner

from service.cli import app, runs
from service.errors import ConfigurationError, ConflictError
from tests.support.gateway import fresh_run, open_gateway, pair, until

if TYPE_CHECKING:
    from tests.conftest import ValkeyProcess

FOLD = {"block_size": 4, "refresh_events": 8}


def command(*words: object) -> Result:
    return CliRunner().invoke(app, ["runs", *map(str, words)])


def acts_of(run: str, url: str) -> list[str]:
    return [row["act"] for row in json.loads(command("log", run, "--store", url, "--json").stdout)]


async def fill(url: str, run: str, count: int) -> str:
    """So many events in the run, and a change of its pool; the digest then."""
    async with open_gateway(url, run=run, **FOLD) as gateway:
        for index in range(count):
            reply = await gateway.client.ok("/reward", pair(index))
            await gateway.client.ok("/feedback", {"decision_id": reply["decision_id"], "preferred": 1})
        await gateway.client.ok("/admin/pool", {"pool": {"models": [{"name": "rm-a"}, {"name": "rm-b"}]}})
        digest: str = (await gateway.learned(count + 1))["digest"]
        return digest


def test_a_run_moves_to_another_name_with_its_posterior(valkey_server: ValkeyProcess, tmp_path: Path) -> None:
    run, url, file = fresh_run(), valkey_server.url, tmp_path / "deep" / "run.rrun"
    digest = asyncio.run(fill(url, run, 11))
    done = command("export", run, "--out", file, "--store", url)
    assert done.exit_code == 0, done.output
    assert acts_of(run, url) == ["pool", "export"]
    there = run + "-copy"
    done = command("import", file, "--as", there, "--store", url)
    assert done.exit_code == 0, done.output
    with pytest.raises(ConflictError, match="another name"):
        CliRunner().invoke(app, ["runs", "import", str(file), "--store", url], catch_exceptions=False)

    async def digest_there() -> tuple[str, list[str]]:
        async with open_gateway(url, run=there, **FOLD) as gateway:
            found = await gateway.learned(12)
            shown = (await gateway.client.get("/pool")).json
            return found["digest"], [arm["name"] for arm in shown["arms"] if not arm["retired"]]

    # The import is one event more, and teaches nothing.
    found, asked = asyncio.run(digest_there())
    assert asked == ["rm-a", "rm-b"]
    assert acts_of(there, url) == ["pool", "import"]
    again = tmp_path / "again.rrun"
    assert command("export", there, "--out", again, "--store", url).exit_code == 0
    assert digest != found  # The version is part of the digest.
    listed = {row["run"]: row for row in json.loads(command("--store", url, "--json").stdout)}
    assert (listed[there]["events"], listed[there]["pool"]) == (14, ["rm-a", "rm-b"])


def test_a_file_that_was_cut_off_makes_no_run(valkey_server: ValkeyProcess, tmp_path: Path) -> None:
    run, url, file = fresh_run(), valkey_server.url, tmp_path / "run.rrun"
    asyncio.run(fill(url, run, 3))
    assert command("export", run, "--out", file, "--store", url).exit_code == 0
    file.write_bytes(file.read_bytes()[:-40])
    with pytest.raises(ConfigurationError):
        CliRunner().invoke(
            app, ["runs", "import", str(file), "--as", run + "-x", "--store", url], catch_exceptions=False
        )
    assert run + "-x" not in [row["run"] for row in json.loads(command("list", "--store", url, "--json").stdout)]


async def test_an_archived_run_is_closed_and_comes_back(valkey_server: ValkeyProcess) -> None:
    url = valkey_server.url
    async with open_gateway(url) as gateway:
        run = gateway.run + "-other"
        reply = await gateway.client.ok("/reward", {**pair(), "run": run})
        done = await asyncio.to_thread(command, "archive", run, "--store", url)
        assert done.exit_code == 0, done.output

        async def closed() -> bool:
            return (await gateway.client.post("/reward", {**pair(), "run": run})).status == 410

        await until(closed, "archived")
        body = {"decision_id": reply["decision_id"], "preferred": 1, "run": run}
        refused = await gateway.client.post("/feedback", body)
        assert (refused.status, refused.error["code"]) == (410, "run_archived")
        await gateway.client.ok("/reward", pair())
        assert (await asyncio.to_thread(command, "archive", run, "--undo", "--store", url)).exit_code == 0
        await gateway.client.ok("/feedback", body)
        # Two acts and the feedback.
        assert (await gateway.learned(3, run))["version"] == 3


async def test_a_gateway_of_an_archived_run_is_not_ready(valkey_server: ValkeyProcess) -> None:
    async with open_gateway(valkey_server.url) as gateway:
        done = await asyncio.to_thread(command, "archive", gateway.run, "--store", valkey_server.url)
        assert done.exit_code == 0, done.output

        async def told() -> bool:
            answer = await gateway.client.get("/readyz")
            return answer.status == 503 and "is archived" in answer.error["message"]

        await until(told, "not ready")


async def test_only_an_archived_run_is_deleted_and_that_is_kept(
    valkey_server: ValkeyProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = valkey_server.url
    monkeypatch.setattr(runs, "CLOSED_SECONDS", 0.0)
    async with open_gateway(url) as gateway:
        run = gateway.run + "-other"
        await gateway.client.ok("/reward", {**pair(), "run": run})
        refused = await asyncio.to_thread(command, "delete", run, "--yes", "--store", url)
        assert isinstance(refused.exception, ConfigurationError)
        assert (await asyncio.to_thread(command, "archive", run, "--store", url)).exit_code == 0

        async def closed() -> bool:
            return (await gateway.client.post("/reward", {**pair(), "run": run})).status == 410

        await until(closed, "archived")
        done = await asyncio.to_thread(command, "delete", run, "--yes", "--store", url)
        assert done.exit_code == 0, done.output
        assert await asyncio.to_thread(acts_of, run, url) == ["delete"]
        # Its name is free.
        await gateway.client.ok("/reward", {**pair(), "run": run})
        assert (await gateway.learned(0, run))["version"] == 0

"""The command `acts`: what was done with runs, and what gateways were asked to change, in one list."""

from __future__ import annotations

import asyncio
import json
import uuid
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from typer.testing import CliRunner

from service.cli import app
from service.cli.acts import requests_in
from service.errors import ConfigurationError
from service.stores.acts import ARCHIVE, DELETE, POOL, note
from service.stores.redis import RedisStore
from service.usecases.status import stored_runs
from tests.support.gateway import open_gateway, pair

if TYPE_CHECKING:
    from tests.conftest import ValkeyProcess


async def test_requests_and_acts_on_runs_stand_in_one_list(valkey_server: ValkeyProcess, tmp_path: Path) -> None:
    url, path = valkey_server.url, tmp_path / "acts.jsonl"
    async with open_gateway(url, acts_file=path) as gateway:
        await gateway.client.ok("/reward", pair())
        pool = {"models": [{"name": "rm-a", "price": 2.0}, {"name": "rm-b"}, {"name": "rm-c"}]}
        await gateway.client.ok("/admin/pool", {"pool": pool})
        assert (await gateway.client.post("/admin/pool", {"pool": {}})).status == 422
    archived = await asyncio.to_thread(CliRunner().invoke, app, ["runs", "archive", gateway.run, "--store", url])
    assert archived.exit_code == 0, archived.output
    words = ["acts", "--store", url, "--file", str(path)]
    whole = await asyncio.to_thread(CliRunner().invoke, app, [*words, "--json"])
    ours = [row for row in json.loads(whole.stdout) if row["run"] in ("", gateway.run)]
    assert [row["time_ms"] for row in ours] == sorted(row["time_ms"] for row in ours)
    requests, on_runs = ([row for row in ours if ("status" in row) is asked] for asked in (True, False))
    assert [(row["act"], row["status"]) for row in requests] == [
        ("POST /admin/pool", "200"),
        ("POST /admin/pool", "422"),
    ]
    assert [row["act"] for row in on_runs] == ["pool", "archive"]
    assert ours[0] == requests[0]
    assert requests[0]["by"] == on_runs[0]["by"]
    alone = await asyncio.to_thread(CliRunner().invoke, app, [*words, "--run", gateway.run, "--json"])
    assert [row["act"] for row in json.loads(alone.stdout)] == ["pool", "archive"]
    shown = await asyncio.to_thread(CliRunner().invoke, app, words)
    assert "archive" in shown.stdout


async def test_an_act_that_cannot_be_read_hides_no_other(valkey_server: ValkeyProcess) -> None:
    store = RedisStore(valkey_server.url, window_seconds=60)
    run = f"foreign-{uuid.uuid4()}"
    identity = await store.open_run(run, b'{"pool": ["rm-a"]}')
    await store.append_act(run, "change", b"\xffgarbage", POOL, identity=identity)
    await store.append_act(run, "run", note("ops"), ARCHIVE, identity=identity)
    await store.note(run, b"\xffgarbage", DELETE)
    words = ["acts", "--store", valkey_server.url, "--run", run, "--json"]
    done = await asyncio.to_thread(CliRunner().invoke, app, words)
    listed = await stored_runs(store, [run])
    await store.close()
    rows = json.loads(done.stdout)
    assert {(row["act"], row["by"], "cannot be read" in row["about"]) for row in rows} == {
        ("pool", "", True),
        ("archive", "ops", False),
        ("delete", "", True),
    }
    assert [one.run for one in listed] == [run]


def test_a_request_that_was_not_answered_says_so(tmp_path: Path) -> None:
    path = tmp_path / "acts.jsonl"
    request = {"key": "ops", "method": "POST", "path": "/admin/pool", "query": ""}
    time = "2026-01-02T03:04:05.678+00:00"
    lines = [
        {"time": time, "act": "asked", **request},
        {"time": time, "act": "asked", **request, "key": "other"},
        {"time": time, "act": "answered", **request, "key": "other", "status": 200},
        {"time": time, "act": "keys file taken", "changes": ["added ops (1234)"]},
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    rows = requests_in(path)
    assert [(row["by"], row["act"], row["about"], row.get("status")) for row in rows] == [
        ("ops", "POST /admin/pool", "", "not answered"),
        ("other", "POST /admin/pool", "", "200"),
        ("", "keys file taken", "added ops (1234)", None),
    ]


def test_another_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "keys.json"
    path.write_text('{"keys": []}\n')
    with pytest.raises(ConfigurationError, match="line 1"):
        requests_in(path)


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    (tmp_path / "binary").write_bytes(b"\xff\x00")
    for path in (tmp_path / "none", tmp_path / "binary"):
        with pytest.raises(ConfigurationError, match=f"{path} cannot be read"):
            requests_in(path)

"""Scopes, runs and limits of keys on every route of the real application, and the list of what is open."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import json
import re
from collections.abc import AsyncIterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from fastapi import FastAPI
from fastapi.routing import APIRoute

from service.app import create_app
from service.console import console_files
from service.errors import ConfigurationError
from service.handlers.headers import SecureAnswers
from service.handlers.hot import HotRoutes
from service.handlers.keys import OPEN_PATHS, STREAMS, KeyGuard, check_routes, require, routes_of, scope_of
from service.keys.access import Scope
from service.keys.file import KeyFile, KeyLimits, entry_of, new_key, write_key_file
from service.pool import PoolFile
from service.settings import Settings
from service.stores.memory import MemoryStore
from tests.docs.tables import ROOT
from tests.support.arms import ScriptedArm
from tests.support.events import watch
from tests.support.gateway import Gateway, fresh_run, open_gateway, pair, small_encoder, until
from tests.support.live import live_gateway
from tests.support.rules import call

if TYPE_CHECKING:
    from tests.conftest import ValkeyProcess

ALL = "all"
MINE = "mine-1"


class Keys:
    """A keys file, and the keys of it by name."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.by_name: dict[str, str] = {}
        self.file = KeyFile()

    def add(self, name: str, scopes: list[Scope], **more: Any) -> None:
        """Write one more key."""
        self.by_name[name] = new_key()
        self.file = KeyFile([*self.file.keys, entry_of(self.by_name[name], name, scopes, **more)])
        write_key_file(self.path, self.file)

    def drop(self, name: str) -> None:
        """Write the file without a key."""
        self.file = KeyFile([entry for entry in self.file.keys if entry.name != name])
        write_key_file(self.path, self.file)

    def headers(self, name: str) -> dict[str, str]:
        """Return what a holder sends."""
        return {"authorization": f"Bearer {self.by_name[name]}"}


@pytest.fixture
def keys(tmp_path: Path) -> Keys:
    """One key per scope, one with all, and one that may name the runs `mine-*`."""
    made = Keys(tmp_path / "keys.json")
    for scope in Scope:
        made.add(scope.value, [scope])
    made.add(ALL, list(Scope))
    made.add("mine", list(Scope), runs=["mine-*"])
    return made


@pytest.fixture
async def gateway(valkey_server: ValkeyProcess, keys: Keys) -> AsyncIterator[Gateway]:
    """With that keys file."""
    async with open_gateway(valkey_server.url, keys_file=keys.path) as opened:
        yield opened


def application() -> tuple[HotRoutes, FastAPI]:
    """The gateway's hot routes, and the application behind them, not started."""
    pool = PoolFile.model_validate({"models": [{"name": "rm-a"}]})
    settings = Settings(run=fresh_run(), store_url="redis://127.0.0.1:1/0")
    hot = create_app(
        settings, pool, encoder=small_encoder(), arms=[ScriptedArm("rm-a")], store=MemoryStore(window_seconds=9.0)
    )
    assert isinstance(hot, HotRoutes)
    secure = hot._rest
    assert isinstance(secure, SecureAnswers)
    guard = secure._app
    assert isinstance(guard, KeyGuard)
    app = guard._app
    assert isinstance(app, FastAPI)
    return hot, app


def required() -> dict[str, str]:
    """What every path of the application requires: a scope, or `open`."""
    hot, app = application()
    found = {path: scope.value for path, scope in hot.scopes.items()}
    for route in routes_of(app.router):
        assert isinstance(route, APIRoute), route
        scope = scope_of(route)
        found[route.path] = "open" if scope is None else scope.value
    return found


def test_the_security_page_lists_every_route_with_its_scope() -> None:
    page = (ROOT / "docs/security.md").read_text("utf-8").partition("## Routes and scopes")[2].partition("\n## ")[0]
    said: dict[str, str] = {}
    for row in re.findall(r"^\| `/.*$", page, re.MULTILINE):
        _, paths, scope, _ = row.split("|")
        for path in re.findall(r"`([^`]+)`", paths):
            said[path] = scope.strip().strip("`").partition("`")[0].partition(":")[0]
    found = required()
    assert said == found
    assert {path for path, scope in found.items() if scope == "open"} == set(OPEN_PATHS)
    for path, why in OPEN_PATHS.items():
        assert f"| `{path}` | open: {why} |" in page


def test_a_route_that_says_no_scope_does_not_start() -> None:
    app = FastAPI(openapi_url=None, docs_url=None, redoc_url=None)

    @app.get("/said", dependencies=[require(Scope.READ)])
    async def said() -> None: ...

    check_routes(app)

    @app.get("/forgotten")
    async def forgotten() -> None: ...

    with pytest.raises(ConfigurationError, match="/forgotten"):
        check_routes(app)


async def test_every_route_takes_keys_of_its_scope_only(gateway: Gateway, keys: Keys) -> None:
    hot = application()[0].scopes
    for path, needed in required().items():
        method = "POST" if path in hot or path.startswith("/admin") else "GET"
        if needed == "open":
            named = path.replace("{digest}", console_files().digest).replace("{name:path}", "app.js")
            assert (await gateway.client.request(method, named)).status == 200
            continue
        without = await gateway.client.request(method, path, b"{}")
        assert (without.status, without.error["code"]) == (401, "unauthorized"), path
        for scope in Scope:
            response = await gateway.client.request(
                method, path, b"{}", headers=keys.headers(scope.value), disconnect=path in STREAMS
            )
            if scope.value == needed:
                assert response.status not in (401, 403), (path, scope, response.body)
            else:
                assert (response.status, response.error["code"]) == (403, "forbidden"), (path, scope)
                assert needed in response.error["message"]


async def test_a_run_of_others_is_refused_on_every_route(gateway: Gateway, keys: Keys) -> None:
    client, mine = gateway.client, keys.headers("mine")
    other = gateway.run
    bodies = {
        "/reward": {**pair(), "run": other},
        "/reward/batch": {"items": [pair()], "run": other},
        "/beliefs": {**pair(), "run": other},
        "/feedback": {"decision_id": "d", "preferred": 0, "run": other},
        "/feedback/batch": {"items": [{"decision_id": "d", "preferred": 0}], "run": other},
        "/audits/judge": {"decision_id": "d", "preferred": 0, "run": other},
        "/admin/pool": {"dry_run": True, "run": other},
        "/get_reward": {"query": ["q"], "prompts": ["p"], "responses": ["r"]},
    }
    for path, body in bodies.items():
        for document in (body, {name: value for name, value in body.items() if name != "run"}):
            response = await client.post(path, document, **mine)
            assert (response.status, response.error["code"]) == (403, "forbidden"), (path, response.body)
            assert "mine-*" in response.error["message"]
    for path in ("/posterior", "/report", "/audits", "/pool", "/events"):
        for query in ("", f"?run={other}"):
            assert (await client.get(path + query, **mine)).status == 403


async def test_a_batch_refuses_the_items_of_other_runs_alone(gateway: Gateway, keys: Keys) -> None:
    mine = keys.headers("mine")
    items = [{**pair(), "run": MINE}, {**pair(), "run": gateway.run}]
    results = (await gateway.client.post("/reward/batch", {"items": items}, **mine)).json["results"]
    assert results[0]["run"] == MINE
    assert results[1]["error"]["code"] == "forbidden"
    told = [{"decision_id": results[0]["decision_id"], "preferred": 0, "run": run} for run in (MINE, gateway.run)]
    results = (await gateway.client.post("/feedback/batch", {"items": told}, **mine)).json["results"]
    assert results[0]["duplicate"] is False
    assert results[1]["error"]["code"] == "forbidden"


async def test_names_of_other_runs_are_in_no_message(gateway: Gateway, keys: Keys) -> None:
    await gateway.client.post("/reward", {**pair(), "run": MINE}, **keys.headers("mine"))
    unknown = {"decision_id": "d", "preferred": 0, "run": "mine-unknown"}
    response = await gateway.client.post("/feedback", unknown, **keys.headers("mine"))
    assert response.status == 404
    assert MINE in response.body.decode()
    assert gateway.run not in response.body.decode()
    change = {"dry_run": True, "run": "mine-unknown"}
    for response in (
        await gateway.client.get("/pool?run=mine-unknown", **keys.headers("mine")),
        await gateway.client.post("/admin/pool", change, **keys.headers("mine")),
    ):
        assert response.status == 404
        assert gateway.run not in response.body.decode()


async def test_a_revoked_key_is_refused_without_a_restart(gateway: Gateway, keys: Keys) -> None:
    headers = keys.headers("reward")
    assert (await gateway.client.post("/reward", pair(), **headers)).status == 200
    keys.drop("reward")
    keys.add("next", [Scope.REWARD])

    async def refused() -> bool:
        return (await gateway.client.post("/reward", pair(), **headers)).status == 401

    await until(refused, "refused")
    assert (await gateway.client.post("/reward", pair(), **keys.headers("next"))).status == 200


def test_a_stream_tells_no_other_runs_and_ends_with_its_key(valkey_server: ValkeyProcess, keys: Keys) -> None:
    with live_gateway(valkey_server.url, keys_file=keys.path) as gateway:
        headers = keys.headers("mine")
        assert call(f"{gateway.url}/reward", {**pair(), "run": MINE}, **headers)[0] == 200
        with watch(f"{gateway.url}/events?run={MINE}", **headers) as stream:
            assert stream.next("runs") == [MINE]
            assert gateway.run not in json.dumps(stream.next("state"))
            keys.drop("mine")
            stream.read_to_the_end()


async def test_limits_of_a_key_are_its_own(gateway: Gateway, keys: Keys) -> None:
    keys.add("few", [Scope.REWARD], limits=KeyLimits(instances_per_minute=3))
    keys.add("narrow", list(Scope), limits=KeyLimits(max_in_flight=1))

    async def known() -> bool:
        return (await gateway.client.get("/models", **keys.headers("narrow"))).status == 200

    await until(known, "the file is taken")
    batch = {"items": [pair(index) for index in range(5)]}
    assert (await gateway.client.post("/reward/batch", batch, **keys.headers("few"))).status == 200
    response = await gateway.client.post("/reward", pair(), **keys.headers("few"))
    assert (response.status, response.error["code"]) == (429, "key_limit")
    # Two instances more than its three: they come back at one in 20 seconds.
    assert 40 < int(response.headers["retry-after"]) <= 60
    asked = sum(len(arm.calls) for arm in gateway.arms)
    for arm in gateway.arms:
        arm.gate = asyncio.Event()
    slow = asyncio.create_task(gateway.client.post("/reward", pair(), **keys.headers("narrow")))
    await until(lambda: sum(len(arm.calls) for arm in gateway.arms) > asked, "at the workers")
    for path in ("/reward", "/models"):
        method = "POST" if path == "/reward" else "GET"
        held = await gateway.client.request(method, path, b"{}", headers=keys.headers("narrow"))
        assert (held.status, held.error["code"]) == (429, "key_limit")
    other = asyncio.create_task(gateway.client.post("/reward", pair(1), **keys.headers(ALL)))
    for arm in gateway.arms:
        arm.gate.set()
    assert (await slow).status == (await other).status == 200
    assert (await gateway.client.get("/models", **keys.headers("narrow"))).status == 200


async def test_every_answer_has_the_security_headers(gateway: Gateway, keys: Keys) -> None:
    for path in (*required(), "/nothing"):
        for headers in ({}, keys.headers(ALL)):
            for method in ("GET", "POST"):
                if path in STREAMS and headers:
                    continue  # Without an end; what comes to it without a key has one.
                said = (await gateway.client.request(method, path, b"{}", headers=headers)).headers
                where = (method, path, bool(headers))
                assert said["x-content-type-options"] == "nosniff", where
                kept = "no-cache" if (method, path) == ("GET", "/") else "no-store"
                assert said["cache-control"] == kept, where
                assert said["referrer-policy"] == "no-referrer", where
                assert said["cross-origin-resource-policy"] == "same-origin", where
                assert "default-src 'none'" in said["content-security-policy"], where
                assert "frame-ancestors 'none'" in said["content-security-policy"], where
                assert "server" not in said


async def test_the_docs_page_allows_its_own_style_alone(gateway: Gateway, keys: Keys) -> None:
    response = await gateway.client.get("/docs", **keys.headers(ALL))
    (style,) = re.findall("<style>(.*?)</style>", response.body.decode(), re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    assert f"style-src 'sha256-{digest}'" in response.headers["content-security-policy"]
    assert b"<script" not in response.body
    assert b" style=" not in response.body


async def test_acts_are_written_before_and_after_they_are_done(
    valkey_server: ValkeyProcess, keys: Keys, tmp_path: Path
) -> None:
    path = tmp_path / "acts.jsonl"
    async with open_gateway(valkey_server.url, keys_file=keys.path, acts_file=path) as gateway:
        await gateway.client.post("/reward", pair(), **keys.headers(ALL))
        await gateway.client.get("/models", **keys.headers(ALL))
        await gateway.client.post("/admin/nothing?run=r", {"text": "a secret"}, **keys.headers("admin"))
        await gateway.client.post("/admin/nothing", {}, authorization="Bearer wrong")
        keys.drop("reward")

        async def taken() -> bool:
            return "keys file taken" in path.read_text("utf-8")

        await until(taken, "the changed file")
    text = path.read_text("utf-8")
    asked, answered, changed = map(json.loads, text.splitlines())
    assert (asked["act"], asked["key"], asked["path"], asked["query"]) == ("asked", "admin", "/admin/nothing", "run=r")
    assert (answered["act"], answered["status"]) == ("answered", 404)
    assert changed["changes"][0].startswith("removed reward (")
    assert "secret" not in text
    assert not any(key in text for key in keys.by_name.values())


async def test_an_act_that_cannot_be_written_is_not_done(
    valkey_server: ValkeyProcess, keys: Keys, tmp_path: Path
) -> None:
    async with open_gateway(valkey_server.url, keys_file=keys.path, acts_file=tmp_path) as gateway:
        response = await gateway.client.post("/admin/nothing", {}, **keys.headers("admin"))
        assert (response.status, response.error["code"]) == (503, "acts_unavailable")
        assert (await gateway.client.get("/models", **keys.headers("read"))).status == 200

"""What the real application refuses before it works: malformed or oversized requests, missing keys, too many."""

from __future__ import annotations

import asyncio
import base64
import json
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING, Any

import pytest
from pydantic import ValidationError as SettingsError

from service.settings import Settings
from service.usecases.runs import IDLE_SECONDS
from tests.support.gateway import Gateway, open_gateway, pair, until

if TYPE_CHECKING:
    from tests.conftest import ValkeyProcess

HOT = ("/reward", "/reward/batch", "/feedback", "/feedback/batch")
OPEN = ("/healthz", "/readyz", "/metrics")


@pytest.fixture
async def gateway(valkey_server: ValkeyProcess) -> AsyncIterator[Gateway]:
    """Small bounds."""
    bounds: dict[str, Any] = {"max_body_bytes": 4096, "max_text_chars": 100, "max_responses": 3, "max_batch": 4}
    async with open_gateway(valkey_server.url, **bounds) as opened:
        yield opened


@pytest.mark.parametrize("path", HOT)
@pytest.mark.parametrize("body", [b"", b"{", b"not json", b"\xff\xfe", b'{"run": "\\ud800"}', b'{"run": NaN}'])
async def test_a_body_that_is_not_json_is_400(gateway: Gateway, path: str, body: bytes) -> None:
    response = await gateway.client.request("POST", path, body)
    assert (response.status, response.error["code"]) == (400, "bad_request")
    assert "JSON" in response.error["message"]


@pytest.mark.parametrize(
    ("path", "document", "names"),
    [
        ("/reward", {}, "prompt"),
        ("/reward", [], "object"),
        ("/reward", {"prompt": "p"}, "responses"),
        ("/reward", {"prompt": 5, "responses": ["a"]}, "$.prompt"),
        ("/reward", {"prompt": "p", "responses": "ab"}, "$.responses"),
        ("/reward", {"prompt": "p", "responses": []}, "$.responses"),
        ("/reward", {"prompt": "p", "responses": ["a", None]}, "$.responses"),
        ("/reward", {**pair(), "modle": "rm-a"}, "modle"),
        ("/reward/batch", {"items": {}}, "$.items"),
        ("/reward/batch", {"itmes": []}, "itmes"),
        ("/feedback", {"decision_id": "d", "prefered": 0}, "prefered"),
        ("/feedback", {"decision_id": 5, "preferred": 0}, "$.decision_id"),
    ],
)
async def test_a_field_that_does_not_fit_is_422_and_named(
    gateway: Gateway, path: str, document: Any, names: str
) -> None:
    response = await gateway.client.post(path, document)
    assert (response.status, response.error["code"]) == (422, "validation")
    assert names in response.error["message"]


@pytest.mark.parametrize(
    ("path", "document", "words", "details"),
    [
        (
            "/reward",
            {"prompt": "x" * 101, "responses": ["a"]},
            ["prompt", "101", "100"],
            {"field": "prompt", "limit": 100},
        ),
        (
            "/reward",
            {"prompt": "p", "responses": ["a", "y" * 150]},
            ["responses[1]", "150", "100"],
            {"field": "responses[1]", "limit": 100},
        ),
        (
            "/reward",
            {"prompt": "p", "responses": ["a"] * 4},
            ["responses", "4", "3"],
            {"field": "responses", "limit": 3},
        ),
        ("/reward/batch", {"items": [pair()] * 5}, ["items", "5", "4"], {"field": "items", "limit": 4}),
        (
            "/feedback/batch",
            {"items": [{"decision_id": "d", "preferred": 0}] * 5},
            ["items", "5", "4"],
            {"field": "items", "limit": 4},
        ),
    ],
)
async def test_what_exceeds_a_bound_is_422_with_field_value_and_remedy(
    gateway: Gateway, path: str, document: Any, words: list[str], details: dict[str, Any]
) -> None:
    response = await gateway.client.post(path, document)
    assert (response.status, response.error["code"]) == (422, "validation")
    assert all(word in response.error["message"] for word in words), response.error["message"]
    assert "send at most" in response.error["message"]
    assert response.error["details"] == details


async def test_what_is_exactly_at_a_bound_passes(gateway: Gateway) -> None:
    await gateway.client.ok("/reward", {"prompt": "x" * 100, "responses": ["y" * 100, "a", "b"]})
    await gateway.client.ok("/reward/batch", {"items": [pair(index) for index in range(4)]})


@pytest.mark.parametrize("path", HOT)
async def test_a_body_beyond_the_limit_is_413_however_it_is_cut(gateway: Gateway, path: str) -> None:
    body = json.dumps({"prompt": "p" * 5000, "responses": ["a"]}).encode()
    for chunks in ([body], [body[:3000], body[3000:]], [bytes([byte]) for byte in body]):
        response = await gateway.client.request("POST", path, chunks)
        assert (response.status, response.error["code"]) == (413, "payload_too_large")
        assert "4096" in response.error["message"]


@pytest.mark.parametrize("path", HOT)
@pytest.mark.parametrize("method", ["GET", "PUT", "DELETE", "OPTIONS"])
async def test_a_hot_route_takes_post_only_and_says_so(gateway: Gateway, path: str, method: str) -> None:
    response = await gateway.client.request(method, path)
    assert (response.status, response.error["code"]) == (405, "method_not_allowed")
    assert response.headers["allow"] == "POST"


async def test_an_operators_route_takes_get_only_and_says_so(gateway: Gateway) -> None:
    for path in ("/healthz", "/readyz", "/metrics", "/models", "/posterior"):
        response = await gateway.client.post(path, {})
        assert (response.status, response.error["code"]) == (405, "method_not_allowed")
        assert response.headers["allow"] == "GET, HEAD"


async def test_an_unknown_path_is_404_in_the_same_words(gateway: Gateway) -> None:
    for path in ("/index.html", "/console", "/rewards", "/reward/", "/reward/batch/x", "/posterior/x"):
        for method in ("GET", "POST"):
            response = await gateway.client.request(method, path)
            assert (response.status, response.error["code"]) == (404, "not_found"), (method, path)


async def test_an_unknown_policy_or_model_is_404_and_names_the_choices(gateway: Gateway) -> None:
    for policy in ("nonsense", "single:nobody", "single:", ""):
        response = await gateway.client.post("/reward", {**pair(), "policy": policy})
        if policy:
            assert (response.status, response.error["code"]) == (404, "not_found")
            assert "rm-a" in response.error["message"]
        else:
            assert response.status == 200


@pytest.mark.parametrize("run", ["with space", "brace{", "x" * 65, "é", "a/b", "line\n"])
async def test_a_malformed_run_is_422_everywhere(gateway: Gateway, run: str) -> None:
    for path, document in (("/reward", pair()), ("/feedback", {"decision_id": "d", "preferred": 0})):
        response = await gateway.client.post(path, {**document, "run": run})
        assert (response.status, response.error["code"]) == (422, "validation"), path
        assert "run" in response.error["message"]


async def test_keys_guard_the_hot_and_the_operators_routes_and_leave_probes_open(valkey_server: ValkeyProcess) -> None:
    async with open_gateway(valkey_server.url, api_keys=("first-key", "second-key")) as gateway:
        client = gateway.client
        guarded = [("POST", path) for path in HOT]
        guarded += [
            ("GET", path) for path in ("/models", "/posterior", "/docs", "/openapi.json", "/nothing", "/reward")
        ]
        for method, path in guarded:
            for headers in (
                {},
                {"authorization": "Bearer wrong"},
                {"authorization": "Bearer first-ke"},
                {"authorization": "Basic first-key"},
                {"authorization": "first-key"},
                {"authorization": "Bearerfirst-key"},
                {"authorization": "Token first-key"},
                {"authorization": "Bearer"},
                {"x-api-key": "Bearer first-key"},
                {"x-api-key": ""},
            ):
                response = await client.request(method, path, b"{}", headers=headers)
                assert (response.status, response.error["code"]) == (401, "unauthorized"), (method, path, headers)
                assert response.headers["www-authenticate"].startswith("Bearer ")
        for path in OPEN:
            assert (await client.get(path)).status == 200
        for headers in (
            {"authorization": "Bearer first-key"},
            {"authorization": "bearer first-key"},
            {"authorization": "BEARER  first-key "},
            {"authorization": "basic " + base64.b64encode(b"any:second-key").decode()},
            {"x-api-key": "second-key"},
        ):
            assert (await client.request("GET", "/models", headers=headers)).status == 200
            body = json.dumps(pair()).encode()
            assert (await client.request("POST", "/reward", body, headers=headers)).status == 200


async def test_a_request_over_capacity_is_429_with_retry_after_and_probes_still_answer(
    valkey_server: ValkeyProcess,
) -> None:
    async with open_gateway(valkey_server.url, max_in_flight=2) as gateway:
        for arm in gateway.arms:
            arm.gate = asyncio.Event()
        busy = [asyncio.create_task(gateway.client.ok("/reward", pair(index))) for index in range(2)]
        await until(lambda: sum(len(arm.calls) for arm in gateway.arms) == 2, "both are at the workers")
        for path in HOT:
            response = await gateway.client.post(path, {})
            assert (response.status, response.error["code"]) == (429, "over_capacity")
            assert int(response.headers["retry-after"]) >= 1
            assert "max_in_flight" in response.error["message"]
        assert (await gateway.client.get("/healthz")).status == 200
        for arm in gateway.arms:
            assert arm.gate is not None
            arm.gate.set()
        await asyncio.gather(*busy)
        await gateway.client.ok("/reward", pair())


async def test_a_body_that_is_whole_when_all_places_are_taken_is_429(valkey_server: ValkeyProcess) -> None:
    async with open_gateway(valkey_server.url, max_in_flight=1) as gateway:
        whole, body = asyncio.Event(), json.dumps(pair()).encode()
        slow = asyncio.create_task(gateway.client.request("POST", "/reward", [body[:10], body[10:]], last_chunk=whole))
        await asyncio.sleep(0)
        for arm in gateway.arms:
            arm.gate = asyncio.Event()
        busy = asyncio.create_task(gateway.client.ok("/reward", pair(1)))
        await until(lambda: sum(len(arm.calls) for arm in gateway.arms) == 1, "at the workers")
        whole.set()
        assert (await slow).error["code"] == "over_capacity"
        for arm in gateway.arms:
            assert arm.gate is not None
            arm.gate.set()
        await busy


async def test_a_further_run_than_the_limit_is_429(valkey_server: ValkeyProcess) -> None:
    async with open_gateway(valkey_server.url, max_runs=2) as gateway:
        await gateway.client.ok("/reward", {**pair(), "run": gateway.run + "-b"})
        response = await gateway.client.post("/reward", {**pair(), "run": gateway.run + "-c"})
        assert (response.status, response.error["code"]) == (429, "over_capacity")
        assert "max_runs" in response.error["message"]
        assert 1 <= int(response.headers["retry-after"]) <= IDLE_SECONDS
        await gateway.client.ok("/reward", {**pair(), "run": gateway.run + "-b"})


async def test_an_unexpected_error_is_500_without_its_text(gateway: Gateway) -> None:
    for arm in gateway.arms:

        def broken(_: str, __: str) -> float:
            raise KeyError("a secret of the prompt")

        arm.score_of = broken
    response = await gateway.client.post("/reward", pair())
    assert (response.status, response.error["code"]) == (500, "internal")
    assert "secret" not in response.body.decode()
    for arm in gateway.arms:
        arm.score_of = lambda *_: 1.0
    await gateway.client.ok("/reward", pair())


async def test_an_index_that_no_float_can_hold_is_422(gateway: Gateway) -> None:
    for huge in (10**9, 10**400):
        body = {"decision_id": "d", "preferred": huge}
        response = await gateway.client.post("/feedback", body)
        assert (response.status, response.error["code"]) == (422, "validation")
        (result,) = (await gateway.client.ok("/feedback/batch", {"items": [body]}))["results"]
        assert result["error"]["code"] == "validation"


@pytest.mark.parametrize("key", ["", " ", "a b", "schlüssel"])
def test_a_key_that_would_let_everybody_in_is_refused(key: str) -> None:
    with pytest.raises(SettingsError, match="api_keys"):
        Settings(api_keys=(key,))

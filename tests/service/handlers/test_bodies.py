"""What a body may be on every path: content type, byte order mark, each name once, and what parsers raise."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING, Any

import pytest

from tests.support.gateway import Gateway, open_gateway, pair

if TYPE_CHECKING:
    from tests.conftest import ValkeyProcess

BODIES: dict[str, dict[str, Any]] = {
    "/reward": pair(),
    "/reward/batch": {"items": [pair()]},
    "/feedback": {"decision_id": "d", "reward": 0.5},
    "/feedback/batch": {"items": [{"decision_id": "d", "reward": 0.5}]},
    "/get_reward": {"query": ["p1 answer"], "prompts": ["p1"], "labels": ["l"]},
    "/get_reward/feedback": {"query": ["p1 answer"], "prompts": ["p1"], "reward": [0.5]},
    "/v1/score/evaluation": {"model": "model", "messages": ["p1 answer"]},
    "/v1/score/evaluation/feedback": {"messages": ["p1 answer"], "reward": [0.5]},
    "/remote_rm": {"prompt": [{"role": "user", "content": "p1"}], "response": " answer", "label": {"a": 1}},
    "/remote_rm/feedback": {"prompt": "p1", "response": " answer", "reward": 0.5},
}
"""A body that each path understands: its answer is 200, or the 404 of feedback on what nobody scored."""

PATHS = tuple(BODIES)


@pytest.fixture
async def gateway(valkey_server: ValkeyProcess) -> AsyncIterator[Gateway]:
    """Without keys."""
    async with open_gateway(valkey_server.url, signal="reward", trainer_patience_seconds=0) as opened:
        yield opened


async def understood(gateway: Gateway, path: str, body: bytes, headers: dict[str, str] | None = None) -> bool:
    response = await gateway.client.request("POST", path, body, headers=headers)
    return response.status in (200, 404)


@pytest.mark.parametrize("path", [path for path in PATHS if "feedback" in path])
async def test_feedback_for_an_unknown_run_is_404_as_documented(gateway: Gateway, path: str) -> None:
    unknown = gateway.run + "-typo"
    where, named = (path, {"run": unknown}) if path.startswith("/feedback") else (f"{path}?run={unknown}", {})
    response = await gateway.client.post(where, {**BODIES[path], **named})
    assert (response.status, response.error["code"]) == (404, "not_found")
    assert unknown in response.error["message"]
    document = (await gateway.client.get("/openapi.json")).json
    assert "Unknown run" in document["paths"][path]["post"]["responses"]["404"]["description"]


# Content types -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(
    "content_type",
    [
        "text/plain",
        "text/plain;charset=UTF-8",
        "TEXT/PLAIN",
        "application/x-www-form-urlencoded",
        "multipart/form-data; boundary=x",
        "text/plain; application/json",
        "application/jsonp",
        "",
    ],
)
async def test_a_body_that_is_not_declared_as_json_is_415(gateway: Gateway, path: str, content_type: str) -> None:
    body = json.dumps(BODIES[path]).encode()
    response = await gateway.client.request("POST", path, body, headers={"content-type": content_type})
    assert (response.status, response.error["code"]) == (415, "unsupported_media_type")
    assert "application/json" in response.error["message"]
    assert not any(arm.calls for arm in gateway.arms)


@pytest.mark.parametrize("path", PATHS)
async def test_json_by_any_of_its_names_is_taken_and_so_is_a_body_without_a_type(gateway: Gateway, path: str) -> None:
    body = json.dumps(BODIES[path]).encode()
    for content_type in ("application/json", "Application/JSON; charset=utf-8", "application/vnd.api+json"):
        assert await understood(gateway, path, body, {"content-type": content_type}), content_type
    assert await understood(gateway, path, body)


async def test_a_browser_must_declare_json_because_only_then_it_asks_before_it_sends(gateway: Gateway) -> None:
    body = json.dumps(pair()).encode()
    for origin in ("https://evil.example", "null", "http://localhost:3000"):
        response = await gateway.client.request("POST", "/reward", body, headers={"origin": origin})
        assert (response.status, response.error["code"]) == (415, "unsupported_media_type"), origin
    asked = await gateway.client.request("OPTIONS", "/reward", headers={"origin": "https://evil.example"})
    assert asked.status == 405
    assert not any(name.startswith("access-control") for name in asked.headers)


async def test_a_page_whose_name_points_at_loopback_is_kept_out_of_a_gateway_without_keys(
    gateway: Gateway, valkey_server: ValkeyProcess
) -> None:
    body, json_type = json.dumps(pair()).encode(), {"content-type": "application/json"}
    for origin in ("http://evil.example:8080", "http://localhost.evil.example", "null", "http://[", "file://"):
        response = await gateway.client.request("POST", "/reward", body, headers={**json_type, "origin": origin})
        assert (response.status, response.error["code"]) == (403, "foreign_origin"), origin
    for origin in ("http://localhost:8080", "http://127.0.0.1:8080", "http://[::1]:8080", "http://10.0.0.5"):
        assert await understood(gateway, "/reward", body, {**json_type, "origin": origin}), origin
    async with open_gateway(valkey_server.url, api_keys=("key",)) as keyed:
        headers = {**json_type, "origin": "https://rewards.example", "x-api-key": "key"}
        assert await understood(keyed, "/reward", body, headers)


# JSON ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", PATHS)
async def test_a_byte_order_mark_is_passed_over(gateway: Gateway, path: str) -> None:
    assert await understood(gateway, path, b"\xef\xbb\xbf" + json.dumps(BODIES[path]).encode())
    for marks in (b"\xef\xbb\xbf\xef\xbb\xbf", b"\xff\xfe", b"\xef\xbb"):
        response = await gateway.client.request("POST", path, marks + json.dumps(BODIES[path]).encode())
        assert (response.status, response.error["code"]) == (400, "bad_request")


@pytest.mark.parametrize("path", PATHS)
async def test_a_field_that_occurs_twice_is_422_and_named(gateway: Gateway, path: str) -> None:
    text = json.dumps(BODIES[path])
    for name, value in BODIES[path].items():
        twice = f"{{{json.dumps(name)}: {json.dumps(value)}, {text[1:]}"
        escaped = twice.replace(f'"{name}"', f'"\\u{ord(name[0]):04x}{name[1:]}"', 1)
        for body in (twice, escaped):
            response = await gateway.client.request("POST", path, body.encode())
            assert (response.status, response.error["code"]) == (422, "validation"), body
            assert response.error["details"] == {"field": name}
            assert "once" in response.error["message"]
    assert not any(arm.calls for arm in gateway.arms)


async def test_a_field_that_occurs_twice_within_an_item_is_422(gateway: Gateway) -> None:
    bodies = {
        "/reward": '{"prompt": "p", "responses": ["a"], "metadata": {"a": 1, "a": 2}}',
        "/remote_rm": '{"prompt": [{"role": "user", "role": "system", "content": "c"}], "response": "r"}',
        "/get_reward": '{"query": [], "labels": [{"a": 1, "a": 2}]}',
    }
    for path, body in bodies.items():
        response = await gateway.client.request("POST", path, body.encode())
        assert (response.status, response.error["code"]) == (422, "validation"), path


async def test_equal_names_in_different_objects_are_no_repetition(gateway: Gateway) -> None:
    assert await understood(
        gateway, "/reward/batch", json.dumps({"items": [pair(), pair()], "run": gateway.run}).encode()
    )
    body = {"prompt": '{"prompt": 1, "prompt": 2}', "responses": ['"prompt"', "prompt"]}
    assert await understood(gateway, "/reward", json.dumps(body).encode())


# What parsers raise --------------------------------------------------------------------------------------------------

HOSTILE: dict[str, str] = {
    **{f"{depth} arrays": "[" * depth + "]" * depth for depth in (50, 200, 400, 700, 900, 990, 1100, 100_000)},
    **{
        f"{depth} objects": '{"a":' * depth + "1" + "}" * depth
        for depth in (50, 200, 400, 700, 900, 990, 1100, 100_000)
    },
    "arrays without end": "[" * 100_000,
    "objects without end": '{"a":' * 100_000,
    "a whole number of 5,000 digits": "9" * 5000,
    "a negative one": "-" + "9" * 5000,
    "a fraction of 5,000 digits": "0." + "9" * 5000,
    "beyond floats": "1e999",
    "below floats": "1e-999",
    "a huge exponent": "1e" + "9" * 400,
    "infinity": "Infinity",
    "not a number": "NaN",
    "half a surrogate pair": '"\\ud800"',
    "halves in the wrong order": '"\\udc00\\ud800"',
    "a surrogate in UTF-8": '"\udcff"',
    "a zero character": '"\\u0000"',
    "a raw control character": '"\x01"',
    "an empty name": '{"": 1}',
    "a long name": json.dumps({"n" * 100_000: 1}),
    "many names": json.dumps({str(index): index for index in range(5000)}),
    "nothing": "null",
    "a boolean": "true",
    "an unfinished word": "tru",
    "an unfinished escape": '"\\u12',
    "a line separator": '"\u2028"',
}


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("value", HOSTILE.values(), ids=HOSTILE.keys())
async def test_no_body_is_an_unexpected_error(gateway: Gateway, path: str, value: str) -> None:
    """Alone, in the place of each field, within it, and as a field that nobody knows."""
    bodies = [value, f"[{value}]"]
    fields = {name: json.dumps(known) for name, known in BODIES[path].items()}
    for name in (*fields, "unknown"):
        for hostile in (value, f"[{value}]", f'[{{"role": "user", "content": {value}}}]', f'[{{"reward": {value}}}]'):
            given = fields | {name: hostile}
            bodies.append("{" + ", ".join(f'"{key}": {text}' for key, text in given.items()) + "}")
    for body in bodies:
        response = await gateway.client.request("POST", path, body.encode("utf-8", "surrogateescape"))
        assert response.status in (200, 400, 404, 422), (response.status, body[:200])


@pytest.mark.parametrize("path", PATHS)
async def test_a_body_that_is_nested_too_deeply_is_422(gateway: Gateway, path: str) -> None:
    for nested in ("[" * 1100 + "]" * 1100, '{"a":' * 1100 + "1" + "}" * 1100):
        fields = {name: json.dumps(known) for name, known in BODIES[path].items()} | {"label": nested}
        body = "{" + ", ".join(f'"{key}": {text}' for key, text in fields.items()) + "}"
        response = await gateway.client.request("POST", path, body.encode())
        assert (response.status, response.error["code"]) == (422, "validation")

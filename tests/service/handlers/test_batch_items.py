"""An item of a batch that is not what the path takes is refused alone, and its neighbours are answered."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING, Any

import pytest

from tests.support.gateway import Gateway, open_gateway, pair

if TYPE_CHECKING:
    from tests.conftest import ValkeyProcess

BAD: dict[str, tuple[Any, str]] = {
    "a list of numbers as prompt": ({**pair(), "prompt": [1, 2]}, "$.prompt"),
    "a number as prompt": ({**pair(), "prompt": 5}, "$.prompt"),
    "no responses": ({"prompt": "p"}, "responses"),
    "responses of none": ({**pair(), "responses": []}, "$.responses"),
    "an empty list of messages": ({**pair(), "prompt": []}, "prompt"),
    "an unknown field": ({**pair(), "modle": "rm-a"}, "modle"),
    "no object": (7, "object"),
    "null": (None, "object"),
}


@pytest.fixture
async def gateway(valkey_server: ValkeyProcess) -> AsyncIterator[Gateway]:
    async with open_gateway(valkey_server.url, max_batch=4) as opened:
        yield opened


@pytest.mark.parametrize(("item", "named"), BAD.values(), ids=BAD)
async def test_a_bad_item_is_refused_alone(gateway: Gateway, item: Any, named: str) -> None:
    reply = await gateway.client.ok("/reward/batch", {"items": [pair(1), item, pair(2)]})
    first, bad, last = reply["results"]
    assert first["recorded"]
    assert last["recorded"]
    assert (bad["error"]["code"], bad["rewards"]) == ("validation", None)
    assert "items[1]" in bad["error"]["message"]
    assert named in bad["error"]["message"]


async def test_a_field_twice_in_an_item_refuses_the_item(gateway: Gateway) -> None:
    good, twice = json.dumps(pair()), '{"prompt": "a", "prompt": "b", "responses": ["c"]}'
    response = await gateway.client.request("POST", "/reward/batch", f'{{"items": [{good}, {twice}]}}'.encode())
    assert response.status == 200
    assert response.json["results"][0]["recorded"]
    assert "'prompt' occurs more than once" in response.json["results"][1]["error"]["message"]
    around = f'{{"items": [{good}], "items": [5]}}'.encode()
    response = await gateway.client.request("POST", "/reward/batch", around)
    assert (response.status, response.error["code"]) == (422, "validation")


async def test_bad_items_count_for_the_size_of_a_batch(gateway: Gateway) -> None:
    response = await gateway.client.post("/reward/batch", {"items": [7] * 5})
    assert response.status == 422
    assert "max_batch" in response.error["message"] or "at most 4" in response.error["message"]


async def test_what_is_around_the_items_refuses_the_batch(gateway: Gateway) -> None:
    for around in ({"items": [7], "run": 5}, {"items": [7], "modle": 1}, {"items": {"a": 7}}, [7]):
        response = await gateway.client.post("/reward/batch", around)
        assert (response.status, response.error["code"]) == (422, "validation")


async def test_a_bad_feedback_is_refused_alone(gateway: Gateway) -> None:
    first = await gateway.client.ok("/reward", pair())
    items = [{"decision_id": first["decision_id"], "preferred": 0}, {"decision_id": 5, "preferred": 0}, "x"]
    results = (await gateway.client.ok("/feedback/batch", {"items": items}))["results"]
    assert results[0]["duplicate"] is False
    assert [result["error"]["code"] for result in results[1:]] == ["validation", "validation"]
    assert "items[1]" in results[1]["error"]["message"]

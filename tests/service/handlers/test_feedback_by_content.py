"""Feedback without an id that comes before its decision, twice, late, for a repeat, or for a fallback."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING, Any

import pytest

from tests.support.gateway import Gateway, fresh_run, open_gateway, pair, until

if TYPE_CHECKING:
    from tests.conftest import ValkeyProcess


@pytest.fixture
async def gateway(valkey_server: ValkeyProcess) -> AsyncIterator[Gateway]:
    """Three RMs, signal `preference`."""
    async with open_gateway(valkey_server.url) as opened:
        yield opened


def feedback(index: int = 0, preferred: int = 1, **more: Any) -> dict[str, Any]:
    return {**pair(index), "preferred": preferred, **more}


async def test_before_its_decision_it_is_refused_with_a_hint_and_accepted_later(gateway: Gateway) -> None:
    early = await gateway.client.post("/feedback", feedback())
    assert (early.status, early.error["code"], early.headers["retry-after"]) == (404, "not_found", "1")
    assert gateway.events() == []
    decision_id = (await gateway.client.ok("/reward", pair()))["decision_id"]
    assert (await gateway.client.ok("/feedback", feedback()))["decision_id"] == decision_id
    assert len(gateway.events()) == 1


async def test_while_its_decision_is_on_the_way_it_is_refused_and_changes_nothing(gateway: Gateway) -> None:
    for arm in gateway.arms:
        arm.gate = asyncio.Event()
    scoring = asyncio.create_task(gateway.client.ok("/reward", pair()))
    await until(lambda: sum(len(arm.calls) for arm in gateway.arms) == 1, "the RM is asked")
    assert (await gateway.client.post("/feedback", feedback())).status == 404
    for arm in gateway.arms:
        assert arm.gate is not None
        arm.gate.set()
    await scoring
    assert (await gateway.client.ok("/feedback", feedback()))["duplicate"] is False


async def test_an_id_that_nobody_gave_is_final(gateway: Gateway) -> None:
    response = await gateway.client.post("/feedback", {"decision_id": "d06in5t2co40000000000000000", "preferred": 0})
    assert response.status == 404
    assert "retry-after" not in response.headers


async def test_on_another_gateway_it_is_accepted_as_soon_as_the_reward_was_answered(
    valkey_server: ValkeyProcess,
) -> None:
    run = fresh_run()
    async with (
        open_gateway(valkey_server.url, run=run) as scoring,
        open_gateway(valkey_server.url, run=run) as learning,
    ):
        for index in range(20):
            await scoring.client.ok("/reward", pair(index))
            assert (await learning.client.ok("/feedback", feedback(index)))["duplicate"] is False
        assert len(scoring.events()) == 20


async def test_twice_is_a_duplicate_and_another_value_a_conflict(gateway: Gateway) -> None:
    await gateway.client.ok("/reward", pair())
    first = await gateway.client.ok("/feedback", feedback())
    assert await gateway.client.ok("/feedback", feedback()) == {**first, "duplicate": True}
    response = await gateway.client.post("/feedback", feedback(preferred=0))
    assert (response.status, response.error["details"]["standing"]) == (409, 1.0)
    assert len(gateway.events()) == 1


async def test_by_id_after_by_content_is_the_same_feedback(gateway: Gateway) -> None:
    decision_id = (await gateway.client.ok("/reward", pair()))["decision_id"]
    await gateway.client.ok("/feedback", feedback())
    assert (await gateway.client.ok("/feedback", {"decision_id": decision_id, "preferred": 1}))["duplicate"] is True


async def test_late_is_gone(valkey_server: ValkeyProcess) -> None:
    async with open_gateway(valkey_server.url, decision_ttl_seconds=1.0) as gateway:
        await gateway.client.ok("/reward", pair())
        await asyncio.sleep(1.05)
        response = await gateway.client.post("/feedback", feedback())
        assert (response.status, response.error["code"]) == (410, "decision_expired")
        assert gateway.events() == []


async def test_of_a_request_that_was_repeated_the_latest_decision_is_meant(gateway: Gateway) -> None:
    await gateway.client.ok("/reward", pair())
    latest = (await gateway.client.ok("/reward", pair()))["decision_id"]
    assert (await gateway.client.ok("/feedback", feedback()))["decision_id"] == latest
    assert [event.decision_id for event in gateway.events()] == [latest]


async def test_for_a_fallback_the_rm_that_answered_learns(gateway: Gateway) -> None:
    drawn, asked = gateway.arms[0], gateway.arms[1]
    drawn.available = gateway.arms[2].available = False
    reply = await gateway.client.ok("/reward", pair())
    assert reply["model"] == asked.name
    await gateway.client.ok("/feedback", feedback())
    learned = await gateway.learned(1)
    assert [model["feedbacks"] for model in learned["models"]] == [0, 1, 0]
    (event,) = gateway.events()
    assert event.arm == 1


async def test_for_a_followed_choice_the_rm_that_was_asked_learns_from_the_responses_own_context(
    valkey_server: ValkeyProcess,
) -> None:
    async with open_gateway(valkey_server.url, signal="reward") as gateway:
        single = {"prompt": "p", "responses": ["one"]}
        await gateway.client.ok("/reward", single)
        followed = {"prompt": "p", "responses": ["another response"]}
        reply = await gateway.client.ok("/reward", followed)
        stored = gateway.decision(reply["decision_id"])
        await gateway.client.ok("/feedback", {**followed, "reward": 0.25})
        (event,) = gateway.events()
        assert (event.arm, event.x) == (stored.arm, stored.x)


async def test_where_content_keys_are_off_it_says_what_to_send(valkey_server: ValkeyProcess) -> None:
    async with open_gateway(valkey_server.url, content_keys=False) as gateway:
        await gateway.client.ok("/reward", pair())
        assert (await gateway.client.post("/feedback", feedback())).status == 404

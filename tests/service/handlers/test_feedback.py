"""POST /feedback and /feedback/batch of the real application: exactly once, and every refusal by name."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING, Any

import pytest

from service.stores.redis import RedisStore
from tests.support.clock import Clock
from tests.support.gateway import Gateway, open_gateway, pair

if TYPE_CHECKING:
    from tests.conftest import ValkeyProcess

UNKNOWN = "d06in5t2co40000000000000000"
"""Well formed, and never given by anybody."""


@pytest.fixture
async def gateway(valkey_server: ValkeyProcess) -> AsyncIterator[Gateway]:
    """Three RMs, signal `preference`."""
    async with open_gateway(valkey_server.url) as opened:
        yield opened


async def decide(gateway: Gateway, index: int = 0, **more: Any) -> str:
    """The id of a fresh decision."""
    decision_id: str = (await gateway.client.ok("/reward", {**pair(index), **more}))["decision_id"]
    return decision_id


async def test_a_feedback_is_in_the_log_once_it_is_acknowledged(gateway: Gateway) -> None:
    decision_id = await decide(gateway)
    reply = await gateway.client.ok("/feedback", {"decision_id": decision_id, "preferred": 1})
    assert (reply["decision_id"], reply["duplicate"]) == (decision_id, False)
    (event,) = gateway.events()
    assert (event.decision_id, event.feedback.value, event.credit) == (decision_id, 1.0, 1.0)
    learned = await gateway.learned(1)
    assert learned["last_event_id"] == reply["event_id"]


async def test_a_constant_rm_earns_half_among_four(gateway: Gateway) -> None:
    gateway.arm("rm-a").score_of = lambda _, response: 1.0
    for name in ("rm-a", "rm-b"):
        body = {"prompt": "p", "responses": ["a", "bbb", "cc", "dddd"], "policy": f"single:{name}"}
        decision_id = (await gateway.client.ok("/reward", body))["decision_id"]
        await gateway.client.ok("/feedback", {"decision_id": decision_id, "preferred": 1})
    assert [event.credit for event in gateway.events()] == pytest.approx([0.5, 2 / 3])


async def test_a_preference_about_one_response_teaches_nothing(gateway: Gateway) -> None:
    reply = await gateway.client.ok("/reward", {"prompt": "p", "responses": ["a"]})
    await gateway.client.ok("/feedback", {"decision_id": reply["decision_id"], "preferred": 0})
    learned = await gateway.learned(1)
    assert all(model["mean_norm"] == 0 and model["mean_reward"] is None for model in learned["models"])


async def test_the_same_feedback_again_is_a_duplicate_that_changes_nothing(gateway: Gateway) -> None:
    feedback = {"decision_id": await decide(gateway), "preferred": 0}
    first = await gateway.client.ok("/feedback", feedback)
    again = await gateway.client.ok("/feedback", feedback)
    assert again == {**first, "duplicate": True}
    assert len(gateway.events()) == 1


async def test_of_equal_feedbacks_at_once_one_is_applied(gateway: Gateway) -> None:
    feedback = {"decision_id": await decide(gateway), "preferred": 0}
    replies = await asyncio.gather(*(gateway.client.ok("/feedback", feedback) for _ in range(40)))
    assert Counter(reply["duplicate"] for reply in replies) == {False: 1, True: 39}
    assert len(gateway.events()) == 1


async def test_another_value_is_409_and_the_first_one_stands(gateway: Gateway) -> None:
    decision_id = await decide(gateway)
    await gateway.client.ok("/feedback", {"decision_id": decision_id, "preferred": 0})
    response = await gateway.client.post("/feedback", {"decision_id": decision_id, "preferred": 1})
    assert (response.status, response.error["code"]) == (409, "feedback_conflict")
    assert response.error["details"] == {"decision_id": decision_id, "standing": 0.0}
    assert len(gateway.events()) == 1


async def test_an_unknown_decision_is_404(gateway: Gateway) -> None:
    for decision_id in (UNKNOWN, "no id of ours", "", "x" * 500):
        response = await gateway.client.post("/feedback", {"decision_id": decision_id, "preferred": 0})
        assert (response.status, response.error["code"]) == (404, "not_found"), decision_id
    assert not gateway.events()


async def test_a_decision_of_another_run_is_unknown_here(gateway: Gateway) -> None:
    decision_id = await decide(gateway, run=gateway.run + "-b")
    response = await gateway.client.post("/feedback", {"decision_id": decision_id, "preferred": 0})
    assert response.status == 404
    body = {"decision_id": decision_id, "preferred": 0, "run": gateway.run + "-b"}
    assert (await gateway.client.ok("/feedback", body))["duplicate"] is False


async def test_feedback_after_the_window_is_410(valkey_server: ValkeyProcess) -> None:
    clock = Clock(lambda run: valkey_server.url)
    store = RedisStore(valkey_server.url, window_seconds=3600, timeout_seconds=10, now_ms=clock.now_ms)
    async with open_gateway(valkey_server.url, store=store) as gateway:
        decision_id = await decide(gateway)
        clock.advance(3601, gateway.run)
        response = await gateway.client.post("/feedback", {"decision_id": decision_id, "preferred": 0})
        assert (response.status, response.error["code"]) == (410, "decision_expired")
        assert "decision_ttl_seconds" in response.error["message"]
        by_content = await gateway.client.post("/feedback", {**pair(), "preferred": 0})
        assert by_content.status == 410
        assert not gateway.events()


@pytest.mark.parametrize(
    ("signal", "good", "stored"),
    [("preference", {"preferred": 1}, 1.0), ("loss", {"loss": 0.693}, 0.693), ("reward", {"reward": 0.25}, 0.25)],
)
async def test_a_run_takes_the_field_of_its_signal_and_no_other(
    valkey_server: ValkeyProcess, signal: str, good: dict[str, float], stored: float
) -> None:
    async with open_gateway(valkey_server.url, signal=signal) as gateway:
        decision_id = await decide(gateway)
        fields: dict[str, float] = {"preferred": 1, "loss": 0.693, "reward": 0.25}
        wrong = {name: value for name, value in fields.items() if name not in good}
        for bad in ({}, wrong, {**good, **wrong}, *({name: value} for name, value in wrong.items())):
            response = await gateway.client.post("/feedback", {"decision_id": decision_id, **bad})
            assert (response.status, response.error["code"]) == (422, "validation"), bad
            assert response.error["details"] == {"field": next(iter(good)), "signal": signal}
        assert not gateway.events()
        await gateway.client.ok("/feedback", {"decision_id": decision_id, **good})
        assert [event.feedback.value for event in gateway.events()] == [stored]


async def test_an_index_beyond_the_responses_is_422_and_leaves_the_decision_open(gateway: Gateway) -> None:
    decision_id = await decide(gateway)
    for index in (2, 7, 10**6):
        response = await gateway.client.post("/feedback", {"decision_id": decision_id, "preferred": index})
        assert (response.status, response.error["code"]) == (422, "validation")
        assert response.error["details"]["field"] == "preferred"
        assert str(index) in response.error["message"]
    for no_index in (-1, 0.5, "0", True, None, 10**30):
        response = await gateway.client.post("/feedback", {"decision_id": decision_id, "preferred": no_index})
        assert response.status == 422, no_index
    assert (await gateway.client.ok("/feedback", {"decision_id": decision_id, "preferred": 0}))["duplicate"] is False


@pytest.mark.parametrize("value", [b"NaN", b"Infinity", b"-Infinity", b"1e999", b"-1e999"])
@pytest.mark.parametrize("signal", ["loss", "reward"])
async def test_nan_and_infinity_are_refused(valkey_server: ValkeyProcess, signal: str, value: bytes) -> None:
    async with open_gateway(valkey_server.url, signal=signal) as gateway:
        decision_id = await decide(gateway)
        body = b'{"decision_id": "%b", "%b": %b}' % (decision_id.encode(), signal.encode(), value)
        response = await gateway.client.request("POST", "/feedback", body)
        assert response.status in (400, 422)
        assert response.error["code"] in ("bad_request", "validation")
        assert not gateway.events()


@pytest.mark.parametrize("value", [-0.001, 1.001, 1e300])
async def test_a_reward_outside_the_unit_interval_is_422(valkey_server: ValkeyProcess, value: float) -> None:
    async with open_gateway(valkey_server.url, signal="reward") as gateway:
        decision_id = await decide(gateway)
        response = await gateway.client.post("/feedback", {"decision_id": decision_id, "reward": value})
        assert (response.status, response.error["code"]) == (422, "validation")
        assert "reward" in response.error["message"]
        assert not gateway.events()


@pytest.mark.parametrize("value", [1e300, -1e300, 1.1e6])
async def test_a_loss_that_would_swamp_its_rms_averages_is_422(valkey_server: ValkeyProcess, value: float) -> None:
    async with open_gateway(valkey_server.url, signal="loss") as gateway:
        decision_id = await decide(gateway)
        response = await gateway.client.post("/feedback", {"decision_id": decision_id, "loss": value})
        assert (response.status, response.error["code"]) == (422, "validation")
        assert "loss is" in response.error["message"]
        assert not gateway.events()


async def test_the_largest_losses_leave_the_posterior_finite(valkey_server: ValkeyProcess) -> None:
    async with open_gateway(valkey_server.url, signal="loss", policy="single:rm-a") as gateway:
        for index in range(14):
            decision_id = await decide(gateway, index)
            loss = 1e6 if index % 2 else -1e6
            await gateway.client.ok("/feedback", {"decision_id": decision_id, "loss": loss})
        learned = await gateway.learned(14)
        assert learned["models"][0]["feedbacks"] == 14
        assert learned["models"][0]["mean_norm"] < 10
        assert (await gateway.client.get("/readyz")).status == 200
        await gateway.client.ok("/reward", pair(51))


async def test_the_latest_decision_of_a_content_is_found_without_its_id(gateway: Gateway) -> None:
    first, latest = await decide(gateway, 3), await decide(gateway, 3)
    reply = await gateway.client.ok("/feedback", {**pair(3), "preferred": 1})
    assert reply["decision_id"] == latest != first
    again = await gateway.client.ok("/feedback", {**pair(3), "preferred": 1})
    assert again == {**reply, "duplicate": True}


async def test_the_order_of_responses_is_part_of_the_content(gateway: Gateway) -> None:
    await decide(gateway, 3)
    swapped = {"prompt": pair(3)["prompt"], "responses": pair(3)["responses"][::-1], "preferred": 1}
    assert (await gateway.client.post("/feedback", swapped)).status == 404


async def test_content_keys_can_be_switched_off(valkey_server: ValkeyProcess) -> None:
    async with open_gateway(valkey_server.url, content_keys=False) as gateway:
        await decide(gateway, 3)
        assert (await gateway.client.post("/feedback", {**pair(3), "preferred": 1})).status == 404


@pytest.mark.parametrize(
    "reference",
    [
        {},
        {"prompt": "p"},
        {"responses": ["a", "b"]},
        {"decision_id": UNKNOWN, "prompt": "p", "responses": ["a", "b"]},
        {"decision_id": UNKNOWN, "prompt": "p"},
    ],
)
async def test_a_decision_is_named_in_one_way(gateway: Gateway, reference: dict[str, Any]) -> None:
    response = await gateway.client.post("/feedback", {**reference, "preferred": 0})
    assert (response.status, response.error["code"]) == (422, "validation")
    assert "decision_id" in response.error["message"]


async def test_each_item_of_a_batch_is_applied_or_refused_on_its_own(gateway: Gateway) -> None:
    ids = [await decide(gateway, index) for index in range(4)]
    await gateway.client.ok("/feedback", {"decision_id": ids[1], "preferred": 1})
    other = gateway.run + "-b"
    elsewhere = await decide(gateway, 9, run=other)
    items: list[dict[str, Any]] = [
        {"decision_id": ids[0], "preferred": 0},
        {"decision_id": ids[1], "preferred": 1},
        {"decision_id": ids[1], "preferred": 0},
        {"decision_id": UNKNOWN, "preferred": 0},
        {"decision_id": ids[2], "preferred": 5},
        {"decision_id": ids[2], "loss": 0.5},
        {"decision_id": elsewhere, "preferred": 1, "run": other},
        {**pair(3), "preferred": 1},
        {"decision_id": ids[0], "preferred": 0},
        {"decision_id": ids[0], "preferred": 0, "run": "no run"},
    ]
    results = (await gateway.client.ok("/feedback/batch", {"items": items}))["results"]
    outcomes = [result["error"]["code"] if "error" in result else result["duplicate"] for result in results]
    assert outcomes == [
        False,
        True,
        "feedback_conflict",
        "not_found",
        "validation",
        "validation",
        False,
        False,
        True,
        "validation",
    ]
    assert results[7]["decision_id"] == ids[3]
    assert [event.decision_id for event in gateway.events()] == [ids[1], ids[0], ids[3]]
    assert [event.decision_id for event in gateway.events(other)] == [elsewhere]


async def test_a_preference_about_a_majority_teaches_every_rm_that_voted(gateway: Gateway) -> None:
    gateway.arm("rm-b").score_of = lambda _, response: -float(len(response))
    gateway.arm("rm-c").available = False
    decision_id = await decide(gateway, policy="majority")
    await gateway.client.ok("/feedback", {"decision_id": decision_id, "preferred": 0})
    learned = await gateway.learned(1)
    assert [model["feedbacks"] for model in learned["models"]] == [1, 1, 0]
    assert [model["mean_reward"] for model in learned["models"]][:2] == [0.0, 1.0]
    assert learned["digest"] == gateway.folded().digest()


async def test_the_posterior_learns_of_the_rm_that_was_asked(gateway: Gateway) -> None:
    results = [await gateway.client.ok("/reward", {**pair(i), "policy": "single:rm-b"}) for i in range(10)]
    for index, result in enumerate(results):
        right = index < 7
        preferred = result["preferred"] if right else 1 - result["preferred"]
        await gateway.client.ok("/feedback", {"decision_id": result["decision_id"], "preferred": preferred})
    learned = await gateway.learned(10)
    models = {model["model"]: model for model in learned["models"]}
    assert [models[name]["feedbacks"] for name in ("rm-a", "rm-b", "rm-c")] == [0, 10, 0]
    assert models["rm-b"]["mean_reward"] == pytest.approx(0.7)
    assert models["rm-a"]["mean_reward"] is None
    assert models["rm-b"]["sd"] < models["rm-a"]["sd"]
    assert learned["digest"] == gateway.folded().digest()


async def test_a_malformed_run_is_refused_with_no_items_too(gateway: Gateway) -> None:
    response = await gateway.client.post("/feedback/batch", {"items": [], "run": "no such\x00name"})
    assert response.status == 422
    assert "run" in response.error["message"]

"""Singles of one prompt stay with one RM, on every gateway, and what is logged is the draw that made the choice."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING, Any

import pytest

from tests.support.arms import ScriptedArm
from tests.support.gateway import Gateway, fresh_run, open_gateway, pair
from tests.support.story import gone

if TYPE_CHECKING:
    from tests.conftest import ValkeyProcess


@pytest.fixture
async def gateway(valkey_server: ValkeyProcess) -> AsyncIterator[Gateway]:
    """Three RMs, nothing learned: every draw is close to even."""
    async with open_gateway(valkey_server.url) as opened:
        yield opened


def single(prompt: str, response: str) -> dict[str, Any]:
    return {"prompt": prompt, "responses": [response]}


async def models(gateway: Gateway, requests: list[dict[str, Any]]) -> list[str]:
    replies = await asyncio.gather(*(gateway.client.ok("/reward", request) for request in requests))
    return [reply["model"] for reply in replies]


async def test_singles_of_one_prompt_at_once_get_one_rm_and_prompts_differ(gateway: Gateway) -> None:
    requests = [single(f"prompt {p}", f"response {r}") for p in range(12) for r in range(8)]
    asked = await models(gateway, requests)
    groups = [set(asked[p * 8 : p * 8 + 8]) for p in range(12)]
    assert all(len(group) == 1 for group in groups)
    # Twelve even draws of three RMs are all equal once in 177,147 times; the seed is fixed.
    assert len(set().union(*groups)) > 1


async def test_singles_of_one_batch_stick_too(gateway: Gateway) -> None:
    items = [single(f"prompt {i % 4}", f"response {i}") for i in range(32)]
    results = (await gateway.client.ok("/reward/batch", {"items": items}))["results"]
    for p in range(4):
        assert len({result["model"] for result in results[p::4]}) == 1
    assert [result.get("sticky", False) for result in results] == [False] * 4 + [True] * 28


async def test_two_gateways_agree_while_both_are_asked(valkey_server: ValkeyProcess) -> None:
    run = fresh_run()
    async with (
        open_gateway(valkey_server.url, run=run, seed=1) as first,
        open_gateway(valkey_server.url, run=run, seed=2) as second,
    ):
        for p in range(10):
            requests = [single(f"prompt {p}", f"response {r}") for r in range(6)]
            both = await asyncio.gather(models(first, requests), models(second, requests))
            assert len({model for asked in both for model in asked}) == 1


async def test_a_followed_decision_logs_the_draw_that_made_the_choice(gateway: Gateway) -> None:
    replies = [await gateway.client.ok("/reward", single("p", f"{'long ' * r} response")) for r in range(5)]
    made, *followed = [gateway.decision(reply["decision_id"]) for reply in replies]
    assert made.sticky
    for decision, reply in zip(followed, replies[1:], strict=True):
        assert reply["sticky"] is True
        assert (decision.means, decision.sds, decision.propensities) == (made.means, made.sds, made.propensities)
        assert decision.propensity == made.propensity == made.propensities[made.arm]
        assert decision.sticky == made.sticky
        # What the posterior learns from is this response's own context.
        assert decision.x != made.x
    assert "sticky" not in replies[0]


async def test_a_version_that_was_learned_later_is_not_claimed_by_a_followed_draw(gateway: Gateway) -> None:
    await gateway.client.ok("/reward", single("p", "one"))
    other = await gateway.client.ok("/reward", {"prompt": "q", "responses": ["a", "bb"]})
    await gateway.client.ok("/feedback", {"decision_id": other["decision_id"], "preferred": 1})
    await gateway.learned(1)
    assert (await gateway.client.ok("/reward", single("p", "two")))["posterior_version"] == 0
    assert (await gateway.client.ok("/reward", single("another", "two")))["posterior_version"] == 1


async def test_when_the_rm_is_away_all_singles_fall_to_the_same_next_one(gateway: Gateway) -> None:
    first = await gateway.client.ok("/reward", single("p", "one"))
    gateway.arm(first["model"]).available = False
    replies = [await gateway.client.ok("/reward", single("p", f"response {r}")) for r in range(6)]
    assert len({reply["model"] for reply in replies}) == 1
    assert all(reply["fallback"] for reply in replies)
    stored = gateway.decision(replies[0]["decision_id"])
    drawn = [arm.name for arm in gateway.arms].index(first["model"])
    assert gone(stored) == [drawn]
    # Among the two that were left, given the beliefs of the draw that stands.
    assert 0 < stored.propensity < 1
    gateway.arm(first["model"]).available = True
    assert (await gateway.client.ok("/reward", single("p", "last")))["model"] == first["model"]


async def test_pairs_policies_and_runs_do_not_share_a_choice(gateway: Gateway) -> None:
    prompts = [f"prompt {p}" for p in range(30)]
    singles = await models(gateway, [single(p, "a") for p in prompts])
    by_policy = await models(gateway, [{**single(p, "a"), "policy": "random"} for p in prompts])
    by_run = await models(gateway, [{**single(p, "a"), "run": gateway.run + "-2"} for p in prompts])
    pairs = await models(gateway, [{"prompt": p, "responses": ["a", "bb"]} for p in prompts])
    # Each agrees with the singles in 30 even draws once in 3^30 times.
    assert singles not in (by_policy, by_run, pairs)


async def test_responses_without_a_prompt_do_not_all_stick_together(gateway: Gateway) -> None:
    replies = [await gateway.client.ok("/reward", single("", f"text {r}")) for r in range(30)]
    assert not any("sticky" in reply for reply in replies)
    assert len({reply["model"] for reply in replies}) > 1


async def test_a_choice_sticks_for_as_long_as_it_is_told(valkey_server: ValkeyProcess) -> None:
    async with open_gateway(valkey_server.url, sticky_seconds=0.05) as gateway:
        await gateway.client.ok("/reward", single("p", "one"))
        await asyncio.sleep(0.1)
        assert "sticky" not in await gateway.client.ok("/reward", single("p", "two"))
    async with open_gateway(valkey_server.url, sticky_seconds=0) as gateway:
        replies = [await gateway.client.ok("/reward", single("p", f"{r}")) for r in range(30)]
        assert len({reply["model"] for reply in replies}) > 1
        assert gateway.decision(replies[0]["decision_id"]).sticky == ""


async def test_policies_with_nothing_to_choose_leave_no_choice_behind(gateway: Gateway) -> None:
    # One response alone has a scale only once a pair has shown one.
    await gateway.client.ok("/reward", {**pair(), "policy": "uwo"})
    for policy in ("single:rm-a", "majority", "uwo"):
        reply = await gateway.client.ok("/reward", {**single("p", "a"), "policy": policy})
        assert gateway.decision(reply["decision_id"]).sticky == ""


async def test_without_a_store_singles_are_answered_unstuck_where_that_is_allowed(
    own_valkey_server: ValkeyProcess,
) -> None:
    arms = [ScriptedArm("rm-a"), ScriptedArm("rm-b")]
    async with open_gateway(
        own_valkey_server.url, arms=arms, on_store_unavailable="answer", store_timeout_seconds=0.3
    ) as gateway:
        own_valkey_server.kill()
        reply = await gateway.client.ok("/reward", single("p", "a"))
        assert reply["recorded"] is False
        assert "sticky" not in reply


async def test_without_a_store_singles_are_refused_by_default(own_valkey_server: ValkeyProcess) -> None:
    async with open_gateway(own_valkey_server.url, store_timeout_seconds=0.3) as gateway:
        own_valkey_server.kill()
        response = await gateway.client.post("/reward", single("p", "a"))
        assert (response.status, response.error["code"]) == (503, "store_unavailable")


async def test_the_metric_counts_choices_made_and_followed(gateway: Gateway) -> None:
    for r in range(3):
        await gateway.client.ok("/reward", single("p", f"{r}"))
    metrics = (await gateway.client.get("/metrics")).body.decode()
    assert f'reward_router_sticky_choices_total{{outcome="followed",run="{gateway.run}"}} 2.0' in metrics
    assert f'reward_router_sticky_choices_total{{outcome="made",run="{gateway.run}"}} 1.0' in metrics

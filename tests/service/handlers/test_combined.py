"""`stacked` and `cascade:B` over HTTP: whom they ask, what they answer, what they leave in the log."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from router_core.combine import Answers
from service.lab.estimates import evaluate_log
from service.lab.eventlog.export import export_log
from service.lab.eventlog.load import load_log, logged_data
from service.lab.eventlog.targets import load_checkpoint
from service.stores.redis import RedisStore
from tests.support.gateway import Gateway, open_gateway, pair
from tests.support.votes import MODELS, OFFSETS, VOTES, checkpoint

if TYPE_CHECKING:
    from tests.conftest import ValkeyProcess


@pytest.fixture
async def gateway(valkey_server: ValkeyProcess, tmp_path: Path) -> AsyncIterator[Gateway]:
    """Three RMs with votes; all prefer the longer response."""
    path, encoder = checkpoint(tmp_path, VOTES)
    async with open_gateway(valkey_server.url, models=MODELS, encoder=encoder, checkpoint=path) as opened:
        yield opened


def right(*arms: int, against: tuple[int, ...] = ()) -> float:
    """Probability that the response is best which these RMs prefer, and `against` do not."""
    odds = sum(np.log(OFFSETS[k] / (1 - OFFSETS[k])) for k in arms)
    odds -= sum(np.log(OFFSETS[k] / (1 - OFFSETS[k])) for k in against)
    return float(1 / (1 + np.exp(-odds)))


async def asked(gateway: Gateway, index: int = 0, **more: Any) -> dict[str, Any]:
    """The reply to a pair."""
    reply: dict[str, Any] = await gateway.client.ok("/reward", {**pair(index), **more})
    return reply


async def test_stacked_asks_everyone_and_weighs_each_verdict_by_its_offset(gateway: Gateway) -> None:
    gateway.arm("rm-b").score_of = lambda _, response: -float(len(response))
    reply = await asked(gateway, policy="stacked")
    assert [attempt["model"] for attempt in reply["attempts"]] == list(MODELS)
    expected = right(0, 2, against=(1,))
    assert reply["rewards"] == pytest.approx([1 - expected, expected], abs=1e-4)
    assert (reply["preferred"], reply["price"], reply["propensity"]) == (1, 3.0, 1.0)
    assert reply["p_right"] == pytest.approx(expected, abs=1e-4)


async def test_an_rm_that_is_away_has_no_vote(gateway: Gateway) -> None:
    gateway.arm("rm-a").available = False
    reply = await asked(gateway, policy="stacked")
    assert reply["p_right"] == pytest.approx(right(1, 2), abs=1e-4)
    assert [attempt["outcome"] for attempt in reply["attempts"]] == ["away", "answered", "answered"]


async def test_a_single_call_says_how_probably_it_is_right(gateway: Gateway) -> None:
    for arm, name in enumerate(MODELS):
        reply = await asked(gateway, policy=f"single:{name}")
        assert reply["p_right"] == pytest.approx(right(arm), abs=1e-4)
        everything = Answers(np.array([[1] * 3]), np.arange(3)[None] == arm, np.full((1, 3), np.nan), np.array([2]))
        assert reply["p_right"] == pytest.approx(VOTES.probabilities(np.array([OFFSETS]), everything)[0, 1], abs=1e-4)
    gateway.arm("rm-a").score_of = lambda *_: 0.0
    assert (await asked(gateway, policy="single:rm-a"))["p_right"] == 0.5
    assert (await asked(gateway, policy="majority"))["p_right"] == pytest.approx(right(1, 2), abs=1e-4)


async def test_a_budget_of_one_is_one_call(gateway: Gateway) -> None:
    for index in range(20):
        reply = await asked(gateway, index, policy="cascade:1")
        assert [attempt["outcome"] for attempt in reply["attempts"]] == ["answered"]
        assert reply["model"] == reply["attempts"][0]["model"]


async def test_a_cascade_keeps_to_its_budget_and_logs_the_chance_of_each_call(gateway: Gateway) -> None:
    calls, multipliers = [], []
    for index in range(60):
        reply = await asked(gateway, index, policy="cascade:2")
        stored = gateway.decision(reply["decision_id"])
        calls.append(len(stored.attempts))
        multipliers.append(stored.multiplier)
        assert [attempt.turn for attempt in stored.attempts] == list(range(len(stored.attempts)))
        first, *further = stored.attempts
        assert first.chance == 1.0
        assert all(0 < attempt.chance <= 1 for attempt in further)
        chance = stored.propensities[first.arm] * np.prod([attempt.chance for attempt in further])
        assert stored.propensity == pytest.approx(chance, abs=2e-3)
        assert reply["price"] == len(stored.attempts)
    # ln μ moves by the rate times what an instance cost beyond the budget, so that overspending is bounded for ever.
    assert np.diff(np.log(multipliers)) == pytest.approx(0.05 * (np.array(calls[:-1]) - 2.0))
    assert len(set(calls)) > 1


async def test_more_calls_are_made_where_verdicts_disagree(valkey_server: ValkeyProcess, tmp_path: Path) -> None:
    path, encoder = checkpoint(tmp_path, VOTES)
    async with open_gateway(
        valkey_server.url, models=MODELS, encoder=encoder, checkpoint=path, run="cascade-of-a-seed", seed=0
    ) as gateway:
        gateway.arm("rm-b").score_of = lambda prompt, response: (-1.0 if "7" in prompt else 1.0) * len(response)
        replies = [await asked(gateway, index % 20, policy="cascade:2") for index in range(160)]
    split = [len(reply["attempts"]) for index, reply in enumerate(replies) if index % 20 in (7, 17)]
    assert np.mean(split) > np.mean([len(reply["attempts"]) for reply in replies])


async def test_the_ceiling_holds_whatever_the_budget(valkey_server: ValkeyProcess, tmp_path: Path) -> None:
    path, encoder = checkpoint(tmp_path, VOTES)
    async with open_gateway(
        valkey_server.url, models=MODELS, encoder=encoder, checkpoint=path, max_calls_per_instance=2
    ) as gateway:
        replies = [await asked(gateway, index, policy="cascade:3") for index in range(30)]
    assert max(len(reply["attempts"]) for reply in replies) == 2


async def test_feedback_on_a_cascade_teaches_everyone_who_was_asked(gateway: Gateway) -> None:
    for index in range(60):
        reply = await asked(gateway, index, policy="cascade:3")
        if len(reply["attempts"]) > 1:
            break
    heard = {attempt["model"] for attempt in reply["attempts"]}
    await gateway.client.ok("/feedback", {"decision_id": reply["decision_id"], "preferred": 1})
    learned = await gateway.learned(1)
    assert {model["model"] for model in learned["models"] if model["feedbacks"]} == heard


async def test_a_cascade_goes_on_past_an_rm_that_fails(gateway: Gateway) -> None:
    gateway.arm("rm-a").refuses = lambda _: True
    replies = [await asked(gateway, index, policy="cascade:2") for index in range(20)]
    assert all(reply["preferred"] == 1 for reply in replies)
    assert any(attempt["outcome"] == "failed" for reply in replies for attempt in reply["attempts"])


async def test_a_cascade_goes_on_past_an_rm_that_reads_a_part(gateway: Gateway) -> None:
    item = {"prompt": "p", "responses": ["a", "b" * 40, "ccc"], "policy": "cascade:1"}
    gateway.arm("rm-a").too_long = lambda response: len(response) > 20
    replies = [await gateway.client.ok("/reward", item) for _ in range(20)]
    assert any(reply["attempts"][0]["model"] == "rm-a" for reply in replies)
    assert {(*reply["valid"], reply["preferred"]) for reply in replies} == {(True, True, True, 1)}
    for arm in gateway.arms:
        arm.too_long = gateway.arm("rm-a").too_long
    (reply,) = [await gateway.client.ok("/reward", item)]
    assert (reply["valid"], reply["preferred"]) == ([True, False, True], 2)


async def test_one_response_is_asked_about_once_and_keeps_its_raw_reward(gateway: Gateway) -> None:
    for policy in ("stacked", "cascade:3"):
        reply = await gateway.client.ok("/reward", {"prompt": "p", "responses": ["four"], "policy": policy})
        assert reply["rewards"] == [4.0]
        assert len(reply["attempts"]) == 1
        assert reply["p_right"] is None


async def test_a_batch_of_cascades_is_asked_in_turns(gateway: Gateway) -> None:
    items = [pair(index) for index in range(30)]
    results = (await gateway.client.ok("/reward/batch", {"items": items, "policy": "cascade:3"}))["results"]
    assert max(len(result["attempts"]) for result in results) > 1
    # Each turn is one call per RM, however many instances it is of.
    assert max(len(arm.calls) for arm in gateway.arms) <= 3


async def test_without_learned_votes_the_policy_is_refused_with_the_remedy(
    valkey_server: ValkeyProcess, tmp_path: Path
) -> None:
    path, encoder = checkpoint(tmp_path, None)
    async with open_gateway(valkey_server.url, models=MODELS, encoder=encoder, checkpoint=path) as gateway:
        response = await gateway.client.post("/reward", {**pair(), "policy": "stacked"})
        assert response.status == 404
        assert "reward-router train" in response.json["error"]["message"]
        assert (await asked(gateway, policy="single:rm-a"))["p_right"] is None


async def test_a_log_of_cascades_says_what_each_rm_would_have_earned_alone(
    valkey_server: ValkeyProcess, tmp_path: Path
) -> None:
    path, encoder = checkpoint(tmp_path, VOTES)
    right: list[float] = []
    calls: list[int] = []
    async with open_gateway(
        valkey_server.url, models=MODELS, encoder=encoder, checkpoint=path, run="logged-cascades", seed=0
    ) as gateway:
        gateway.arm("rm-c").score_of = lambda _, response: -float(len(response))
        for index in range(80):
            reply = await asked(gateway, index, policy="cascade:2" if index % 2 else "stacked")
            if index % 2:
                right.append(float(reply["preferred"] == 1))
                calls.append(len(reply["attempts"]))
            await gateway.client.ok("/feedback", {"decision_id": reply["decision_id"], "preferred": 1})
        store = RedisStore(valkey_server.url, window_seconds=60)
        await export_log(store, gateway.run, tmp_path / "log.parquet")
        await store.close()
    log = load_log(tmp_path / "log.parquet")
    data = logged_data(log)
    # The first choices of the cascades; where everyone was asked there is none.
    assert len(data) == 40
    assert data.reward.tolist() == [float(arm != 2) for arm in data.arm.tolist()]
    values = evaluate_log(log, ["single:rm-a", "random"], None)["policies"]
    low, high = values["single:rm-a"]["snips"]["ci95"]
    assert low <= 1.0 <= high + 1e-9
    # What the cascades were, at the start.
    values = evaluate_log(log, ["cascade:2", "stacked"], load_checkpoint(path, log.header))["policies"]
    low, high = values["cascade:2"]["snips"]["ci95"]
    assert low <= np.mean(right) <= high
    assert values["cascade:2"]["calls"] == pytest.approx(np.mean(calls), abs=0.4)
    # Of asking everyone the cascades' decisions, half of the log, say nothing.
    assert values["stacked"]["problem"].startswith("50.0% of what the target would have asked")


async def test_an_opinion_that_comes_too_late_costs_nobody_the_first_answer(
    valkey_server: ValkeyProcess, tmp_path: Path
) -> None:
    path, encoder = checkpoint(tmp_path, VOTES)
    async with open_gateway(
        valkey_server.url, models=MODELS, encoder=encoder, checkpoint=path, request_timeout_seconds=0.3
    ) as gateway:
        gateway.arm("rm-b").gate = gateway.arm("rm-c").gate = asyncio.Event()
        for index in range(100):
            response = await gateway.client.post("/reward", {**pair(index), "policy": "cascade:3"})
            if response.status == 200 and len(response.json["attempts"]) > 1:
                break
    first, second = response.json["attempts"]
    assert (first["model"], first["outcome"]) == ("rm-a", "answered")
    assert (second["outcome"], second["reason"]) == ("failed", "worker_timeout")
    assert response.json["p_right"] == pytest.approx(right(0), abs=1e-4)

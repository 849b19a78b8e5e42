"""`normalize`: rewards on their RM's scale, folded from one log by every gateway to the same bits."""

from __future__ import annotations

import asyncio
import json
import math
import statistics
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import pytest
import redis

from router_core.moments import Moments, ScoreScales
from router_core.policies import ScoreScale
from service.stores.protocol import ScoreEntry
from service.usecases import normalise
from tests.support.arms import ScriptedArm
from tests.support.gateway import Gateway, fresh_run, open_gateway

if TYPE_CHECKING:
    from tests.conftest import ValkeyProcess


def scaled_arms() -> list[ScriptedArm]:
    """Two RMs that say the same on scales of their own."""
    return [
        ScriptedArm("rm-a", lambda _, response: float(len(response))),
        ScriptedArm("rm-b", lambda _, response: 1000.0 - 50.0 * len(response)),
    ]


@pytest.fixture
async def gateway(valkey_server: ValkeyProcess) -> AsyncIterator[Gateway]:
    """Two RMs."""
    async with open_gateway(valkey_server.url, arms=scaled_arms()) as opened:
        yield opened


def group(index: int, *lengths: int, model: str = "rm-a", **more: Any) -> dict[str, Any]:
    return {
        "prompt": f"prompt {index}",
        "responses": ["x" * n for n in lengths],
        "normalize": True,
        "policy": f"single:{model}",
        **more,
    }


@contextmanager
def raw(server: ValkeyProcess) -> Iterator[redis.Redis]:
    """The server, without any code of the store."""
    with redis.Redis.from_url(server.url) as client:
        yield client


async def test_a_normalised_reward_is_raw_minus_running_mean_over_running_sd(gateway: Gateway) -> None:
    seen: list[float] = []
    for index in range(6):
        lengths = (index + 1, 3 * index + 2)
        seen.extend(map(float, lengths))
        reply = await gateway.client.ok("/reward", group(index, *lengths))
        mean, sd = statistics.fmean(seen), statistics.pstdev(seen)
        assert reply["rewards"] == pytest.approx([(n - mean) / sd for n in lengths])
        assert reply["raw_rewards"] == list(map(float, lengths))
        assert reply["scale_version"] == index + 1


async def test_rms_of_different_scales_come_out_alike(gateway: Gateway) -> None:
    """Each on its own scale: the same responses in the same order of quality have z of the same size."""
    for model in ("rm-a", "rm-b"):
        for index in range(4):
            await gateway.client.ok("/reward", group(index, 1 + index, 9 - index, model=model))
    one = await gateway.client.ok("/reward", group(9, 2, 8, model="rm-a"))
    other = await gateway.client.ok("/reward", group(9, 2, 8, model="rm-b"))
    assert one["rewards"] == pytest.approx([-reward for reward in other["rewards"]])
    assert (one["preferred"], other["preferred"]) == (1, 0)
    assert one["margin"] == pytest.approx(other["margin"])


async def test_without_it_rewards_are_raw_and_the_reply_is_as_ever(gateway: Gateway) -> None:
    reply = await gateway.client.ok("/reward", {"prompt": "p", "responses": ["a", "bb"], "policy": "single:rm-a"})
    assert reply["rewards"] == [1.0, 2.0]
    assert not {"raw_rewards", "scale_version"} & set(reply)


async def test_a_first_single_is_null_never_a_false_zero(gateway: Gateway) -> None:
    reply = await gateway.client.ok("/reward", group(0, 5))
    assert (reply["rewards"], reply["raw_rewards"]) == ([None], [5.0])
    assert reply["margin"] is None
    assert (await gateway.client.ok("/reward", group(1, 7)))["rewards"] == [pytest.approx(1.0)]


async def test_an_rm_that_always_says_the_same_is_at_its_mean_once_that_is_known(gateway: Gateway) -> None:
    rewards = [(await gateway.client.ok("/reward", group(i, 5)))["rewards"][0] for i in range(6)]
    assert rewards == [None, None, None, 0.0, 0.0, 0.0]


async def test_what_a_checkpoint_knows_is_where_the_scale_begins(valkey_server: ValkeyProcess) -> None:
    scale = ScoreScale(np.array([10.0, 0.0]), np.array([2.0, 1.0]))
    async with open_gateway(valkey_server.url, arms=scaled_arms(), score_scale=scale) as gateway:
        (reward,) = (await gateway.client.ok("/reward", group(0, 10)))["rewards"]
        assert reward == pytest.approx(0.0, abs=1e-9)
        (reward,) = (await gateway.client.ok("/reward", group(1, 14)))["rewards"]
        assert 1.5 < reward < 2.0


async def test_a_batch_is_on_one_scale_and_one_entry(gateway: Gateway) -> None:
    items = [group(i, i + 1) for i in range(20)]
    results = (await gateway.client.ok("/reward/batch", {"items": items}))["results"]
    rewards = [result["rewards"][0] for result in results]
    assert np.mean(rewards) == pytest.approx(0.0)
    assert np.std(rewards) == pytest.approx(1.0)
    assert {result["scale_version"] for result in results} == {1}


async def test_a_batch_may_ask_for_some_of_its_items(gateway: Gateway) -> None:
    items = [group(0, 1, 2), {**group(1, 3, 4), "normalize": False}, {**group(2, 5, 6), "normalize": None}]
    results = (await gateway.client.ok("/reward/batch", {"items": items, "normalize": True}))["results"]
    assert ["raw_rewards" in result for result in results] == [True, False, True]
    assert results[1]["rewards"] == [3.0, 4.0]


async def test_a_setting_makes_it_the_default(valkey_server: ValkeyProcess) -> None:
    async with open_gateway(valkey_server.url, arms=scaled_arms(), normalize=True) as gateway:
        document = group(0, 1, 3)
        del document["normalize"]
        assert (await gateway.client.ok("/reward", document))["rewards"] == [-1.0, 1.0]
        assert (await gateway.client.ok("/reward", {**document, "normalize": False}))["rewards"] == [1.0, 3.0]


async def test_policies_that_ask_all_rms_are_left_as_they_are(gateway: Gateway) -> None:
    for policy in ("majority", "uwo"):
        reply = await gateway.client.ok("/reward", group(0, 1, 3, policy=policy))
        assert "raw_rewards" not in reply
        assert None not in reply["rewards"]


async def test_the_decision_keeps_what_the_rm_said(gateway: Gateway) -> None:
    reply = await gateway.client.ok("/reward", group(0, 1, 3))
    assert gateway.decision(reply["decision_id"]).rewards == [1.0, 3.0]


def refolded(server: ValkeyProcess, run: str) -> list[ScoreScales]:
    """The scale after each entry of the run's score log, folded in the test from what the server holds."""
    with raw(server) as client:
        entries: Any = client.xrange(f"rr:{{{run}}}:scores")
    states = [normalise.first_scales(2, None)]
    for entry_id, words in entries:
        entry = ScoreEntry(entry_id.decode(), words[b"m"])
        states.append(states[-1].observe(entry.entry_id, normalise.decode_entry(entry)))
    return states


async def test_every_reply_of_every_gateway_is_the_fold_of_one_log_bit_for_bit(valkey_server: ValkeyProcess) -> None:
    run = fresh_run()
    async with (
        open_gateway(valkey_server.url, arms=scaled_arms(), run=run) as first,
        open_gateway(valkey_server.url, arms=scaled_arms(), run=run) as second,
    ):
        requests = [
            gateway.client.ok("/reward", group(i, 1 + i % 7, 3 + i % 11, model=("rm-a", "rm-b")[i % 2]))
            for i in range(60)
            for gateway in (first, second)
        ]
        replies = await asyncio.gather(*requests)
    states = refolded(valkey_server, run)
    assert len(states) == 121
    for reply in replies:
        arm = ("rm-a", "rm-b").index(reply["model"])
        assert reply["rewards"] == states[reply["scale_version"]].arms[arm].normalise(reply["raw_rewards"])


async def test_absurd_scores_poison_no_scale(valkey_server: ValkeyProcess) -> None:
    """One from an RM, one in the log, one in a snapshot: each is passed over, and rewards are those of the others."""
    run = fresh_run()
    arms = [ScriptedArm("rm-a", lambda _, response: 1e300 if response == "absurd" else float(len(response)))]
    async with open_gateway(valkey_server.url, arms=arms, run=run) as gateway:
        await gateway.client.ok("/reward", group(0, 1, 3))
        absurd = {**group(1), "responses": ["absurd", "xxxxx"]}
        assert (await gateway.client.ok("/reward", absurd))["rewards"][0] is None
        poison = normalise.encode_entry([(0, Moments(2.0, 1e300, 1e305)), (7, Moments.of([1.0, 2.0]))])
        with raw(valkey_server) as client:
            (_, words), *_ = cast(Any, client.xrange(f"rr:{{{run}}}:scores"))
            client.xadd(f"rr:{{{run}}}:scores", {**words, b"m": poison})
        reply = await gateway.client.ok("/reward", group(2, 7))
        assert reply["rewards"] == [pytest.approx(3.0 / math.sqrt(5.0))]
        assert reply["scale_version"] == 4
    with raw(valkey_server) as client:
        last: Any = client.xrevrange(f"rr:{{{run}}}:scores", count=1)
        snapshot = ScoreScales(4, last[0][0].decode(), (Moments(9.0, 1e300, 1e305),))
        client.hset(f"rr:{{{run}}}:scale", mapping={"position": 4, "data": normalise.dump_scales(snapshot)})
    async with open_gateway(valkey_server.url, arms=arms, run=run) as gateway:
        reply = await gateway.client.ok("/reward", group(0, 1, 3))
    assert (reply["rewards"], reply["scale_version"]) == ([-1.0, 1.0], 5)


async def test_a_gateway_that_starts_later_goes_on_from_the_snapshot(valkey_server: ValkeyProcess) -> None:
    run = fresh_run()
    small = {"run": run, "block_size": 8, "refresh_events": 8}
    probe = group(0, 2, 9)
    async with open_gateway(valkey_server.url, arms=scaled_arms(), **small) as gateway:
        for index in range(30):
            await gateway.client.ok("/reward", group(index, 1 + index % 5, 4 + index % 3))
        before = await gateway.client.ok("/reward", probe)
        with raw(valkey_server) as client:
            snapshot: Any = client.hget(f"rr:{{{run}}}:scale", "data")
            assert json.loads(snapshot)["count"] == 24
            # What came before the last snapshot but one is gone.
            assert client.xlen(f"rr:{{{run}}}:scores") == 31 - 16 + 1
        async with open_gateway(valkey_server.url, arms=scaled_arms(), **small) as later:
            after = await later.client.ok("/reward", probe)
            once_more = await gateway.client.ok("/reward", probe)
    assert [r["scale_version"] for r in (before, after, once_more)] == [31, 32, 33]
    # One and the same log: the later gateway's reply lies between, and all of it is one sequence of folds.
    scales = normalise.parse_scales(snapshot)
    with raw(valkey_server) as client:
        rest: Any = client.xrange(f"rr:{{{run}}}:scores", min=f"({scales.last_id}")
    for entry_id, words in rest:
        entry = ScoreEntry(entry_id.decode(), words[b"m"])
        scales = scales.observe(entry.entry_id, normalise.decode_entry(entry))
        for reply in (before, after, once_more):
            if reply["scale_version"] == scales.count:
                assert reply["rewards"] == scales.arms[0].normalise(reply["raw_rewards"])
    assert scales.count == 33


async def test_a_gateway_that_missed_trimmed_entries_goes_on_from_the_snapshot(valkey_server: ValkeyProcess) -> None:
    small = {"run": fresh_run(), "block_size": 4, "refresh_events": 4}
    async with (
        open_gateway(valkey_server.url, arms=scaled_arms(), **small) as behind,
        open_gateway(valkey_server.url, arms=scaled_arms(), **small) as ahead,
    ):
        await behind.client.ok("/reward", group(0, 1, 2))
        for index in range(22):
            await ahead.client.ok("/reward", group(index, 1 + index % 5, 4 + index % 3))
        mine = await behind.client.ok("/reward", group(0, 1, 2))
        theirs = await ahead.client.ok("/reward", group(0, 1, 2))
        assert (mine["scale_version"], theirs["scale_version"]) == (24, 25)
        await behind.client.ok("/reward", group(0, 1, 2))
        await ahead.client.ok("/reward", group(0, 1, 2))
        # A gateway that only watches asks for what there is, and adds nothing of the other RM.
        shown = [(await gateway.client.get("/posterior")).json for gateway in (behind, ahead)]
        assert [document["scale_version"] for document in shown] == [26, 27]
        assert shown[0]["models"][0]["score_mean"] == pytest.approx(shown[1]["models"][0]["score_mean"], rel=0.05)
        assert shown[0]["models"][1]["score_mean"] is None


async def test_the_posterior_page_shows_the_scale(gateway: Gateway) -> None:
    before = (await gateway.client.get("/posterior")).json
    assert (before["scale_version"], before["models"][0]["score_sd"]) == (None, None)
    await gateway.client.ok("/reward", group(0, 1, 3))
    after = (await gateway.client.get("/posterior")).json
    assert after["scale_version"] == 1
    assert [(model["score_mean"], model["score_sd"]) for model in after["models"]] == [(2.0, 1.0), (None, None)]


async def test_many_at_once_share_exchanges_and_each_gets_its_reward(gateway: Gateway) -> None:
    replies = await asyncio.gather(*(gateway.client.ok("/reward", group(i, 1 + i, 2 + 2 * i)) for i in range(200)))
    assert len({tuple(reply["raw_rewards"]) for reply in replies}) == 200
    assert max(reply["scale_version"] for reply in replies) == 200
    assert all(None not in reply["rewards"] for reply in replies)


async def test_without_a_store_the_last_known_scale_is_used_where_that_is_allowed(
    own_valkey_server: ValkeyProcess,
) -> None:
    async with open_gateway(
        own_valkey_server.url, arms=scaled_arms(), on_store_unavailable="answer", store_timeout_seconds=0.3
    ) as gateway:
        await gateway.client.ok("/reward", group(0, 1, 3))
        own_valkey_server.kill()
        reply = await gateway.client.ok("/reward", group(1, 2))
        assert (reply["rewards"], reply["recorded"]) == ([0.0], False)


async def test_without_a_store_it_is_refused_by_default(own_valkey_server: ValkeyProcess) -> None:
    async with open_gateway(own_valkey_server.url, arms=scaled_arms(), store_timeout_seconds=0.3) as gateway:
        own_valkey_server.kill()
        response = await gateway.client.post("/reward", group(1, 2, 3))
        assert (response.status, response.error["code"]) == (503, "store_unavailable")


async def test_an_item_without_a_reward_has_null_and_its_error(gateway: Gateway) -> None:
    for arm in gateway.arms:
        arm.refuses = lambda text: text == "bad"
    items = [{"prompt": "p", "responses": ["a", "bb"]}, {"prompt": "p", "responses": ["bad"]}]
    good, bad = (await gateway.client.ok("/reward/batch", {"items": items}))["results"]
    assert good["rewards"] == [1.0, 2.0] or good["model"] == "rm-b"
    assert (bad["rewards"], bad["decision_id"], bad["error"]["code"]) == (None, None, "worker_rejected")

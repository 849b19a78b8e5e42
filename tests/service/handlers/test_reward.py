"""POST /reward and /reward/batch of the real application: what is asked, what is saved, what is answered."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Sequence
from statistics import NormalDist
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from service.scorers.protocol import WorkerProtocolError, WorkerTimeoutError, WorkerUnavailableError
from service.stores.protocol import DecisionRecord
from service.stores.redis import RedisStore
from tests.support.arms import ScriptedArm
from tests.support.gateway import DIM, Gateway, open_gateway, pair, read_decision, small_encoder, until
from tests.support.story import gone

if TYPE_CHECKING:
    from tests.conftest import ValkeyProcess


@pytest.fixture
async def gateway(valkey_server: ValkeyProcess) -> AsyncIterator[Gateway]:
    """Three RMs, nothing learned."""
    async with open_gateway(valkey_server.url) as opened:
        yield opened


def two_arm_propensity(means: Sequence[float], sds: Sequence[float], asked: int, other: int) -> float:
    """P(asked's draw is the larger of two independent Gaussians), in closed form."""
    return NormalDist().cdf((means[asked] - means[other]) / float(np.hypot(sds[asked], sds[other])))


async def teach(gateway: Gateway, model: str, *, right: bool, count: int) -> None:
    """Feedback that says the RM was right (or wrong) on `count` instances."""
    items = [{**pair(index), "policy": f"single:{model}"} for index in range(count)]
    results = (await gateway.client.ok("/reward/batch", {"items": items}))["results"]
    before = (await gateway.client.get("/posterior")).json["version"]
    feedback = [
        {
            "decision_id": result["decision_id"],
            "preferred": result["preferred"] if right else 1 - result["preferred"],
        }
        for result in results
    ]
    for answer in (await gateway.client.ok("/feedback/batch", {"items": feedback}))["results"]:
        assert answer["duplicate"] is False
    await gateway.learned(before + count)


async def test_a_reply_says_what_was_asked_and_what_came_back(gateway: Gateway) -> None:
    reply = await gateway.client.ok("/reward", pair())
    asked = gateway.arm(reply["model"])
    prompt, responses = pair()["prompt"], pair()["responses"]
    assert asked.calls == [[(prompt, responses[0]), (prompt, responses[1])]]
    assert all(not other.calls for other in gateway.others(reply["model"]))
    expected = [float(len(response)) for response in responses]
    (attempt,) = reply.pop("attempts")
    assert attempt.pop("ms") >= 0
    assert attempt == {
        "model": reply["model"], "outcome": "answered", "reason": None, "rewards": expected, "price": 1.0
    }  # fmt: skip
    assert {key: value for key, value in reply.items() if key not in ("decision_id", "model", "timings")} == {
        "run": gateway.run,
        "rewards": expected,
        "preferred": 1,
        "margin": expected[1] - expected[0],
        "propensity": pytest.approx(1 / 3, abs=1e-3),
        "p_right": None,
        "price": 1.0,
        "policy": "bayesian",
        "posterior_version": 0,
        "fallback": False,
        "recorded": True,
        "fallbacks": [],
        "components": {reply["model"]: expected},
        "valid": [True, True],
        "arm": [arm.name for arm in gateway.arms].index(reply["model"]),
    }
    assert set(reply["timings"]) == {"encode_ms", "draw_ms", "worker_ms", "store_ms", "total_ms"}
    assert all(value >= 0 for value in reply["timings"].values())


async def test_the_stored_decision_holds_what_the_fold_and_off_policy_evaluation_need(gateway: Gateway) -> None:
    reply = await gateway.client.ok("/reward", pair())
    stored = gateway.decision(reply["decision_id"])
    assert stored.n == 2
    assert [arm.name for arm in gateway.arms][stored.arm] == reply["model"]
    assert len(np.frombuffer(stored.x, "<f4")) == DIM
    assert np.linalg.norm(np.frombuffer(stored.x, "<f4")) == pytest.approx(1, abs=1e-5)
    assert stored.rewards == reply["rewards"]
    assert stored.propensity == reply["propensity"]
    assert stored.propensities[stored.arm] == reply["propensity"]
    assert sum(stored.propensities) == pytest.approx(1)
    assert len(stored.means) == len(stored.sds) == 3
    assert (stored.verdict, stored.policy, stored.version, stored.offsets) == (1, "bayesian", 0, [0.5] * 3)
    (attempt,) = stored.attempts
    assert (attempt.arm, attempt.outcome, attempt.rewards) == (stored.arm, "answered", stored.rewards)


class HeldStore(RedisStore):
    """A store whose saving can be held up between the moment it is asked and the moment it acknowledges."""

    def __init__(self, url: str) -> None:
        super().__init__(url, window_seconds=3600)
        self.asked = asyncio.Event()
        self.go_on = asyncio.Event()

    async def save_decisions(self, run: str, decisions: Sequence[DecisionRecord]) -> None:
        """Save once it may go on."""
        self.asked.set()
        await self.go_on.wait()
        await super().save_decisions(run, decisions)


async def test_no_reply_leaves_before_its_decision_is_saved(valkey_server: ValkeyProcess) -> None:
    store = HeldStore(valkey_server.url)
    async with open_gateway(valkey_server.url, store=store) as gateway:
        request = asyncio.create_task(gateway.client.ok("/reward", pair()))
        await store.asked.wait()
        for _ in range(20):
            await asyncio.sleep(0)
        assert not request.done()
        store.go_on.set()
        reply = await request
        assert read_decision(valkey_server.url, gateway.run, reply["decision_id"]) is not None


async def test_a_single_response_has_rewards_but_no_preference(gateway: Gateway) -> None:
    reply = await gateway.client.ok("/reward", {"prompt": "p", "responses": ["only"]})
    assert (reply["rewards"], reply["preferred"], reply["margin"]) == ([4.0], None, None)


async def test_equal_rewards_are_a_tie(gateway: Gateway) -> None:
    reply = await gateway.client.ok("/reward", {"prompt": "p", "responses": ["aaa", "bbb"]})
    assert (reply["preferred"], reply["margin"]) == (None, 0.0)


async def test_of_many_responses_the_margin_is_between_the_best_two(gateway: Gateway) -> None:
    reply = await gateway.client.ok("/reward", {"prompt": "p", "responses": ["a", "aaaaaa", "aa", "aaaa"]})
    assert (reply["rewards"], reply["preferred"], reply["margin"]) == ([1.0, 6.0, 2.0, 4.0], 1, 2.0)


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (WorkerUnavailableError("down"), "worker_unavailable"),
        (WorkerTimeoutError("slow"), "worker_timeout"),
        (WorkerProtocolError("NaN"), "worker_protocol"),
    ],
)
async def test_when_the_drawn_rm_fails_the_next_best_draw_is_asked_and_the_reply_says_so(
    valkey_server: ValkeyProcess, error: Any, reason: str
) -> None:
    async with open_gateway(valkey_server.url, policy="bayesian") as gateway:
        await teach(gateway, "rm-a", right=True, count=24)
        await teach(gateway, "rm-b", right=False, count=12)
        for arm in gateway.arms:
            arm.calls.clear()
        gateway.arm("rm-a").error = error
        replies = [await gateway.client.ok("/reward", pair(100 + index)) for index in range(12)]
        passed_on = [reply for reply in replies if reply["fallback"]]
        assert passed_on, "rm-a has learned to be the best, so most instances draw it first"
        for reply in passed_on:
            assert reply["fallbacks"] == [{"model": "rm-a", "reason": reason}]
            assert reply["model"] != "rm-a"
            stored = gateway.decision(reply["decision_id"])
            assert gone(stored) == [0]
            other = 3 - stored.arm
            expected = two_arm_propensity(stored.means, stored.sds, stored.arm, other)
            assert reply["propensity"] == pytest.approx(expected, abs=1e-3)
            assert abs(reply["propensity"] - stored.propensities[stored.arm]) > 0.05
        assert len(gateway.arm("rm-a").calls) == len(passed_on)


async def test_an_rm_that_is_away_is_passed_over_without_a_call(gateway: Gateway) -> None:
    gateway.arm("rm-b").available = False
    replies = [await gateway.client.ok("/reward", pair(index)) for index in range(16)]
    assert not gateway.arm("rm-b").calls
    assert {reply["model"] for reply in replies} == {"rm-a", "rm-c"}
    drawn = [reply for reply in replies if reply["fallback"]]
    assert drawn
    assert all(reply["fallbacks"] == [{"model": "rm-b", "reason": "worker_unavailable"}] for reply in drawn)
    for reply in replies:
        stored = gateway.decision(reply["decision_id"])
        expected = two_arm_propensity(stored.means, stored.sds, stored.arm, 2 - stored.arm)
        assert reply["propensity"] == pytest.approx(expected, abs=1e-3)


async def test_a_slow_rm_is_left_at_its_deadline_for_the_next_best_draw(valkey_server: ValkeyProcess) -> None:
    async with open_gateway(valkey_server.url, worker_timeout_seconds=0.05) as gateway:
        for arm in gateway.arms[:2]:
            arm.gate = asyncio.Event()
        replies = [await gateway.client.ok("/reward", pair(index)) for index in range(6)]
        assert {reply["model"] for reply in replies} == {"rm-c"}
        fallbacks = [fallback for reply in replies for fallback in reply["fallbacks"]]
        assert fallbacks
        assert {fallback["reason"] for fallback in fallbacks} == {"worker_timeout"}
        twice = [reply for reply in replies if len(reply["fallbacks"]) == 2]
        assert all(reply["propensity"] == 1.0 for reply in twice)


async def test_an_input_that_every_rm_refuses_is_422_in_the_workers_words(gateway: Gateway) -> None:
    for arm in gateway.arms:
        arm.refuses = lambda text: "too long" in text
    error = (await gateway.client.post("/reward", {"prompt": "p", "responses": ["too long", "b"]})).error
    assert error["code"] == "worker_rejected"
    assert "the text is too long for the model" in error["message"]
    assert sorted(tried["model"] for tried in error["details"]["tried"]) == ["rm-a", "rm-b", "rm-c"]
    assert (await gateway.client.post("/reward", {"prompt": "p", "responses": ["too long", "b"]})).status == 422


async def test_refusals_mixed_with_failures_are_not_blamed_on_the_input(gateway: Gateway) -> None:
    gateway.arm("rm-a").refuses = lambda _: True
    gateway.arm("rm-b").error = WorkerUnavailableError("down")
    gateway.arm("rm-c").available = False
    response = await gateway.client.post("/reward", pair())
    assert response.status == 503
    assert response.error["code"] == "no_worker"


async def test_all_rms_away_is_503_with_retry_after_and_no_reward(gateway: Gateway) -> None:
    for arm in gateway.arms:
        arm.available = False
    response = await gateway.client.post("/reward", pair())
    assert (response.status, response.error["code"], response.headers["retry-after"]) == (503, "no_worker", "1")
    assert "rewards" not in response.body.decode()
    assert not any(arm.calls for arm in gateway.arms)


async def test_single_has_no_fallback(gateway: Gateway) -> None:
    assert (await gateway.client.ok("/reward", {**pair(), "policy": "single:rm-b"}))["model"] == "rm-b"
    gateway.arm("rm-b").error = WorkerUnavailableError("down")
    response = await gateway.client.post("/reward", {**pair(), "policy": "single:rm-b"})
    assert (response.status, response.error["code"]) == (503, "no_worker")
    assert response.error["details"]["tried"] == [{"model": "rm-b", "reason": "worker_unavailable"}]
    assert not any(arm.calls for arm in gateway.others("rm-b"))


async def test_a_single_rm_that_refuses_is_422(gateway: Gateway) -> None:
    gateway.arm("rm-b").refuses = lambda _: True
    response = await gateway.client.post("/reward", {**pair(), "policy": "single:rm-b"})
    assert (response.status, response.error["code"]) == (422, "worker_rejected")


async def test_majority_asks_every_rm_and_counts_their_votes(gateway: Gateway) -> None:
    gateway.arm("rm-a").score_of = lambda _, response: -float(len(response))
    reply = await gateway.client.ok("/reward", {**pair(), "policy": "majority"})
    assert all(len(arm.calls) == 1 for arm in gateway.arms)
    assert reply["rewards"] == pytest.approx([1 / 3, 2 / 3])
    assert (reply["model"], reply["preferred"], reply["propensity"], reply["fallback"]) == ("majority", 1, 1.0, False)


async def test_majority_goes_on_with_the_votes_of_those_that_answer(gateway: Gateway) -> None:
    gateway.arm("rm-a").error = WorkerTimeoutError("slow")
    gateway.arm("rm-b").available = False
    reply = await gateway.client.ok("/reward", {**pair(), "policy": "majority"})
    assert reply["rewards"] == [0.0, 1.0]
    assert sorted((fallback["model"], fallback["reason"]) for fallback in reply["fallbacks"]) == [
        ("rm-a", "worker_timeout"),
        ("rm-b", "worker_unavailable"),
    ]
    gateway.arm("rm-c").available = False
    assert (await gateway.client.post("/reward", {**pair(), "policy": "majority"})).status == 503


async def test_random_draws_every_rm_alike(gateway: Gateway) -> None:
    items = [{**pair(index), "policy": "random"} for index in range(300)]
    results = (await gateway.client.ok("/reward/batch", {"items": items}))["results"]
    counts = [sum(result["model"] == arm.name for result in results) for arm in gateway.arms]
    # 300 draws at 1/3 have a standard deviation of 8.2; five of them are 41.
    assert all(abs(count - 100) < 41 for count in counts), counts
    assert all(result["propensity"] == pytest.approx(1 / 3, abs=1e-3) for result in results)


async def test_offline_ignores_what_was_learned(gateway: Gateway) -> None:
    await teach(gateway, "rm-a", right=True, count=12)
    reply = await gateway.client.ok("/reward", {**pair(), "policy": "offline"})
    stored = gateway.decision(reply["decision_id"])
    assert stored.means == [0.5, 0.5, 0.5]
    assert stored.sds == [0.0, 0.0, 0.0]


async def test_a_batch_keeps_order_and_calls_each_rm_once(gateway: Gateway) -> None:
    results = (await gateway.client.ok("/reward/batch", {"items": [pair(index) for index in range(40)]}))["results"]
    for index, result in enumerate(results):
        assert result["rewards"] == [float(len(response)) for response in pair(index)["responses"]]
    assert [len(arm.calls) for arm in gateway.arms] == [1, 1, 1]
    assert sum(len(arm.calls[0]) for arm in gateway.arms) == 80
    for arm in gateway.arms:
        prompts = [pair(index)["prompt"] for index, result in enumerate(results) if result["model"] == arm.name]
        assert [prompt for prompt, _ in arm.calls[0][::2]] == prompts
    assert len({result["decision_id"] for result in results}) == 40
    assert all(gateway.decision(result["decision_id"]).n == 2 for result in results)


async def test_what_the_rms_refuse_in_a_batch_spoils_no_other_item(gateway: Gateway) -> None:
    for arm in gateway.arms:
        arm.refuses = lambda text: "POISON" in text
    items = [pair(index) for index in range(15)]
    items[6] = {"prompt": "p", "responses": ["POISON", "b"]}
    results = (await gateway.client.ok("/reward/batch", {"items": items}))["results"]
    assert results[6]["error"]["code"] == "worker_rejected"
    for index, result in enumerate(results):
        if index != 6:
            assert result["rewards"] == [float(len(response)) for response in items[index]["responses"]]
            assert result["fallback"] is False


@pytest.mark.parametrize(
    ("bad", "status_code", "names"),
    [
        ({"prompt": "x" * 201, "responses": ["a", "b"]}, "validation", "items[2].prompt is 201 characters long"),
        ({"prompt": "p", "responses": ["a"] * 5}, "validation", "items[2].responses holds 5 texts"),
        ({"prompt": "p", "responses": ["a", "b"], "policy": "nonsense"}, "not_found", "nonsense"),
        ({"prompt": "p", "responses": ["a", "b"], "run": "with space"}, "validation", "with space"),
    ],
)
async def test_an_item_out_of_bounds_has_its_error_in_its_place(
    valkey_server: ValkeyProcess, bad: dict[str, Any], status_code: str, names: str
) -> None:
    async with open_gateway(valkey_server.url, max_text_chars=200, max_responses=4) as gateway:
        items = [pair(0), pair(1), bad, pair(3)]
        results = (await gateway.client.ok("/reward/batch", {"items": items}))["results"]
        assert results[2]["error"]["code"] == status_code
        assert names in results[2]["error"]["message"]
        assert [result["rewards"] is not None for result in results] == [True, True, False, True]


async def test_a_batch_may_mix_policies_and_runs(gateway: Gateway) -> None:
    other = gateway.run + "-other"
    items = [
        {**pair(0), "policy": "single:rm-c"},
        {**pair(1), "run": other, "policy": "majority"},
        {**pair(2), "policy": "single:rm-a", "run": other},
        pair(3),
    ]
    document = {"items": items, "policy": "single:rm-b"}
    results = (await gateway.client.ok("/reward/batch", document))["results"]
    assert [(result["run"], result["model"]) for result in results] == [
        (gateway.run, "rm-c"),
        (other, "majority"),
        (other, "rm-a"),
        (gateway.run, "rm-b"),
    ]


async def test_an_empty_batch_is_an_empty_answer(gateway: Gateway) -> None:
    assert await gateway.client.ok("/reward/batch", {"items": []}) == {"results": []}
    assert await gateway.client.ok("/feedback/batch", {"items": []}) == {"results": []}


async def test_requests_at_once_each_get_their_own_answer(gateway: Gateway) -> None:
    replies = await asyncio.gather(*(gateway.client.ok("/reward", pair(index)) for index in range(60)))
    for index, reply in enumerate(replies):
        assert reply["rewards"] == [float(len(response)) for response in pair(index)["responses"]]
    assert len({reply["decision_id"] for reply in replies}) == 60


async def test_a_caller_that_goes_away_while_it_waits_spoils_no_other(gateway: Gateway) -> None:
    for arm in gateway.arms:
        arm.gate = asyncio.Event()
    requests = [asyncio.create_task(gateway.client.ok("/reward", pair(index))) for index in range(6)]
    await until(lambda: sum(len(arm.calls) for arm in gateway.arms) == 6, "all are asked")
    requests[2].cancel()
    for arm in gateway.arms:
        assert arm.gate is not None
        arm.gate.set()
    done = await asyncio.gather(*requests, return_exceptions=True)
    assert isinstance(done[2], asyncio.CancelledError)
    assert sum(isinstance(reply, dict) for reply in done) == 5


async def test_a_broken_body_is_answered_to_nobody(gateway: Gateway) -> None:
    response = await gateway.client.request("POST", "/reward", b'{"prompt": ', disconnect=True)
    assert (response.status, response.body) == (499, b"")
    assert (await gateway.client.ok("/reward", pair()))["recorded"] is True


async def test_a_body_in_chunks_is_read_whole(gateway: Gateway) -> None:
    chunks = [b'{"prompt": "p", "resp', b'onses": ["a", ', b'"bcd"]}']
    response = await gateway.client.request("POST", "/reward", chunks)
    assert response.json["rewards"] == [1.0, 3.0]


async def test_the_seed_fixes_the_draws_and_the_run_tells_them_apart(valkey_server: ValkeyProcess) -> None:
    async def models(run: str) -> list[str]:
        async with open_gateway(valkey_server.url, seed=7) as gateway:
            return [(await gateway.client.ok("/reward", {**pair(i), "run": run}))["model"] for i in range(24)]

    suffix = str(time.time_ns())
    first = await models("seeded-a" + suffix)
    assert await models("seeded-a" + suffix) == first
    assert await models("seeded-b" + suffix) != first


async def test_an_rm_that_the_posterior_prefers_is_asked_more_often(gateway: Gateway) -> None:
    await teach(gateway, "rm-a", right=True, count=40)
    await teach(gateway, "rm-b", right=False, count=40)
    await teach(gateway, "rm-c", right=False, count=40)
    results = (await gateway.client.ok("/reward/batch", {"items": [pair(200 + i) for i in range(60)]}))["results"]
    assert sum(result["model"] == "rm-a" for result in results) > 45
    assert all(result["posterior_version"] == 120 for result in results)


async def test_texts_of_any_script_and_the_odd_control_character_pass(valkey_server: ValkeyProcess) -> None:
    arm = ScriptedArm("rm")
    async with open_gateway(valkey_server.url, arms=[arm], encoder=small_encoder()) as gateway:
        texts = ["Größe 𝒳 \U0001f600", "‮\u0000\u0001 \t\n", "", "漢字" * 100]
        reply = await gateway.client.ok("/reward", {"prompt": "\u0000", "responses": texts})
        assert reply["rewards"] == [float(len(text)) for text in texts]
        assert arm.calls[0] == [("\u0000", text) for text in texts]


async def test_a_majority_batch_is_one_call_per_rm(gateway: Gateway) -> None:
    items = [pair(i) for i in range(40)]
    results = (await gateway.client.ok("/reward/batch", {"items": items, "policy": "majority"}))["results"]
    assert [result["model"] for result in results] == ["majority"] * 40
    assert [len(arm.calls) for arm in gateway.arms] == [1, 1, 1]


async def test_arms_that_leave_while_another_scores_do_not_change_its_propensity(gateway: Gateway) -> None:
    drawn = gateway.arms[1]
    drawn.gate = asyncio.Event()

    async def reply() -> dict[str, Any]:
        for _ in range(50):
            found: dict[str, Any] = await gateway.client.ok("/reward", {**pair(), "policy": "random"})
            if found["model"] == drawn.name:
                return found
        raise AssertionError("never drawn")

    waiting = asyncio.create_task(reply())
    await until(lambda: drawn.calls, "the drawn RM is asked")
    for arm in gateway.others(drawn.name):
        arm.available = False
    drawn.gate.set()
    found = await waiting
    assert found["fallback"] is False
    assert found["propensity"] == pytest.approx(1 / 3, abs=1e-3)
    assert gone(gateway.decision(found["decision_id"])) == []


async def test_the_arms_out_of_the_race_stand_in_the_decision(gateway: Gateway) -> None:
    gateway.arms[0].available = False
    reply = await gateway.client.ok("/reward", {**pair(), "policy": "random"})
    assert gone(gateway.decision(reply["decision_id"])) == [0]
    assert reply["propensity"] == pytest.approx(0.5, abs=1e-3)


async def test_a_request_ends_at_its_deadline_whatever_holds_it_up(valkey_server: ValkeyProcess) -> None:
    limits = {"request_timeout_seconds": 0.4, "worker_timeout_seconds": 0.3}
    async with open_gateway(valkey_server.url, **limits) as gateway:
        for arm in gateway.arms:
            arm.gate = asyncio.Event()
        response = await gateway.client.post("/reward", pair())
        assert (response.status, response.error["code"]) == (503, "deadline_exceeded")
        assert "retry-after" in response.headers
        # The second RM got what the first one had left, and the third was not asked at all.
        assert sum(len(arm.calls) for arm in gateway.arms) == 2

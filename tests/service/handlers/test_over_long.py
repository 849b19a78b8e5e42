"""What becomes of instances that an RM cannot read whole, through the whole gateway, with RMs over HTTP."""

from __future__ import annotations

from contextlib import AbstractAsyncContextManager
from typing import Any

import pytest

pytest.importorskip("tokenizers")

from service.scorers.protocol import OverLong
from service.scorers.rm.client import ArmConfig, VllmArm
from tests.service.scorers.rm.test_tokens import byte_rendering
from tests.service.scorers.transport.test_load import steady
from tests.service.scorers.worker_servers import ScriptedWorker, Serve
from tests.support.arms import ScriptedArm
from tests.support.gateway import Gateway, open_gateway
from tests.support.story import away_first, failed

LONG = {"prompt": "p" * 250, "responses": ["a", "bb"]}
SHORT = {"prompt": "p", "responses": ["a", "bb"]}


def gateway_of(
    serve: Serve,
    valkey_url: str,
    over_long: OverLong,
    *others: ScriptedArm,
    **limits: int,
) -> AbstractAsyncContextManager[Gateway]:
    """A gateway whose RMs read so many tokens."""
    arms: list[Any] = [*others]
    for name, limit in limits.items():
        worker = ScriptedWorker(name)
        worker.answer = steady
        config = ArmConfig(
            name=name,
            urls=(serve(worker),),
            rendering=byte_rendering(),
            max_model_len=limit,
            over_long=over_long,
        )
        arms.append(VllmArm(config))
    return open_gateway(valkey_url, arms=arms)


async def rewards_of(gateway: Gateway, *items: dict[str, Any], **more: Any) -> list[dict[str, Any]]:
    response = await gateway.client.post("/reward/batch", {"items": list(items), **more})
    assert response.status == 200, response.body
    results: list[dict[str, Any]] = response.json["results"]
    return results


async def test_who_cannot_read_a_text_is_not_drawn(serve: Serve, valkey_url: str) -> None:
    async with gateway_of(serve, valkey_url, OverLong.SKIP, small=60, large=500) as gateway:
        results = await rewards_of(gateway, *[LONG, SHORT] * 12)
        assert {result["model"] for result in results[0::2]} == {"large"}
        assert {result["propensity"] for result in results[0::2]} == {1.0}
        assert {result["model"] for result in results[1::2]} == {"small", "large"}
        assert not any(result["fallback"] for result in results)
        assert not any("truncated" in result for result in results)
        (alone, fine) = await rewards_of(gateway, LONG, SHORT, policy="single:small")
        assert alone["error"]["code"] == "too_long"
        assert fine["model"] == "small"
        assert all(status["replicas"][0]["failures"] == 0 for status in (await gateway.client.get("/models")).json)


async def test_who_turns_out_not_to_read_a_text_abstains(serve: Serve, valkey_url: str) -> None:
    # Less than three characters per token: too short to be counted before the draw.
    item = {"prompt": "p" * 90, "responses": ["a", "bb"]}
    async with gateway_of(serve, valkey_url, OverLong.SKIP, small=60, large=500) as gateway:
        results = await rewards_of(gateway, *[item] * 24)
        assert {result["model"] for result in results} == {"large"}
        fell = [result for result in results if result["fallback"]]
        assert 0 < len(fell) < 24
        for result in fell:
            assert result["fallbacks"] == [{"model": "small", "reason": "too_long"}]
            assert [attempt["outcome"] for attempt in result["attempts"]] == ["abstained", "answered"]
            stored = gateway.decision(result["decision_id"])
            assert (failed(stored), away_first(stored), stored.propensity) == ([], [], 1.0)


async def test_one_response_too_long_leaves_the_others_their_rewards(serve: Serve, valkey_url: str) -> None:
    item = {"prompt": "p", "responses": ["a", "b" * 900, "c"]}
    async with gateway_of(serve, valkey_url, OverLong.SKIP, small=60, smaller=50) as gateway:
        results = await rewards_of(gateway, *[item] * 12)
        assert {result["model"] for result in results} == {"small", "smaller"}
        for result in results:
            assert result["rewards"] == [1.5, None, 1.5]
            assert result["valid"] == [True, False, True]
            assert result["failure"] == [None, "too_long", None]
            assert result["preferred"] is None
            assert [attempt["outcome"] for attempt in result["attempts"]] == ["answered", "answered"]
            assert len(result["fallbacks"]) == 1
            assert result["propensity"] == pytest.approx(0.5, abs=1e-3)
            assert gateway.decision(result["decision_id"]).verdict == -1
        for policy in ("sum", "min", "uwo", "majority", "single:small"):
            (told,) = await rewards_of(gateway, item, policy=policy)
            assert [reward is None for reward in told["rewards"]] == [False, True, False], policy
            assert told["failure"] == [None, "too_long", None]


async def test_the_rm_that_reads_most_responses_is_drawn(serve: Serve, valkey_url: str) -> None:
    item = {"prompt": "p", "responses": ["a", "b" * 900, "c" * 200]}
    async with gateway_of(serve, valkey_url, OverLong.SKIP, small=60, large=500) as gateway:
        results = await rewards_of(gateway, *[item] * 12)
        assert {result["model"] for result in results} == {"large"}
        assert {(*result["valid"],) for result in results} == {(True, False, True)}
        assert {result["propensity"] for result in results} == {1.0}


async def test_who_does_not_count_is_no_better_for_it(serve: Serve, valkey_url: str) -> None:
    group = {"prompt": "p", "responses": ["a", "b" * 900, "c"]}
    far = ScriptedArm("far")
    far.too_long = lambda _: True
    async with gateway_of(serve, valkey_url, OverLong.SKIP, far, small=60) as gateway:
        results = await rewards_of(gateway, *[group] * 24)
        assert {(result["model"], *result["valid"]) for result in results} == {("small", True, False, True)}
        assert {result["attempts"][0]["model"] for result in results} == {"small", "far"}
        # Who is known to read nothing is not drawn.
        far.too_long = lambda _: False
        assert {result["propensity"] for result in await rewards_of(gateway, *[LONG] * 8)} == {1.0}


async def test_a_part_too_long_leaves_a_sum_without_reward(serve: Serve, valkey_url: str) -> None:
    long = {"prompt": "p" * 300, "responses": ["a", "bb"]}
    async with gateway_of(serve, valkey_url, OverLong.SKIP, small=60, large=500) as gateway:
        for policy in ("sum", "min", "gate:large,small", "within:large,small"):
            (told,) = await rewards_of(gateway, long, policy=policy)
            assert told["rewards"] == [None, None], policy
            assert told["failure"] == ["too_long", "too_long"]
            assert told["components"] == {"large": [1.5, 1.5]}
        (vote,) = await rewards_of(gateway, long, policy="majority")
        assert vote["rewards"] == [0.5, 0.5]
        (nobody,) = await rewards_of(gateway, long, policy="sum:small")
        assert nobody["error"]["code"] == "too_long"


async def test_refuse_is_an_error_of_its_instance_and_asks_nobody_else(
    serve: Serve,
    valkey_url: str,
) -> None:
    async with gateway_of(serve, valkey_url, OverLong.REFUSE, small=60, smaller=50) as gateway:
        long, short = await rewards_of(gateway, LONG, SHORT)
        assert long["error"]["code"] == "too_long"
        assert short["rewards"] == [1.5, 1.5]
        response = await gateway.client.post("/reward", LONG)
        assert (response.status, response.json["error"]["code"]) == (422, "too_long")
        (vote,) = await rewards_of(gateway, LONG, policy="majority")
        assert vote["error"]["code"] == "too_long"
        (group,) = await rewards_of(gateway, {"prompt": "p", "responses": ["a", "b" * 900]})
        assert group["error"]["code"] == "too_long"


async def test_cut_prompt_says_how_much_was_cut(serve: Serve, valkey_url: str) -> None:
    async with gateway_of(serve, valkey_url, OverLong.CUT_PROMPT, small=60) as gateway:
        items = [LONG, SHORT, {"prompt": "p", "responses": ["a", "b" * 99]}, {"prompt": "p", "responses": ["b" * 99]}]
        long, short, group, response = await rewards_of(gateway, *items)
        # One token a byte, and one for each of <s>, </s> and </s>.
        assert long["truncated"] == {"prompt_tokens_cut": len("<user>" + "p" * 250 + "<assistant>bb") + 3 - 60}
        assert long["rewards"] == [1.5, 1.5]
        assert "truncated" not in short
        cut = [gateway.decision(result["decision_id"]).attempts[0].prompt_tokens_cut for result in (long, short)]
        assert cut == [long["truncated"]["prompt_tokens_cut"], 0]
        assert group["failure"] == [None, "too_long"]
        assert response["error"]["code"] == "too_long"
        assert "never cut" in response["error"]["message"]

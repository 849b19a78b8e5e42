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
from tests.support.gateway import Gateway, open_gateway
from tests.support.story import away_first, failed

LONG = {"prompt": "p" * 100, "responses": ["a", "bb"]}
SHORT = {"prompt": "p", "responses": ["a", "bb"]}


def gateway_of(
    serve: Serve,
    valkey_url: str,
    over_long: OverLong,
    **limits: int,
) -> AbstractAsyncContextManager[Gateway]:
    """A gateway whose RMs read so many tokens."""
    arms: list[Any] = []
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


async def test_skip_asks_an_rm_that_reads_more_and_leaves_the_rest_of_the_batch_alone(
    serve: Serve,
    valkey_url: str,
) -> None:
    async with gateway_of(serve, valkey_url, OverLong.SKIP, small=60, large=500) as gateway:
        results = await rewards_of(gateway, *[LONG, SHORT] * 12)
        assert {result["model"] for result in results[0::2]} == {"large"}
        assert {result["model"] for result in results[1::2]} == {"small", "large"}
        reasons = [fallback for result in results for fallback in result["fallbacks"]]
        assert reasons
        assert all(reason == {"model": "small", "reason": "worker_too_long"} for reason in reasons)
        # The log tells an RM that could not read the text from one that was away.
        stored = [(gateway.decision(result["decision_id"]), result["fallback"]) for result in results]
        assert all((failed(one), away_first(one)) == ([0] if fell else [], []) for one, fell in stored)
        assert not any("truncated" in result for result in results)
        (alone, fine) = await rewards_of(gateway, LONG, SHORT, policy="single:small")
        assert alone["error"]["code"] == "worker_too_long"
        assert fine["model"] == "small"


async def test_refuse_is_an_error_of_its_instance_and_asks_nobody_else(
    serve: Serve,
    valkey_url: str,
) -> None:
    async with gateway_of(serve, valkey_url, OverLong.REFUSE, small=60, smaller=50) as gateway:
        long, short = await rewards_of(gateway, LONG, SHORT)
        assert long["error"]["code"] == "worker_too_long"
        assert short["rewards"] == [1.5, 1.5]
        response = await gateway.client.post("/reward", LONG)
        assert (response.status, response.json["error"]["code"]) == (422, "worker_too_long")
        (vote,) = await rewards_of(gateway, LONG, policy="majority")
        assert vote["error"]["code"] == "worker_too_long"


async def test_cut_prompt_says_how_much_was_cut(serve: Serve, valkey_url: str) -> None:
    async with gateway_of(serve, valkey_url, OverLong.CUT_PROMPT, small=60) as gateway:
        long, short, response = await rewards_of(gateway, LONG, SHORT, {"prompt": "p", "responses": ["a", "b" * 99]})
        # One token a byte, and one for each of <s>, </s> and </s>.
        assert long["truncated"] == {"prompt_tokens_cut": len("<user>" + "p" * 100 + "<assistant>bb") + 3 - 60}
        assert long["rewards"] == [1.5, 1.5]
        assert "truncated" not in short
        cut = [gateway.decision(result["decision_id"]).attempts[0].prompt_tokens_cut for result in (long, short)]
        assert cut == [long["truncated"]["prompt_tokens_cut"], 0]
        assert response["error"]["code"] == "worker_too_long"
        assert "never cut" in response["error"]["message"]

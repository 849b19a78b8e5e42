"""A judge in the pool of a running gateway: rewards, status and metrics."""

from __future__ import annotations

import math
from typing import Any

from service.scorers.judge.entry import JudgeEntry
from service.scorers.protocol import Scorer
from service.scorers.registry import build_scorer
from service.settings import Settings
from tests.conftest import ValkeyProcess
from tests.service.scorers.judge_server import ScriptedJudge, completion
from tests.service.scorers.worker_servers import Serve
from tests.support.arms import ScriptedArm
from tests.support.gateway import open_gateway, pair


def pool_with(url: str, **fields: Any) -> list[Any]:
    """A reward model and a judge."""
    entry = JudgeEntry(name="judge", kind="judge", urls=(url,), model="judge-model", **fields)
    judge: Scorer = build_scorer(entry, Settings(seed=0, health_interval_seconds=0.05), None)  # type: ignore[arg-type]
    return [ScriptedArm("rm"), judge]


async def test_a_judge_is_an_arm(valkey_server: ValkeyProcess, serve: Serve) -> None:
    server = ScriptedJudge()
    server.quality = lambda text: 2.0 if text == "good" else 1.0
    server.bias = 0.5
    async with open_gateway(valkey_server.url, arms=pool_with(serve(server))) as gateway:
        body = {"prompt": "p", "responses": ["bad answer", "good"], "policy": "single:judge"}
        reply = await gateway.client.ok("/reward", body)
        assert (reply["model"], reply["preferred"]) == ("judge", 1)
        p = (1 / (1 + math.exp(-1.5)) + 1 - 1 / (1 + math.exp(0.5))) / 2
        assert math.isclose(reply["rewards"][1] - reply["rewards"][0], math.log(p / (1 - p)), rel_tol=1e-6)
        (status,) = [one for one in (await gateway.client.get("/models")).json if one["name"] == "judge"]
        assert status["judging"]["comparisons"] == 1
        metrics = (await gateway.client.get("/metrics")).body.decode()
    bias = ((1 / (1 + math.exp(-1.5)) + 1 / (1 + math.exp(0.5))) / 2) - 0.5
    assert status["judging"]["position_bias"] == bias
    assert f'reward_router_judge_position_bias{{model="judge"}} {bias}' in metrics
    assert 'reward_router_judge_consistency{model="judge"} 1.0' in metrics


async def test_a_verdict_that_cannot_be_read_goes_on_to_the_next(valkey_server: ValkeyProcess, serve: Serve) -> None:
    server = ScriptedJudge()
    arms = pool_with(serve(server))
    async with open_gateway(valkey_server.url, arms=arms) as gateway:
        server.answer = lambda request: (200, completion("Hm.", {"Hm": 1.0}))
        reply = await gateway.client.ok("/reward", {**pair(), "policy": "majority"})
        outcomes = {one["model"]: (one["outcome"], one["reason"]) for one in reply["attempts"]}
        assert outcomes["judge"] == ("failed", "verdict_unreadable")
        refused = await gateway.client.post("/reward", {**pair(), "policy": "single:judge"})
        assert refused.status == 422
        assert refused.json["error"]["code"] == "worker_rejected"


async def test_a_rubric_s_reference_decides_who_is_drawn(valkey_server: ValkeyProcess, serve: Serve) -> None:
    server = ScriptedJudge()
    arms = pool_with(serve(server), rubric="correctness")
    async with open_gateway(valkey_server.url, arms=arms) as gateway:
        for index in range(8):
            reply = await gateway.client.ok("/reward", {**pair(index), "policy": "random"})
            assert (reply["model"], reply["propensity"]) == ("rm", 1.0)
        referred = {**pair(), "reference": "5", "policy": "single:judge"}
        assert (await gateway.client.ok("/reward", referred))["model"] == "judge"

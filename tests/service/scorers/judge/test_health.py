"""What a judge's servers must show before they are asked, and afterwards."""

from __future__ import annotations

import asyncio
from typing import Any

import numpy as np
import pytest

from router_core.records import Instance
from service.scorers.health import HealthPolicy, ReplicaMonitor
from service.scorers.judge.client import JudgeConfig, JudgeScorer
from service.scorers.judge.dialogue import ChatOptions
from service.scorers.judge.health import JudgeChecks
from service.scorers.judge.rubrics import Rubric, load_rubric
from service.scorers.protocol import Scored
from tests.service.scorers.judge_server import ScriptedJudge, completion, is_probe
from tests.service.scorers.worker_servers import RunningWorker, Serve, soon, until

PAIR = Instance("p", ("aa", "a"))
POLICY = HealthPolicy(interval_seconds=0.02, timeout_seconds=2.0)


def judge_for(*urls: str, rubric: Rubric | None = None, **more: Any) -> JudgeScorer:
    config = JudgeConfig(
        name="j", urls=urls, options=ChatOptions("judge-model"), rubric=rubric or load_rubric("helpfulness"), **more
    )
    return JudgeScorer(
        config, monitor=lambda judge: ReplicaMonitor([JudgeChecks(judge)], POLICY, np.random.default_rng(0))
    )


async def test_a_judge_with_logprobs_is_asked_for_a_letter(serve: Serve) -> None:
    server = ScriptedJudge()
    judge = judge_for(serve(server))
    await judge.check()
    assert judge.available
    status = judge.status()
    assert status.judging is not None
    assert (status.judging.verdict, status.max_model_len) == ("logprobs", 4096)
    await judge.close()


async def test_a_judge_without_logprobs_is_asked_for_text(serve: Serve) -> None:
    server = ScriptedJudge()
    server.logprobs = False
    judge = judge_for(serve(server))
    await judge.check()
    assert judge.status().judging.verdict == "text"  # type: ignore[union-attr]
    (outcome,) = await judge.score([PAIR], deadline=soon())
    assert isinstance(outcome, Scored)
    assert outcome.rewards[0] > 0
    await judge.close()


@pytest.mark.parametrize("verdict", ["auto", "logprobs", "text"])
async def test_a_model_that_gives_no_verdict_is_not_asked(serve: Serve, verdict: Any) -> None:
    server = ScriptedJudge()
    server.answer = lambda request: (200, completion("Hello!", {"Hello": 1.0}))
    judge = judge_for(serve(server), verdict=verdict)
    await judge.check()
    assert not judge.available
    assert "no verdict on a known comparison" in str(judge.replicas[0].snapshot().problem)
    await judge.close()


async def test_a_server_of_another_model_is_not_asked(serve: Serve) -> None:
    server = ScriptedJudge("llama")
    judge = judge_for(serve(server))
    await judge.check()
    assert judge.replicas[0].snapshot().problem == "serves llama, not 'judge-model': check `model` in the pool file"
    assert not server.requests
    await judge.close()


async def test_a_server_that_lists_nothing_is_believed(serve: Serve) -> None:
    server = ScriptedJudge()
    server.models = (404, {"error": {"message": "not found"}})
    judge = judge_for(serve(server))
    await judge.check()
    assert judge.available
    await judge.close()


async def test_healthy_servers_cost_no_tokens(serve: Serve) -> None:
    server = ScriptedJudge()
    judge = judge_for(serve(server))
    await judge.check()
    asked = len(server.requests)
    seen = len(server.headers)
    judge.start()
    await until(lambda: len(server.headers) > seen + 3)
    assert len(server.requests) == asked
    await judge.close()


async def test_a_server_that_lists_and_fails_stays_out(serve: Serve) -> None:
    server = ScriptedJudge()
    judge = judge_for(serve(server))
    await judge.check()
    server.answer = lambda request: (500, {"error": {"message": "the engine is dead"}})
    judge.start()
    for _ in range(3):
        await judge.score([PAIR], deadline=soon())
    await until(lambda: not judge.available)
    asked = len(server.requests)
    await until(lambda: len(server.requests) > asked + 2)
    assert not judge.available
    server.answer = server.verdict
    await until(lambda: judge.available)
    await judge.close()


async def test_a_judge_comes_back_on_its_port() -> None:
    worker = RunningWorker(ScriptedJudge())
    port = int(worker.url.rpartition(":")[2])
    judge = judge_for(worker.url)
    await judge.check()
    judge.start()
    worker.stop()
    await asyncio.to_thread(worker.join)
    await until(lambda: not judge.available)
    again = RunningWorker(ScriptedJudge(), port)
    await until(lambda: judge.available)
    await judge.close()
    again.stop()
    await asyncio.to_thread(again.join)


async def test_a_judge_that_hangs_does_not_hold_up_the_start(serve: Serve) -> None:
    server = ScriptedJudge()
    server.delay = 30.0
    judge = judge_for(serve(server), answer_seconds=0.05)
    async with asyncio.timeout(1.5):
        await judge.check()
    assert not judge.available
    await judge.close()


async def test_a_rubric_of_real_metadata_is_probed_with_another(serve: Serve) -> None:
    server = ScriptedJudge()
    judge = judge_for(serve(server), rubric=Rubric("own", "Judge {{ metadata.what }}."))
    await judge.check()
    assert judge.available
    assert all(map(is_probe, server.requests))
    await judge.close()

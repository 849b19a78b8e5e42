"""AReaL's function, called as AReaL calls it: in a pool of processes, with a time limit."""

from __future__ import annotations

import asyncio
import multiprocessing
import os
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial

import pytest

from service.trainers.areal import DEADLINE_SECONDS, client_of, make_reward_fn, reward_fn
from service.trainers.options import ClientOptions, from_environment
from service.trainers.values import RouterUnavailableError
from tests.conftest import ValkeyProcess, free_port
from tests.support.gateway import fresh_run
from tests.support.live import LiveGateway, live_gateway
from tests.support.trainer_processes import opinionated_arms

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
    monkeypatch.setenv("REWARD_ROUTER_URL", gateway.url)
    monkeypatch.setenv("REWARD_ROUTER_RUN", fresh_run())
    monkeypatch.setenv("REWARD_ROUTER_POLICY", "single:rm-long")
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

"""ms-swift's function: alone, and under ms-swift's own code where `make trainer-clients` has fetched it."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

from service.trainers.ms_swift import PLUGIN, RouterORM, register
from service.trainers.options import ClientOptions
from service.trainers.rowwise import Judged, OnMissing, RowOptions, plan
from service.trainers.values import Feedback
from tests.conftest import ValkeyProcess, free_port
from tests.support.gateway import fresh_run
from tests.support.live import LiveGateway, live_gateway
from tests.support.rewards import scored
from tests.support.trainer_clients import client_folder
from tests.support.trainer_processes import opinionated_arms, result_of, run_module

ROWS = [
    [{"role": "user", "content": "a b c"}, {"role": "assistant", "content": "a b"}],
    [{"role": "user", "content": "a b c"}, {"role": "assistant", "content": "a b c d"}],
]


@pytest.fixture(scope="module")
def gateway(valkey_server: ValkeyProcess) -> Iterator[LiveGateway]:
    with live_gateway(valkey_server.url, arms=opinionated_arms()) as running:
        yield running


def test_each_step_may_have_an_event_loop_of_its_own_and_feedback_arrives(gateway: LiveGateway) -> None:
    run = fresh_run()

    def judge(judged: Judged) -> Feedback:
        assert judged.prompt == "a b c"
        assert judged.columns["solution"] == ("x", "y")
        return Feedback(preferred=1)

    options = ClientOptions(url=gateway.url, run=run, policy="single:rm-long")
    function = RouterORM(options=options, judge=judge)
    for step in range(3):
        rewards = asyncio.run(
            function(["a b", "a b c d"], messages=ROWS, solution=["x", "y"], trainer_state=object(), prompt_id=[0, 0])
        )
        assert rewards == [3.0, 7.0], step
    assert gateway.until(3, run)["version"] == 3


async def test_rollouts_of_several_turns_are_one_group(gateway: LiveGateway) -> None:
    ask, more = {"role": "user", "content": "a b c"}, {"role": "user", "content": "Sure?"}
    turns = [
        [ask, {"role": "assistant", "content": text}, more, {"role": "assistant", "content": "y"}] for text in "ab"
    ]
    run, before = fresh_run(), len(gateway.arms[0].calls)
    function = RouterORM(options=ClientOptions(url=gateway.url, run=run, policy="single:rm-long"))
    await function(["y", "y"], messages=turns, prompt_id=["p", "p"])
    [[(first, _), (second, _)]] = gateway.arms[0].calls[before:]
    assert first == second == "a b c"


async def test_rows_without_a_reward_are_none(caplog: pytest.LogCaptureFixture) -> None:
    function = RouterORM(options=ClientOptions(url=f"http://127.0.0.1:{free_port()}", deadline_seconds=0.3))
    assert await function(["a b", "a b c d"], messages=ROWS) == [None, None]
    assert "2 of 2 rewards are missing: unavailable" in caplog.text


def test_a_row_without_a_reward_takes_its_group_along(caplog: pytest.LogCaptureFixture) -> None:
    # ms-swift adds up with nansum: a lone None would be a 0 beside the rewards of its group.
    planned = plan(["p", "p", "q"], ["a", "b", "c"], RowOptions(on_missing=OnMissing.GROUP))
    assert planned.finish([scored(2.0, None, failure=[None, "verdict_unreadable"]), scored(5.0)]) == [None, None, 5.0]
    assert "1 of 3 rewards are missing: verdict_unreadable" in caplog.text


async def test_without_messages_there_is_no_prompt() -> None:
    with pytest.raises(ValueError, match="no messages"):
        await RouterORM(options=ClientOptions())(["a"])


def test_registering_adds_to_the_table(monkeypatch: pytest.MonkeyPatch) -> None:
    rewards = ModuleType("swift.rewards")
    rewards.orms = {}  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "swift", ModuleType("swift"))
    monkeypatch.setitem(sys.modules, "swift.rewards", rewards)
    register()
    register("judged", ClientOptions)
    assert rewards.orms == {"reward_router": RouterORM, "judged": ClientOptions}


def test_the_plugin_lies_where_it_hides_no_package() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "service.trainers.ms_swift"], capture_output=True, text=True, timeout=60, check=True
    )
    plugin = Path(done.stdout.strip())
    assert plugin == PLUGIN
    assert plugin.is_file()
    # ms-swift puts this folder first on sys.path.
    assert sorted(path.name for path in plugin.parent.glob("*.py")) == ["__init__.py", "reward_router_swift.py"]


@pytest.mark.slow
def test_ms_swifts_own_reward_computation_gets_the_rewards(gateway: LiveGateway) -> None:
    folder = client_folder("swift")
    environment = {"REWARD_ROUTER_CLIENT_URL": gateway.url, "REWARD_ROUTER_CLIENT_RUN": fresh_run()}
    environment["REWARD_ROUTER_CLIENT_POLICY"] = "single:rm-long"
    found = result_of(run_module("tests.support.swift_scoring", ["--clients", folder], environment))
    assert found == [[3.0, 7.0, 1.0, 5.0]] * 2

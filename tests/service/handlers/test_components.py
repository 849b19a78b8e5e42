"""Several rewards at once, kept apart, and responses that have none: in the reply, the store and the log."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from service.lab.eventlog.export import export_log, read_events
from service.scorers.protocol import Scored, WorkerTimeoutError
from service.stores.redis import RedisStore
from tests.conftest import ValkeyProcess
from tests.support.arms import ScriptedArm
from tests.support.gateway import open_gateway

THREE = {"prompt": "What is 7 + 5?", "responses": ["12", "about 13", "no"]}


class Partial(ScriptedArm):
    """Gives parts, and no reward to responses that say no."""

    def _scored(self, items: list[tuple[str, str]]) -> Scored:
        whole = super()._scored(items)
        bad = [response == "no" for _, response in items]
        rewards = [math.nan if no else reward for no, reward in zip(bad, whole.rewards, strict=True)]
        failures = tuple("rule_timeout" if no else "" for no in bad) if any(bad) else ()
        return Scored(rewards, 0, {"style": [2 * reward for reward in rewards]}, failures)


def arms() -> list[ScriptedArm]:
    return [Partial("rule"), ScriptedArm("rm")]


async def test_a_response_without_reward_is_null_and_says_why(valkey_server: ValkeyProcess) -> None:
    async with open_gateway(valkey_server.url, arms=arms()) as gateway:
        reply = await gateway.client.ok("/reward", {**THREE, "policy": "single:rule"})
        assert reply["rewards"] == [2.0, 8.0, None]
        assert reply["valid"] == [True, True, False]
        assert reply["failure"] == [None, None, "rule_timeout"]
        assert (reply["preferred"], reply["margin"]) == (1, 6.0)
        assert reply["components"] == {"rule": [2.0, 8.0, None], "rule.style": [4.0, 16.0, None]}
        (attempt,) = reply["attempts"]
        assert (attempt["outcome"], attempt["rewards"]) == ("answered", [2.0, 8.0, None])
        (stored,) = gateway.decision(reply["decision_id"]).attempts
        assert stored.failures == ["", "", "rule_timeout"]
        assert stored.components["style"][:2] == [4.0, 16.0]
        assert math.isnan(stored.rewards[2])


async def test_one_reward_of_two_is_no_preference(valkey_server: ValkeyProcess) -> None:
    async with open_gateway(valkey_server.url, arms=arms()) as gateway:
        body = {"prompt": "p", "responses": ["no", "yes"], "policy": "single:rule"}
        reply = await gateway.client.ok("/reward", body)
        assert reply["rewards"] == [None, 3.0]
        assert reply["preferred"] is None
        assert reply["margin"] is None


@pytest.mark.parametrize("policy", ["majority", "uwo"])
async def test_who_combines_judges_a_response_by_those_who_did(valkey_server: ValkeyProcess, policy: str) -> None:
    async with open_gateway(valkey_server.url, arms=arms()) as gateway:
        reply = await gateway.client.ok("/reward", {**THREE, "policy": policy})
        assert reply["valid"] == [True, True, True]
        assert reply["preferred"] == 1
        assert reply["components"] == {
            "rule": [2.0, 8.0, None], "rule.style": [4.0, 16.0, None], "rm": [2.0, 8.0, 2.0],
        }  # fmt: skip


async def test_normalised_rewards_keep_their_gaps(valkey_server: ValkeyProcess) -> None:
    async with open_gateway(valkey_server.url, arms=arms()) as gateway:
        body = {**THREE, "policy": "single:rule", "normalize": True}
        first, second, third = (await gateway.client.ok("/reward", body))["rewards"]
        assert third is None
        assert second > first


async def test_the_log_keeps_parts_and_gaps(valkey_server: ValkeyProcess, tmp_path: Path) -> None:
    async with open_gateway(valkey_server.url, arms=arms()) as gateway:
        reply = await gateway.client.ok("/reward", {**THREE, "policy": "single:rule"})
        stored = gateway.decision(reply["decision_id"])
        await gateway.client.ok("/feedback", {"decision_id": reply["decision_id"], "preferred": 1})
        store = RedisStore(valkey_server.url, window_seconds=60)
        for name in ("log.parquet", "log.jsonl"):
            await export_log(store, gateway.run, tmp_path / name)
            (event,) = read_events(tmp_path / name)
            # NaN equals nothing: compared as text.
            assert repr(event.decision) == repr(stored)
        await store.close()


async def test_a_gate_is_final_and_a_missing_part_is_no_reward(valkey_server: ValkeyProcess) -> None:
    gate, rm = ScriptedArm("gate", lambda _, response: float("13" not in response)), ScriptedArm("rm")
    async with open_gateway(valkey_server.url, arms=[gate, rm]) as gateway:
        reply = await gateway.client.ok("/reward", {**THREE, "policy": "gate:gate,rm"})
        first, second, third = reply["rewards"]
        assert second == 0.0
        assert 0.5 < first == third < 1.0
        assert reply["model"] == "gate:gate,rm"
        assert (reply["propensity"], reply["price"]) == (1.0, 2.0)
        assert reply["components"] == {"gate": [1.0, 0.0, 1.0], "rm": [2.0, 8.0, 2.0]}
        nothing = {"prompt": "p", "responses": ["13", "1313"], "policy": "gate:gate,rm"}
        reply = await gateway.client.ok("/reward", nothing)
        assert (reply["rewards"], reply["preferred"], reply["price"]) == ([0.0, 0.0], None, 1.0)
        assert reply["components"] == {"gate": [0.0, 0.0]}
        gate.error = WorkerTimeoutError("late")
        reply = await gateway.client.ok("/reward", {**THREE, "policy": "sum:gate=10,rm=1"})
        assert reply["rewards"] == [None] * 3
        assert reply["failure"] == ["worker_timeout"] * 3
        assert reply["preferred"] is None
        assert reply["components"] == {"rm": [2.0, 8.0, 2.0]}
        status = (await gateway.client.post("/reward", {**THREE, "policy": "gate:rm"})).status
        assert status == 404


async def test_a_preference_for_a_response_without_reward_teaches_nothing(valkey_server: ValkeyProcess) -> None:
    async with open_gateway(valkey_server.url, arms=arms()) as gateway:
        for preferred in (2, 1):
            reply = await gateway.client.ok("/reward", {**THREE, "policy": "single:rule"})
            await gateway.client.ok("/feedback", {"decision_id": reply["decision_id"], "preferred": preferred})
        assert [event.credit for event in gateway.events()] == [None, 1.0]
        learned = await gateway.learned(2)
        assert learned["version"] == 2

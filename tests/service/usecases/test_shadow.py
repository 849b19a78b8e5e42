"""Shadowing through the real application: verdicts of the other RMs reach the log, or are dropped and counted."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Sequence
from typing import TYPE_CHECKING, Any

import pydantic
import pytest

from router_core.records import TIE, Instance
from service.errors import StoreUnavailableError
from service.scorers.protocol import WorkerUnavailableError
from service.settings import Settings
from service.stores.ids import new_decision_id
from service.stores.protocol import DecisionRecord
from service.stores.redis import RedisStore
from service.usecases import shadow
from service.usecases.shadow import is_shadowed
from tests.support.arms import ScriptedArm
from tests.support.gateway import Gateway, fresh_run, open_gateway, pair, until
from tests.support.story import shadowed

if TYPE_CHECKING:
    from tests.conftest import ValkeyProcess


@pytest.fixture
async def gateway(valkey_server: ValkeyProcess) -> AsyncIterator[Gateway]:
    """Three RMs, of which rm-c prefers the shorter response; every instance is shadowed."""
    async with open_gateway(valkey_server.url, shadow_rate=1.0) as opened:
        opened.arm("rm-c").score_of = lambda _, response: -float(len(response))
        yield opened


async def outcomes(gateway: Gateway) -> dict[str, float]:
    """Shadowed instances of the default run by what became of them."""
    text = (await gateway.client.get("/metrics")).body.decode()
    found = {}
    for line in text.splitlines():
        if line.startswith("reward_router_shadows_total{") and f'run="{gateway.run}"' in line:
            found[line.split('outcome="')[1].split('"')[0]] = float(line.rsplit(" ", 1)[1])
    return found


async def counted(gateway: Gateway, **expected: float) -> None:
    """Wait until exactly these outcomes are counted."""

    async def reached() -> bool:
        return await outcomes(gateway) == expected

    await until(reached, f"outcomes {expected}")


async def test_the_other_rms_are_asked_and_the_posterior_of_every_arm_moves(gateway: Gateway) -> None:
    reply = await gateway.client.ok("/reward", {**pair(), "policy": "single:rm-b"})
    await counted(gateway, recorded=1.0)
    assert [len(arm.calls) for arm in gateway.arms] == [1, 1, 1]
    stored = gateway.decision(reply["decision_id"])
    assert (stored.arm, stored.verdict) == (1, 1)
    assert shadowed(stored) == [(0, 1), (2, 0)]
    await gateway.client.ok("/feedback", {"decision_id": reply["decision_id"], "preferred": 1})
    learned = await gateway.learned(1)
    assert learned["version"] == 1
    assert [model["feedbacks"] for model in learned["models"]] == [1, 1, 1]
    assert [model["mean_reward"] for model in learned["models"]] == [1.0, 1.0, 0.0]
    assert all(model["mean_norm"] > 0 for model in learned["models"])
    assert learned["digest"] == gateway.folded().digest()


async def test_replicas_fold_the_same_log_to_the_same_bits_and_so_does_a_restart(
    valkey_server: ValkeyProcess,
) -> None:
    run, fold = fresh_run(), {"block_size": 4, "refresh_events": 8}
    async with (
        open_gateway(valkey_server.url, run=run, shadow_rate=0.6, **fold) as one,
        open_gateway(valkey_server.url, run=run, **fold) as two,
    ):
        one.arm("rm-c").score_of = lambda _, response: -float(len(response))
        expected = 0
        for start in range(0, 40, 5):
            items = [pair(index) for index in range(start, start + 5)]
            results = (await one.client.ok("/reward/batch", {"items": items}))["results"]
            ids = [result["decision_id"] for result in results]
            expected += sum(is_shadowed(decision_id, 0.6) for decision_id in ids)
            if expected:
                await counted(one, recorded=expected)
            feedback = [{"decision_id": i, "preferred": n % 2} for n, i in enumerate(ids)]
            await two.client.ok("/feedback/batch", {"items": feedback})
        first, second = await one.learned(40), await two.learned(40)
        assert first["digest"] == second["digest"] == one.folded().digest()
        events = one.events()
        assert 0 < sum(bool(event.shadows) for event in events) == expected < 40
    async with open_gateway(valkey_server.url, run=run, **fold) as three:
        assert (await three.learned(40))["digest"] == first["digest"]


async def test_a_reply_does_not_wait_for_the_shadow_and_feedback_that_comes_first_drops_it(gateway: Gateway) -> None:
    for arm in gateway.others("rm-a"):
        arm.gate = asyncio.Event()
    reply = await gateway.client.ok("/reward", {**pair(), "policy": "single:rm-a"})
    await until(lambda: gateway.arm("rm-b").calls, "shadow call")
    await gateway.client.ok("/feedback", {"decision_id": reply["decision_id"], "preferred": 1})
    for arm in gateway.others("rm-a"):
        assert arm.gate is not None
        arm.gate.set()
    await counted(gateway, late=1.0)
    learned = await gateway.learned(1)
    assert [model["feedbacks"] for model in learned["models"]] == [1, 0, 0]
    assert gateway.events()[0].shadows == ()
    assert learned["digest"] == gateway.folded().digest()


async def test_what_fails_in_the_shadow_costs_nobody_anything(gateway: Gateway) -> None:
    gateway.arm("rm-b").error = WorkerUnavailableError("down")
    gateway.arm("rm-c").available = False
    reply = await gateway.client.ok("/reward", {**pair(), "policy": "single:rm-a"})
    await counted(gateway, failed=1.0)
    assert shadowed(gateway.decision(reply["decision_id"])) == []
    gateway.arm("rm-c").available = True
    reply = await gateway.client.ok("/reward", {**pair(1), "policy": "single:rm-a"})
    await counted(gateway, failed=1.0, recorded=1.0)
    assert shadowed(gateway.decision(reply["decision_id"])) == [(2, 0)]
    text = (await gateway.client.get("/metrics")).body.decode()
    assert 'reward_router_shadow_calls_total{model="rm-b",outcome="worker_unavailable"} 2.0' in text
    assert 'reward_router_shadow_calls_total{model="rm-c",outcome="ok"} 1.0' in text
    assert 'reward_router_worker_calls_total{model="rm-a",outcome="ok"} 2.0' in text
    assert 'reward_router_worker_calls_total{model="rm-c",outcome="ok"} 0.0' in text


async def test_an_rm_that_failed_for_an_instance_is_not_asked_again_in_its_shadow(gateway: Gateway) -> None:
    gateway.arm("rm-a").refuses = lambda text: "5" in text
    reply = await gateway.client.ok("/reward", {**pair(), "policy": "random"})
    while not reply["fallback"]:
        reply = await gateway.client.ok("/reward", {**pair(), "policy": "random"})
    calls = len(gateway.arm("rm-a").calls)
    await until(lambda: gateway.decision(reply["decision_id"]).shadows, "shadowed")
    assert len(gateway.arm("rm-a").calls) == calls
    ((arm, _),) = shadowed(gateway.decision(reply["decision_id"]))
    assert arm != 0


async def test_a_tie_in_the_shadow_is_half_right(gateway: Gateway) -> None:
    gateway.arm("rm-b").score_of = lambda *_: 0.0
    reply = await gateway.client.ok("/reward", {**pair(), "policy": "single:rm-a"})
    await counted(gateway, recorded=1.0)
    assert shadowed(gateway.decision(reply["decision_id"]))[0] == (1, TIE)
    await gateway.client.ok("/feedback", {"decision_id": reply["decision_id"], "preferred": 0})
    models = (await gateway.learned(1))["models"]
    assert [model["mean_reward"] for model in models] == [0.0, 0.5, 1.0]


async def test_what_has_no_other_verdict_is_not_shadowed(gateway: Gateway) -> None:
    await gateway.client.ok("/reward", {**pair(), "policy": "majority"})
    await gateway.client.ok("/reward", {"prompt": "p", "responses": ["only"], "policy": "single:rm-a"})
    await gateway.client.ok("/reward", {**pair(), "policy": "single:rm-a"})
    await counted(gateway, recorded=1.0)


async def test_a_batch_is_shadowed_with_one_call_per_rm(gateway: Gateway) -> None:
    items = [{**pair(index), "policy": f"single:{gateway.arms[index % 3].name}"} for index in range(12)]
    results = (await gateway.client.ok("/reward/batch", {"items": items}))["results"]
    await counted(gateway, recorded=12.0)
    assert [len(arm.calls) for arm in gateway.arms] == [2, 2, 2]
    for index, result in enumerate(results):
        stored = gateway.decision(result["decision_id"])
        assert [arm for arm, _ in shadowed(stored)] == [arm for arm in range(3) if arm != index % 3]


async def test_more_than_there_is_room_for_is_skipped_and_counted(
    valkey_server: ValkeyProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shadow.Shadower.__init__, "__kwdefaults__", {"max_instances": 3})
    async with open_gateway(valkey_server.url, shadow_rate=1.0) as gateway:
        gate = gateway.arm("rm-c").gate = asyncio.Event()
        items = [{**pair(index), "policy": "single:rm-a"} for index in range(5)]
        await gateway.client.ok("/reward/batch", {"items": items})
        await gateway.client.ok("/reward", {**pair(), "policy": "single:rm-a"})
        await counted(gateway, skipped=3.0)
        assert "reward_router_shadows_in_flight 3.0" in (await gateway.client.get("/metrics")).body.decode()
        gate.set()
        await counted(gateway, skipped=3.0, recorded=3.0)
        await gateway.client.ok("/reward", {**pair(), "policy": "single:rm-a"})
        await counted(gateway, skipped=3.0, recorded=4.0)


async def test_shutdown_waits_for_what_is_under_way(valkey_server: ValkeyProcess) -> None:
    run = fresh_run()
    async with open_gateway(valkey_server.url, run=run, shadow_rate=1.0) as gateway:
        gate = gateway.arm("rm-c").gate = asyncio.Event()
        reply = await gateway.client.ok("/reward", {**pair(), "policy": "single:rm-a"})
        asyncio.get_running_loop().call_later(0.1, gate.set)
    assert [arm for arm, _ in shadowed(gateway.decision(reply["decision_id"]))] == [1, 2]


class ForgetfulStore(RedisStore):
    """A store that is away whenever a decision is to be updated."""

    async def update_decisions(self, run: str, decisions: Sequence[DecisionRecord]) -> list[bool]:
        """Never answers."""
        raise StoreUnavailableError("away")


async def test_a_store_that_is_away_loses_the_shadow_and_nothing_else(valkey_server: ValkeyProcess) -> None:
    store = ForgetfulStore(valkey_server.url, window_seconds=3600)
    async with open_gateway(valkey_server.url, shadow_rate=1.0, store=store) as gateway:
        reply = await gateway.client.ok("/reward", pair())
        await counted(gateway, failed=1.0)
        text = (await gateway.client.get("/metrics")).body.decode()
        assert 'reward_router_store_errors_total{operation="update_decisions"} 1.0' in text
        await gateway.client.ok("/feedback", {"decision_id": reply["decision_id"], "preferred": 0})
        await gateway.learned(1)


class BrokenArm(ScriptedArm):
    """An RM whose client has a fault of its own."""

    async def score(self, instances: Sequence[Instance], **_: Any) -> Any:
        """Fails in a way that no protocol foresees."""
        raise RuntimeError("a bug")


async def test_a_fault_in_the_shadow_is_counted_and_the_gateway_goes_on(valkey_server: ValkeyProcess) -> None:
    arms = [ScriptedArm("rm-a"), BrokenArm("rm-b")]
    async with open_gateway(valkey_server.url, shadow_rate=1.0, arms=arms) as gateway:
        await gateway.client.ok("/reward", {**pair(), "policy": "single:rm-a"})
        await counted(gateway, failed=1.0)
        assert (await gateway.client.get("/readyz")).status == 200


async def test_without_a_rate_nobody_is_asked_twice(valkey_server: ValkeyProcess) -> None:
    async with open_gateway(valkey_server.url) as gateway:
        for index in range(5):
            await gateway.client.ok("/reward", pair(index))
        await asyncio.sleep(0.05)
        assert sum(len(arm.calls) for arm in gateway.arms) == 5
        assert await outcomes(gateway) == {}


def test_the_fraction_is_the_rate_and_a_decision_stays_what_it_is() -> None:
    ids = [new_decision_id(1_700_000_000_000 + n, os.urandom(10)) for n in range(4000)]
    # A share of 0.3 among 4,000 has a standard error of 0.0072.
    assert abs(sum(is_shadowed(i, 0.3) for i in ids) / 4000 - 0.3) < 0.036
    assert all(is_shadowed(i, 0.5) for i in ids if is_shadowed(i, 0.3))
    assert all(is_shadowed(i, 1.0) for i in ids)
    assert not any(is_shadowed(i, 0.0) for i in ids)


@pytest.mark.parametrize("signal", ["loss", "reward"])
def test_a_signal_that_says_nothing_of_other_rms_is_refused_at_the_start(signal: str) -> None:
    with pytest.raises(pydantic.ValidationError, match=r"shadow_rate is 0\.1 and signal is"):
        Settings(shadow_rate=0.1, signal=signal)
    assert Settings(shadow_rate=0.0, signal=signal).shadow_rate == 0.0

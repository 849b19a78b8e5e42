"""What meets a change of the pool half-way: requests, audits, draws, snapshots, gateways that open the run later."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from concurrent.futures import Executor, Future
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import msgspec
import pytest

from service import gateway as parts
from service.errors import NotFoundError, ServiceError, StoreUnavailableError
from service.keys.access import EVERYTHING
from service.pool import PoolFile
from service.schemas import PoolRequest, RewardRequest
from service.settings import Settings
from service.stores.memory import MemoryStore
from service.stores.protocol import Store
from service.stores.redis import RedisStore
from service.usecases import watch
from service.usecases.decisions import encode_decision, event_of
from service.usecases.sticky import StickyChoice, sticky_key
from tests.service.scorers.worker_servers import ScriptedWorker
from tests.support.arms import ScriptedArm
from tests.support.gateway import fresh_run, open_gateway, pair, small_encoder, until

if TYPE_CHECKING:
    from tests.conftest import ValkeyProcess
    from tests.service.scorers.worker_servers import Serve

THREE = ("rm-a", "rm-b", "rm-c")
EVERY = {"referee": "rm-c", "rate": 1.0, "schedule": "even", "ask": "all", "keep": 10}


@pytest.fixture
def four(serve: Serve) -> list[dict[str, Any]]:
    """Entries of the three reward models and of a fourth, which is a real worker."""
    return [*({"name": name} for name in THREE), {"name": "rm-d", "urls": [serve(ScriptedWorker("rm-d"))]}]


@asynccontextmanager
async def open_parts(
    server_url: str, store: Store | None = None, audit: dict[str, Any] | None = None, **more: Any
) -> AsyncIterator[parts.Gateway]:
    """The parts of a gateway of three scripted reward models, started."""
    settings = Settings(store_url=server_url, run=fresh_run(), seed=0, new_run_wait_seconds=0, **more)
    pool = PoolFile.model_validate({"models": [{"name": name} for name in THREE], "audit": audit})
    arms = [ScriptedArm(name) for name in THREE]
    gateway = parts.build_gateway(settings, pool, encoder=small_encoder(), arms=arms, store=store)
    await gateway.start()
    try:
        yield gateway
    finally:
        await gateway.stop()


async def test_arms_newer_than_a_decision_are_not_asked_behind_it(
    valkey_server: ValkeyProcess, four: list[dict[str, Any]]
) -> None:
    async with open_gateway(valkey_server.url, shadow_rate=1.0) as gateway:
        first = gateway.arm("rm-a")
        first.gate = asyncio.Event()
        asked = asyncio.create_task(gateway.client.ok("/reward", {**pair(), "policy": "single:rm-a"}))
        await until(lambda: first.calls, "asked")
        await gateway.client.ok("/admin/pool", {"pool": {"models": four}})
        first.gate.set()
        decision_id = (await asked)["decision_id"]
        await until(lambda: gateway.decision(decision_id).shadows is not None, "shadowed")
        assert {answer.arm for answer in gateway.decision(decision_id).shadows or ()} == {1, 2}
        await gateway.client.ok("/feedback", {"decision_id": decision_id, "preferred": 1})
        await gateway.learned(2)


async def test_answers_of_newer_arms_in_a_log_teach_nothing(valkey_server: ValkeyProcess) -> None:
    async with open_gateway(valkey_server.url) as gateway:
        reply = await gateway.client.ok("/reward", {**pair(), "policy": "single:rm-a"})
        stored = gateway.decision(reply["decision_id"])
    late = msgspec.structs.replace(stored, shadows=[stored.attempts[0]._replace(arm=arm) for arm in (2, 3)])
    event = event_of("d", encode_decision(late), b"preference:1")
    assert (event.arm, [arm for arm, _, _ in event.shadows]) == (0, [2])


async def test_a_draw_of_an_unknown_pool_is_not_followed(valkey_server: ValkeyProcess) -> None:
    async with open_gateway(valkey_server.url, policy="random") as gateway:
        drawn = StickyChoice([3, 0, 1, 2], [0.5] * 4, [0.1] * 4, [0.25] * 4, 9, [])
        store = RedisStore(valkey_server.url, window_seconds=60)
        await store.stick(gateway.run, [(sticky_key("random", "p"), msgspec.msgpack.encode(drawn))], seconds=60.0)
        await store.close()
        reply = await gateway.client.ok("/reward", {"prompt": "p", "responses": ["r"]})
        assert reply["model"] in THREE
        assert "sticky" not in reply
        assert len(gateway.decision(reply["decision_id"]).propensities) == 3


async def test_singles_after_audits_have_no_probability(valkey_server: ValkeyProcess) -> None:
    async with open_gateway(valkey_server.url, audit={**EVERY, "rate": 0.5}) as gateway:
        single, entries = {"prompt": "p", "responses": ["r"]}, [{"name": name} for name in THREE]
        for fields, inclusion in (({"audit": {**EVERY, "rate": 0.5}}, 0.5), ({}, None)):
            await gateway.client.ok("/admin/pool", {"pool": {"models": entries, **fields}})
            reply = await gateway.client.ok("/reward", single)
            stored = gateway.decision(reply["decision_id"])
            assert (stored.inclusion, bool(stored.group)) == (inclusion, inclusion is not None)
        assert reply["sticky"]


class _Between(Executor):
    """Runs a call, and something else before its result comes back."""

    def __init__(self, then: Callable[[], None]) -> None:
        self._then = then

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        done: Future[Any] = Future()
        done.set_result(fn(*args, **kwargs))
        self._then()
        return done


async def test_a_pool_may_change_under_a_snapshot(valkey_server: ValkeyProcess, four: list[dict[str, Any]]) -> None:
    async with open_parts(valkey_server.url) as gateway:
        run = await gateway.runs.get(None)
        await gateway.scorer.score(RewardRequest("p", ["r", "longer"]))
        before = run.current
        await gateway.pools.apply(PoolRequest(pool={"models": four}))
        after, run.current = run.current, before

        def change() -> None:
            run.current = after

        channel = watch._Channel()
        channel.viewers = 1
        gateway.watcher._executor = _Between(change)
        await gateway.watcher._renew(run, channel, True)
        state = msgspec.json.decode(channel.state.split(b"data: ")[1])
        assert [arm["model"] for arm in state["arms"]] == [*THREE]


async def test_who_watches_a_run_is_told_of_its_end(valkey_server: ValkeyProcess) -> None:
    async with open_parts(valkey_server.url) as gateway:
        other = fresh_run()
        await gateway.runs.get(other)
        frames = gateway.watcher.frames(other, lambda: EVERYTHING)
        assert (await anext(frames)).startswith(b"event: history")
        gateway.runs.close(other)
        with pytest.raises(NotFoundError, match="not open"):
            await asyncio.wait_for(anext(frames), 20.0)


async def test_a_run_that_comes_back_asks_again(valkey_server: ValkeyProcess, four: list[dict[str, Any]]) -> None:
    async with open_parts(valkey_server.url) as gateway:
        other = fresh_run()
        request = RewardRequest("p", ["r", "longer"], run=other, policy="single:rm-d")
        await gateway.runs.get(other)
        await gateway.pools.apply(PoolRequest(pool={"models": four}, run=other))
        assert (await gateway.scorer.score(request)).model == "rm-d"
        gateway.runs.close(other)
        for later in (0.0, 1000.0):
            await gateway.let_go(time.monotonic() + later)
        await gateway.runs.get(other)
        assert (await gateway.scorer.score(request)).model == "rm-d"


async def test_whoever_opens_a_changed_run_asks_by_its_pool(
    valkey_server: ValkeyProcess, four: list[dict[str, Any]]
) -> None:
    other, third = fresh_run(), fresh_run()
    pool = {"models": four, "routing": {"policy": "random"}}
    async with open_gateway(valkey_server.url) as one:
        for run in (other, third):
            await one.client.ok("/reward", {**pair(), "run": run})
            await one.client.ok("/admin/pool", {"pool": pool, "run": run})
    async with open_gateway(valkey_server.url) as two:
        assert (await two.client.get(f"/pool?run={third}")).json["version"] == 1
        beliefs = await two.client.ok("/beliefs", {**pair(), "run": other, "policy": "single:rm-d"})
        assert len(beliefs["beliefs"]) == 4
        assert (await two.client.ok("/reward", {**pair(), "run": third}))["policy"] == "random"
    async with open_gateway(valkey_server.url) as three:
        named = await three.client.ok("/reward", {**pair(), "run": other, "policy": "single:rm-d"})
        assert named["model"] == "rm-d"
        typo = await three.client.post("/reward", {**pair(), "run": fresh_run(), "policy": "single:rm-d"})
        assert typo.status == 404


async def test_audits_are_shown_by_gateways_without_the_run(
    valkey_server: ValkeyProcess, four: list[dict[str, Any]]
) -> None:
    other = fresh_run()
    async with open_gateway(valkey_server.url) as one, open_gateway(valkey_server.url) as two:
        await one.client.ok("/reward", {**pair(), "run": other})
        await one.client.ok("/admin/pool", {"pool": {"models": four, "audit": EVERY}, "run": other})
        await one.client.ok("/reward", {**pair(1), "run": other, "policy": "single:rm-a"})
        await one.learned(2, other)
        response = await two.client.get(f"/audits?run={other}")
        assert response.status == 200, response.body
        assert set(response.json[0]["verdicts"]) == {*THREE, "rm-d"}
        assert (await two.client.get(f"/audits?run={fresh_run()}")).json == []


async def test_pieces_that_wait_take_the_new_default_policy(valkey_server: ValkeyProcess) -> None:
    async with open_parts(valkey_server.url, policy="single:rm-b", batch_piece_responses=2) as gateway:
        run = await gateway.runs.get(None)
        (asked,) = [arm for arm in run.template.arms if arm.name == "rm-b"]
        assert isinstance(asked, ScriptedArm)
        asked.gate = asyncio.Event()
        requests = [RewardRequest(f"p{index}", ["r", "longer"]) for index in range(10)]
        call = asyncio.create_task(gateway.scorer.score_many(requests))

        async def under_way() -> bool:
            return bool(asked.calls)

        await until(under_way, "asked")
        pool = {"models": [{"name": "rm-a"}, {"name": "rm-c"}], "routing": {"policy": "single:rm-a"}}
        await gateway.pools.apply(PoolRequest(pool=pool))
        asked.gate.set()
        results = await call
        replies = [one for one in results if not isinstance(one, ServiceError)]
        assert len(replies) == len(requests), results
        assert {reply.model for reply in replies} == {"rm-a", "rm-b"}
        (named,) = await gateway.scorer.score_many([RewardRequest("p", ["r", "longer"])], policy="single:rm-c")
        assert not isinstance(named, ServiceError)


async def test_pools_that_nobody_has_any_more_are_forgotten(valkey_server: ValkeyProcess) -> None:
    async with open_parts(valkey_server.url) as gateway:
        run = await gateway.runs.get(None)
        for price in (2.0, 3.0, 4.0):
            models = [{"name": "rm-a", "price": price}, {"name": "rm-b"}, {"name": "rm-c"}]
            await gateway.pools.apply(PoolRequest(pool={"models": models}))
        await gateway.let_go(time.monotonic())
        kept = [*gateway.assembly._templates.values()]
        assert {id(one) for one in kept} == {id(run.template), id(gateway.runs.template)}
        assert (await gateway.scorer.score(RewardRequest("p", ["r", "longer"]))).rewards


class FailingStore(MemoryStore):
    """Saves no decisions that are audited while `fails`."""

    fails = False

    async def save_audited(self, *args: Any, **more: Any) -> Any:
        if self.fails:
            raise StoreUnavailableError("away", where="here")
        return await super().save_audited(*args, **more)


async def test_groups_of_a_failed_save_are_counted_with_the_next(valkey_server: ValkeyProcess) -> None:
    store = FailingStore(window_seconds=60)
    async with open_parts(valkey_server.url, store, EVERY, on_store_unavailable="answer") as gateway:
        run = (await gateway.runs.get(None)).name
        store.fails = True
        await gateway.scorer.score(RewardRequest("single", ["one"]))
        await gateway.scorer.score(RewardRequest("pair", ["one", "two"]))
        store.fails = False
        await gateway.scorer.score(RewardRequest("another pair", ["one", "two"]))
        assert (await store.audit_progress(run)).count == 2
        standing = gateway.audits._standings[run]
        assert (standing.count, standing.progress.t) == (2, 2)

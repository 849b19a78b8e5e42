"""A store that has lost everything gives a held run's name to no other pool."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import pytest
import redis

from service.stores.protocol import NameNotFreeError
from service.stores.redis import RedisStore
from service.usecases import hold
from tests.support.gateway import Gateway, fresh_run, open_gateway, pair, until

if TYPE_CHECKING:
    from tests.conftest import ValkeyProcess

ONE, OTHER = ("rm-a", "rm-b", "rm-c"), ("rm-a", "rm-b")
WAIT: dict[str, Any] = {"new_run_wait_seconds": 6.0}


def identity(server: ValkeyProcess, run: str) -> bytes | None:
    """What stands under the run's name."""
    with redis.Redis.from_url(server.url) as client:
        found: Any = client.get(f"rr:{{{run}}}:meta")
    return None if found is None else bytes(found)


def lose_everything(server: ValkeyProcess) -> None:
    with redis.Redis.from_url(server.url) as client:
        client.flushall()


async def teach(gateway: Gateway, run: str) -> None:
    """One acknowledged feedback."""
    reply = await gateway.client.ok("/reward", {**pair(), "run": run})
    await gateway.client.ok("/feedback", {"decision_id": reply["decision_id"], "preferred": 0, "run": run})
    await gateway.learned(1, run)


@pytest.mark.parametrize(("holds", "comes"), [(ONE, OTHER), (OTHER, ONE)])
async def test_a_lost_name_goes_back_to_the_pool_that_held_it(
    own_valkey_server: ValkeyProcess, holds: tuple[str, ...], comes: tuple[str, ...]
) -> None:
    server, run = own_valkey_server, fresh_run()
    with redis.Redis.from_url(server.url) as client:
        client.set("rr:watched", 0, px=60_000)
    async with open_gateway(server.url, models=holds, run=run, **WAIT) as holder:
        await teach(holder, run)
        async with open_gateway(server.url, models=comes, **WAIT) as newcomer:
            lose_everything(server)
            # At once: nobody has noticed yet.
            await newcomer.client.ok("/reward", {**pair(), "run": run})
            shown = (await newcomer.client.get(f"/pool?run={run}")).json
            assert [arm["name"] for arm in shown["arms"]] == [*holds]
            standing = identity(server, run)
            assert standing is not None
            assert all(f'"{name}"'.encode() in standing for name in holds)
            ready = await holder.client.get("/readyz")
            assert ready.status == 503
            assert "has lost run" in ready.error["message"]


async def test_a_lost_name_is_free_once_nobody_holds_it(own_valkey_server: ValkeyProcess) -> None:
    server, run = own_valkey_server, fresh_run()
    async with open_gateway(server.url, models=ONE, run=run) as holder:
        await teach(holder, run)
    lose_everything(server)
    async with open_gateway(server.url, models=OTHER, run=run, wait=False, new_run_wait_seconds=0.5) as newcomer:
        waiting = await newcomer.client.get("/readyz")
        assert waiting.status == 503
        assert (await newcomer.client.ok("/reward", pair()))["run"] == run


async def test_a_holder_that_came_too_late_folds_and_acknowledges_nothing(
    own_valkey_server: ValkeyProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    server, run = own_valkey_server, fresh_run()
    monkeypatch.setattr(hold, "HOLD_SECONDS", 3600)
    async with open_gateway(server.url, models=ONE, run=run) as holder:
        await teach(holder, run)
        late = await holder.client.ok("/reward", pair(1))
        # A holder that claims nothing, and a newcomer that does not wait: as if the holder had been away for longer.
        async with open_gateway(server.url, models=OTHER, new_run_wait_seconds=0) as newcomer:
            lose_everything(server)
            await newcomer.client.ok("/reward", {**pair(), "run": run})
            await teach(newcomer, run)
            refused = await holder.client.post("/feedback", {"decision_id": late["decision_id"], "preferred": 0})
            assert (refused.status, refused.error["code"]) == (503, "not_ready")

            async def noticed() -> bool:
                return (await holder.client.get("/readyz")).status == 503

            await until(noticed, "the loss noticed")
            assert "its name was taken" in (await holder.client.get("/readyz")).error["message"]
            assert (await holder.learned(0))["version"] == 1
            # The name stays whose it is now: what the newcomer acknowledged since is not lost too.
            assert b'"rm-c"' not in (identity(server, run) or b"")
            assert (await newcomer.learned(1, run))["version"] == 1


async def test_names_are_held_on_after_the_store_was_away(own_valkey_server: ValkeyProcess) -> None:
    server, run = own_valkey_server, fresh_run()
    async with open_gateway(server.url, run=run, store_timeout_seconds=0.5) as gateway:
        await teach(gateway, run)
        server.kill()

        async def noticed() -> bool:
            return (await gateway.client.get("/readyz")).status == 503

        await until(noticed, "the store is away")
        await asyncio.sleep(hold.HOLD_SECONDS + 0.2)
        server.start()
        lose_everything(server)
        await until(lambda: identity(server, run), "the name is held again")


async def test_a_watched_store_gives_new_names_at_once(own_valkey_server: ValkeyProcess) -> None:
    store = RedisStore(own_valkey_server.url, window_seconds=60)
    with pytest.raises(NameNotFreeError) as caught:
        await store.open_run("new", b"{}", free_seconds=60)
    assert 0 < caught.value.seconds <= 60
    assert not await store.has_run("new")
    assert (caught.value.status, caught.value.code) == (503, "not_ready")
    with redis.Redis.from_url(own_valkey_server.url) as client:
        assert 0 < client.pttl("rr:watched") <= 5000, "a backup that is older holds no mark"
        client.set("rr:watched", 1)
        assert (await store.open_run("new", b"{}", free_seconds=60)).fingerprint == b"{}"
        client.set("rr:watched", 1 << 60)
        with pytest.raises(NameNotFreeError):
            await store.open_run("another", b"{}", free_seconds=60)
    assert (await store.open_run("new", b"other", free_seconds=60)).fingerprint == b"{}", "known names never wait"
    await store.close()

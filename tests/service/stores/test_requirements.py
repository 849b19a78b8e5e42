"""A store that would lose acknowledged data is refused, one that may is warned of; asked of real servers."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path

import pytest
import redis

from service.errors import UnsafeStoreError
from service.stores.embedded import EmbeddedStore
from service.stores.memory import MemoryStore
from service.stores.protocol import DecisionRecord
from service.stores.redis import RedisStore
from service.stores.requirements import RequirementsWatch, ServerFacts, Verdict, judge
from tests.conftest import ValkeyProcess
from tests.contract.test_store_contract import by_id, decision
from tests.support.cluster import ValkeyCluster
from tests.support.gateway import open_gateway, pair, until

SAFE = ServerFacts("7.2.4", maxmemory=0, eviction="noeviction", append_only=True, appendfsync="everysec", save="")
EVICTING = {"maxmemory": "50mb", "maxmemory_policy": "volatile-lru"}


@pytest.fixture
def server(valkey_binary: Path, tmp_path: Path) -> Iterator[ValkeyProcess]:
    """A server of this test alone, not yet started."""
    process = ValkeyProcess(valkey_binary, tmp_path)
    yield process
    process.kill()


def configure(server: ValkeyProcess, **changed: str) -> None:
    with redis.Redis(port=server.port) as client:
        for name, value in changed.items():
            client.config_set(name.replace("_", "-"), value)


async def verdict_of(url: str, *, allow_unsafe: bool = False) -> Verdict:
    store = RedisStore(url, window_seconds=60, timeout_seconds=10)
    watch = RequirementsWatch(store, allow_unsafe=allow_unsafe)
    await watch.check()
    await store.close()
    return watch.verdict


def test_a_safe_server_has_nothing_against_it() -> None:
    assert judge(SAFE) == Verdict()
    # A managed service that forbids CONFIG and says little is not refused for what nobody knows.
    assert judge(ServerFacts()) == Verdict()


@pytest.mark.parametrize("version", ["6.2.14", "5.0", "6.9"])
def test_a_server_older_than_redis_7_is_refused(version: str) -> None:
    (refusal,) = judge(ServerFacts(version)).refusals
    assert version in refusal
    assert "Redis 7.0" in refusal


@pytest.mark.parametrize("version", ["7.0.0", "7.2.4", "8.1", "255.255.255", "unstable"])
def test_a_newer_server_or_one_whose_version_cannot_be_read_is_taken(version: str) -> None:
    assert judge(ServerFacts(version)) == Verdict()


async def test_a_server_that_evicts_is_refused_when_the_watch_starts(server: ValkeyProcess) -> None:
    server.start(**EVICTING, appendfsync="everysec")
    (refusal,) = (await verdict_of(server.url)).refusals
    assert "maxmemory-policy is volatile-lru" in refusal
    assert "set maxmemory-policy to noeviction" in refusal


async def test_nothing_is_saved_from_the_moment_a_server_evicts_until_it_no_longer_does(
    server: ValkeyProcess, caplog: pytest.LogCaptureFixture
) -> None:
    server.start(appendfsync="everysec")
    caplog.set_level(logging.INFO, "service.stores.requirements")
    store = RedisStore(server.url, window_seconds=60, timeout_seconds=10)
    watch = RequirementsWatch(store)
    await watch.check()
    assert watch.verdict == Verdict()
    await store.open_run("run", b"f")
    first, second = decision(), decision()
    await store.save_decisions("run", [first])

    configure(server, **EVICTING)
    for _ in range(3):
        await watch.check()
    with pytest.raises(UnsafeStoreError, match="set maxmemory-policy to noeviction"):
        await store.save_decisions("run", [second])
    with pytest.raises(UnsafeStoreError):
        await store.apply_feedback("run", [by_id(first)])
    with pytest.raises(UnsafeStoreError):
        await store.probe("run")

    configure(server, maxmemory_policy="noeviction")
    await watch.check()
    assert watch.verdict == Verdict()
    await store.save_decisions("run", [second])
    assert len(await store.apply_feedback("run", [by_id(first), by_id(second)])) == 2
    assert [record.message for record in caplog.records] == ["store refused", "store mended"], "each once"
    await store.close()


async def test_an_operator_can_insist(server: ValkeyProcess) -> None:
    server.start(**EVICTING, appendfsync="everysec")
    verdict = await verdict_of(server.url, allow_unsafe=True)
    assert verdict.refusals == ()
    assert "volatile-lru" in verdict.warnings[0]


async def test_a_replica_is_refused_and_the_primary_that_it_becomes_is_taken(
    server: ValkeyProcess, own_valkey_server: ValkeyProcess
) -> None:
    server.start(appendfsync="everysec", dbfilename="replica.rdb", appenddirname="replica", replica_read_only="no")
    with redis.Redis(port=server.port) as client:
        client.replicaof("127.0.0.1", own_valkey_server.port)  # type: ignore[no-untyped-call]
    store = RedisStore(server.url, window_seconds=60, timeout_seconds=10)
    watch = RequirementsWatch(store)
    await watch.check()
    (refusal,) = watch.verdict.refusals
    assert "point store_url at the primary" in refusal
    with pytest.raises(UnsafeStoreError):
        # It takes writes, and its primary overwrites them.
        await store.save_decisions("run", [decision()])
    with redis.Redis(port=server.port) as client:
        client.replicaof("NO", "ONE")  # type: ignore[no-untyped-call]
    await watch.check()
    assert watch.verdict == Verdict()
    await store.save_decisions("run", [decision()])
    await store.close()


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"appendfsync": "no"}, "appendfsync is no"),
        ({"appendonly": "no", "save": "900 1"}, "no append-only file"),
        ({"appendonly": "no", "save": ""}, "keeps nothing on disk"),
        ({"maxmemory_policy": "allkeys-lru"}, "maxmemory-policy is allkeys-lru"),
    ],
)
async def test_what_may_lose_data_is_warned_of_with_a_remedy(
    server: ValkeyProcess, changed: dict[str, str], words: str
) -> None:
    server.start(**{"appendfsync": "everysec", **changed})
    verdict = await verdict_of(server.url)
    assert verdict.refusals == ()
    (warning,) = verdict.warnings
    assert words in warning
    assert "set " in warning


async def test_a_user_without_config_is_judged_by_info_and_one_without_info_is_warned_of(server: ValkeyProcess) -> None:
    server.start(**EVICTING, appendfsync="no")
    with redis.Redis(port=server.port) as client:
        client.execute_command("ACL", "SETUSER", "some", "on", ">word", "~*", "+@all", "-config")
        client.execute_command("ACL", "SETUSER", "less", "on", ">word", "~*", "+@all", "-config", "-info")
    some = await verdict_of(f"redis://some:word@127.0.0.1:{server.port}/0")
    assert len(some.refusals) == 1
    assert some.warnings == (), "appendfsync is not known"
    less = await verdict_of(f"redis://less:word@127.0.0.1:{server.port}/0")
    assert less.refusals == ()
    assert "allow the user INFO" in less.warnings[0]


async def test_every_primary_of_a_cluster_is_asked(valkey_cluster: ValkeyCluster) -> None:
    store = RedisStore(valkey_cluster.url, window_seconds=60, timeout_seconds=10)
    facts = await store.survey()
    assert len(facts) == 3
    assert all(one.eviction == "noeviction" and not one.replica for one in facts)
    await store.close()


async def test_the_embedded_store_meets_all_requirements(tmp_path: Path) -> None:
    with EmbeddedStore(tmp_path) as embedded:
        assert await verdict_of(embedded.url) == Verdict()


async def test_memory_has_no_server_to_ask() -> None:
    store = MemoryStore(window_seconds=60)
    watch = RequirementsWatch(store)
    await watch.check()
    assert watch.verdict == Verdict()
    await store.save_decisions("run", [DecisionRecord("id", decision().payload)])


async def test_a_store_that_is_away_keeps_its_last_verdict(server: ValkeyProcess) -> None:
    server.start(**EVICTING, appendfsync="everysec")
    store = RedisStore(server.url, window_seconds=60, timeout_seconds=1)
    watch = RequirementsWatch(store)
    await watch.check()
    server.kill()
    await watch.check()
    assert len(watch.verdict.refusals) == 1
    await store.close()


async def test_a_gateway_refuses_on_a_store_that_evicts_and_says_so(server: ValkeyProcess) -> None:
    server.start(**EVICTING, appendfsync="everysec")
    async with open_gateway(server.url, wait=False) as gateway:
        for reply in (await gateway.client.get("/readyz"), await gateway.client.post("/reward", pair())):
            assert (reply.status, reply.error["code"]) == (503, "store_unavailable")
            assert "set maxmemory-policy to noeviction" in reply.error["message"]


async def test_a_gateway_goes_on_by_itself_once_its_store_is_mended(server: ValkeyProcess) -> None:
    server.start(**EVICTING, appendfsync="everysec")
    async with open_gateway(server.url, wait=False) as gateway:
        assert (await gateway.client.get("/readyz")).status == 503
        configure(server, maxmemory_policy="noeviction")

        async def ready() -> bool:
            return (await gateway.client.get("/readyz")).status == 200

        await until(ready, "ready")
        await gateway.client.ok("/reward", pair())


async def test_a_gateway_told_to_insist_serves_there_and_says_what_may_be_lost(
    server: ValkeyProcess, caplog: pytest.LogCaptureFixture
) -> None:
    server.start(**EVICTING, appendfsync="everysec")
    async with open_gateway(server.url, allow_unsafe_store=True) as gateway:
        await gateway.client.ok("/reward", pair())
        (warning,) = (await gateway.client.get("/readyz")).json["store_warnings"]
        assert "volatile-lru" in warning
    (logged,) = [record for record in caplog.records if record.message == "store may lose data"]
    assert logged.__dict__["fields"] == {"reason": warning}

"""What the real application does while its store is away: it never acknowledges what is not kept."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import TYPE_CHECKING, Any

import pytest

from tests.support.gateway import Gateway, open_gateway, pair, until

if TYPE_CHECKING:
    from tests.conftest import ValkeyProcess


@pytest.fixture(params=["refuse", "answer"])
async def gateway(request: pytest.FixtureRequest, own_valkey_server: ValkeyProcess) -> AsyncIterator[Gateway]:
    """A gateway for either setting of `on_store_unavailable`."""
    bounds: dict[str, Any] = {"store_timeout_seconds": 0.5, "on_store_unavailable": request.param}
    async with open_gateway(own_valkey_server.url, **bounds) as opened:
        yield opened


async def test_a_reward_without_store_is_refused_or_answered_as_configured(
    gateway: Gateway, own_valkey_server: ValkeyProcess
) -> None:
    own_valkey_server.kill()
    for path, document in (("/reward", pair()), ("/reward/batch", {"items": [pair()]})):
        response = await gateway.client.post(path, document)
        if gateway.settings.on_store_unavailable == "refuse":
            assert (response.status, response.error["code"]) == (503, "store_unavailable")
            assert int(response.headers["retry-after"]) >= 1
        else:
            reply = response.json if path == "/reward" else response.json["results"][0]
            assert reply["recorded"] is False
            assert reply["rewards"] == [float(len(text)) for text in pair()["responses"]]


async def test_an_unrecorded_decision_is_unknown_once_the_store_is_back(own_valkey_server: ValkeyProcess) -> None:
    bounds: dict[str, Any] = {"store_timeout_seconds": 0.5, "on_store_unavailable": "answer"}
    async with open_gateway(own_valkey_server.url, **bounds) as gateway:
        own_valkey_server.kill()
        reply = await gateway.client.ok("/reward", pair())
        own_valkey_server.start()
        feedback = {"decision_id": reply["decision_id"], "preferred": 0}

        async def answered() -> int:
            status = (await gateway.client.post("/feedback", feedback)).status
            return 0 if status == 503 else status

        assert await until(answered, "the store is back") == 404


async def test_feedback_without_store_is_503_and_is_never_acknowledged(
    gateway: Gateway, own_valkey_server: ValkeyProcess
) -> None:
    ids = [(await gateway.client.ok("/reward", pair(index)))["decision_id"] for index in range(3)]
    own_valkey_server.kill()
    one = {"decision_id": ids[0], "preferred": 0}
    for path, document in (("/feedback", one), ("/feedback/batch", {"items": [one]})):
        response = await gateway.client.post(path, document)
        assert (response.status, response.error["code"]) == (503, "store_unavailable")
        assert int(response.headers["retry-after"]) >= 1
    own_valkey_server.start()

    async def applied() -> bool:
        return (await gateway.client.post("/feedback", one)).status == 200

    await until(applied, "the store is back")
    assert [event.decision_id for event in gateway.events()] == [ids[0]]
    await gateway.learned(1)


async def test_a_run_that_was_never_opened_cannot_be_opened_without_store(
    gateway: Gateway, own_valkey_server: ValkeyProcess
) -> None:
    own_valkey_server.kill()
    response = await gateway.client.post("/reward", {**pair(), "run": gateway.run + "-new"})
    assert (response.status, response.error["code"]) == (503, "store_unavailable")


async def test_the_posterior_survives_a_crash_of_the_store(gateway: Gateway, own_valkey_server: ValkeyProcess) -> None:
    for index in range(5):
        reply = await gateway.client.ok("/reward", pair(index))
        await gateway.client.ok("/feedback", {"decision_id": reply["decision_id"], "preferred": 0})
    before = await gateway.learned(5)
    own_valkey_server.kill()
    own_valkey_server.start()

    async def back() -> bool:
        return (await gateway.client.get("/readyz")).status == 200

    await until(back, "ready")
    assert (await gateway.learned(5))["digest"] == before["digest"]
    reply = await gateway.client.ok("/reward", pair(9))
    await gateway.client.ok("/feedback", {"decision_id": reply["decision_id"], "preferred": 1})
    assert (await gateway.learned(6))["digest"] == gateway.folded().digest()


async def test_a_gateway_whose_store_is_full_is_not_ready_and_is_again_once_there_is_room(
    own_valkey_server: ValkeyProcess,
) -> None:
    async with open_gateway(own_valkey_server.url, store_timeout_seconds=0.5) as gateway:
        assert (await gateway.client.get("/readyz")).status == 200
        own_valkey_server.ask(b"CONFIG SET maxmemory 1\r\n")
        refused = await gateway.client.post("/reward", pair())
        assert (refused.status, refused.error["code"]) == (503, "store_unavailable")
        assert (await gateway.client.get("/readyz")).status == 503
        own_valkey_server.ask(b"CONFIG SET maxmemory 0\r\n")

        async def ready() -> bool:
            return (await gateway.client.get("/readyz")).status == 200

        await until(ready, "there is room again")
        await gateway.client.ok("/reward", pair())


async def test_a_gateway_that_may_not_read_its_log_is_not_ready_until_it_may(own_valkey_server: ValkeyProcess) -> None:
    own_valkey_server.ask(b"ACL SETUSER reader on >word ~* &* +@all\r\n")
    url = own_valkey_server.url.replace("redis://", "redis://reader:word@")
    async with open_gateway(url, store_timeout_seconds=5) as gateway:
        own_valkey_server.ask(b"ACL SETUSER reader -xread\r\n")

        async def refused() -> bool:
            return (await gateway.client.get("/readyz")).status == 503

        await until(refused, "not ready")
        error = (await gateway.client.get("/readyz")).error
        assert error["code"] == "not_ready"
        assert f"the log of run {gateway.run!r} cannot be read" in error["message"]
        assert "xread" in error["message"]
        metrics = (await gateway.client.get("/metrics")).body.decode()
        assert f'reward_router_learner_waiting{{run="{gateway.run}"}} 1.0' in metrics
        own_valkey_server.ask(b"ACL SETUSER reader +xread\r\n")

        async def ready() -> bool:
            return (await gateway.client.get("/readyz")).status == 200

        await until(ready, "ready again")
        reply = await gateway.client.ok("/reward", pair())
        await gateway.client.ok("/feedback", {"decision_id": reply["decision_id"], "preferred": 0})
        await gateway.learned(1)

"""A background task that ends by a fault of ours is seen by operators."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from service.usecases.hold import NameHolder
from tests.support.gateway import open_gateway, until

if TYPE_CHECKING:
    from tests.conftest import ValkeyProcess


async def test_a_task_that_dies_is_in_healthz_and_metrics(
    valkey_server: ValkeyProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def dies(_: NameHolder) -> None:
        raise KeyError("a secret of the prompt")

    monkeypatch.setattr(NameHolder, "run_forever", dies)
    async with open_gateway(valkey_server.url) as gateway:

        async def seen() -> bool:
            return bool((await gateway.client.get("/healthz")).json["failed_tasks"] == ["run names"])

        await until(seen, "in /healthz")
        metrics = (await gateway.client.get("/metrics")).body.decode()
        assert 'reward_router_background_failures_total{task="run names"} 1.0' in metrics
        assert "secret" not in metrics

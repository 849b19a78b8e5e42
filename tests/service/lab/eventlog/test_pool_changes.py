"""Exports and estimates over a change of the pool: rows before and after stay readable, arms keep their names."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from service.lab.estimates import evaluate_log
from service.lab.eventlog.export import export_log
from service.lab.eventlog.load import load_log, logged_data
from service.stores.redis import RedisStore
from tests.service.scorers.worker_servers import ScriptedWorker
from tests.support.gateway import fresh_run, open_gateway, pair

if TYPE_CHECKING:
    from tests.conftest import ValkeyProcess
    from tests.service.scorers.worker_servers import Serve


async def changing_run(url: str, run: str, new: str) -> None:
    """Events before a change, after one arm was retired and one added, and one that was under way meanwhile."""
    async with open_gateway(url, run=run, models=("rm-a", "rm-b"), policy="random") as gateway:

        async def teach(count: int, policy: str = "random") -> None:
            for index in range(count):
                reply = await gateway.client.ok("/reward", {**pair(index), "policy": policy})
                await gateway.client.ok("/feedback", {"decision_id": reply["decision_id"], "preferred": 1})

        await teach(12)
        late = await gateway.client.ok("/reward", {**pair(50), "policy": "single:rm-b"})
        pool: dict[str, Any] = {"models": [{"name": "rm-a"}, {"name": "rm-c", "urls": [new]}]}
        await gateway.client.ok("/admin/pool", {"pool": pool})
        await gateway.client.ok("/feedback", {"decision_id": late["decision_id"], "preferred": 1})
        await teach(14)
        await gateway.learned(28)


@pytest.mark.parametrize("name", ["log.jsonl", "log.parquet"])
def test_rows_before_and_after_a_change_are_read(
    valkey_server: ValkeyProcess, tmp_path: Path, serve: Serve, name: str
) -> None:
    if name.endswith("parquet"):
        pytest.importorskip("pyarrow", reason="needs reward-router[export]")
    run, out = fresh_run(), tmp_path / name
    asyncio.run(changing_run(valkey_server.url, run, serve(ScriptedWorker("rm-c"))))

    async def export(*, resume: bool) -> int:
        store = RedisStore(valkey_server.url, window_seconds=60)
        try:
            return (await export_log(store, run, out, resume=resume)).events
        finally:
            await store.close()

    # The change itself is an event of the log and no row.
    assert asyncio.run(export(resume=False)) == 27
    assert asyncio.run(export(resume=True)) == 27
    log = load_log(out)
    assert log.header.pool == ("rm-a", "rm-b", "rm-c")
    data = logged_data(log)
    assert data.propensities.shape == (27, 3)
    before, after = slice(0, 12), slice(13, 27)
    assert data.propensities[before, 2].tolist() == [0.0] * 12
    assert data.propensities[after, 1].tolist() == [0.0] * 14
    assert set(data.arm[before].tolist()) <= {0, 1}
    assert set(data.arm[after].tolist()) <= {0, 2}
    assert data.available[after, 1].tolist() == [False] * 14
    assert data.propensities.sum(axis=1) == pytest.approx(np.ones(27))
    estimates = evaluate_log(log, ["single:rm-a", "random"], None)
    assert set(estimates["policies"]) == {"single:rm-a", "random"}

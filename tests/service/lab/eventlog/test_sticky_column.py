"""Exported rows name the draw that they share."""

from __future__ import annotations

from io import StringIO
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from rich.console import Console

from service.cli.ope import print_figures
from service.lab.estimates import evaluate_log
from service.lab.eventlog.export import export_log, read_events
from service.lab.eventlog.load import load_log, logged_data
from service.stores.redis import RedisStore
from tests.support.gateway import open_gateway, pair

if TYPE_CHECKING:
    from tests.conftest import ValkeyProcess

pytest.importorskip("pyarrow.parquet", reason="needs reward-router[export]")


async def test_rows_that_share_a_draw_have_one_name(valkey_server: ValkeyProcess, tmp_path: Path) -> None:
    new, lines = tmp_path / "new.parquet", tmp_path / "new.jsonl"
    async with open_gateway(valkey_server.url, signal="reward") as gateway:
        for request in ({"prompt": "p", "responses": ["a"]}, {"prompt": "p", "responses": ["b"]}, pair()):
            reply = await gateway.client.ok("/reward", request)
            await gateway.client.ok("/feedback", {"decision_id": reply["decision_id"], "reward": 0.5})
        store = RedisStore(valkey_server.url, window_seconds=60)
        for path in (new, lines):
            await export_log(store, gateway.run, path)
        await store.close()
    figures = evaluate_log(load_log(new), ["random"], None)
    assert figures["sharing_a_draw"] == 1
    output = StringIO()
    print_figures(figures, Console(file=output, width=200))
    assert "1 rows share the draw of an earlier one" in output.getvalue()
    draws = logged_data(load_log(new)).draws
    assert draws is not None
    assert draws.tolist() == [0, 0, 1]
    names = [row.decision.sticky for row in read_events(new)]
    assert names[0] == names[1] != ""
    assert names[2] == ""
    assert list(read_events(lines)) == list(read_events(new))

"""What vLLM exports while it classifies is what the dashboard's panels of vLLM servers ask for."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path

import pytest

from deploy.grafana.panels import VLLM_SERVERS
from service.scorers.rm.client import ArmConfig, VllmArm
from service.scorers.rm.render import MessagesRendering
from tests.support.arms import score_items
from tests.support.prometheus import Prometheus, filled_in
from tests.vllm.conftest import SERVED, VllmServer

pytestmark = pytest.mark.slow

DATA_SECONDS = 120.0


async def test_every_panel_of_vllm_servers_has_data_of_a_real_one(server: VllmServer, tmp_path: Path) -> None:
    arm = VllmArm(ArmConfig(name="rm", urls=(server.url,), model=SERVED, rendering=MessagesRendering()))
    missing = {panel.title: [filled_in(q.expr) for q in panel.queries] for panel in VLLM_SERVERS.panels}
    assert len(missing) == 3
    with Prometheus(tmp_path, {"vllm": [server.url.removeprefix("http://")]}) as prometheus:
        deadline = time.monotonic() + DATA_SECONDS
        while missing:
            assert time.monotonic() < deadline, f"panels without data: {missing}"
            await score_items(arm, [("What is 2 + 3?", "5")] * 4, deadline=asyncio.get_running_loop().time() + 60)
            for title, exprs in list(missing.items()):
                if all(prometheus.query(expr) for expr in exprs):
                    del missing[title]
    await arm.close()

"""`rendering: auto` with a real vLLM: token ids are sent, for they are what it reads."""

from __future__ import annotations

import asyncio
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("transformers", reason="needs reward-router[train]")

from service.pool import ModelEntry
from service.scorers.rm.build import build_reward_model
from service.scorers.rm.health import HealthMonitor, HealthPolicy
from service.settings import Settings
from tests.support.arms import score_items
from tests.vllm.conftest import MAX_LENGTH, RM, SERVED, VllmServer
from tests.vllm.reference import TOLERANCE, Reference, some_items

pytestmark = pytest.mark.slow

SECONDS = 60.0


@pytest.mark.parametrize("served_as_it_is_rendered", [True, False])
async def test_ids_are_sent_where_vllm_reads_the_same_else_conversations(
    server: VllmServer, demo_models: Path, tmp_path: Path, served_as_it_is_rendered: bool
) -> None:
    path = demo_models / RM
    if not served_as_it_is_rendered:
        for file in path.iterdir():
            (tmp_path / file.name).write_bytes(file.read_bytes())
        (tmp_path / "chat_template.jinja").write_text("{% for m in messages %}{{ m['content'] }} {% endfor %}")
        path = tmp_path
    arm = build_reward_model(
        ModelEntry.model_validate({"name": SERVED, "urls": [server.url], "rendering": "auto", "path": path}), Settings()
    )
    try:
        await HealthMonitor([arm], HealthPolicy(timeout_seconds=SECONDS), np.random.default_rng(0)).check_all()
        assert arm.rendering.name == ("tokens" if served_as_it_is_rendered else "messages")
        assert arm.max_model_len == MAX_LENGTH
        items = some_items(16)
        rewards = await score_items(arm, items, deadline=asyncio.get_running_loop().time() + SECONDS)
        assert rewards == pytest.approx(Reference(demo_models / RM).rewards(items), abs=TOLERANCE)
    finally:
        await arm.close()

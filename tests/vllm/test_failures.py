"""A real vLLM that drains, crashes and comes back, under traffic: every request is answered by the one that is left."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("transformers", reason="needs reward-router[train]")

from service.scorers.rm.client import ArmConfig, VllmArm
from service.scorers.rm.health import HealthMonitor, HealthPolicy
from service.scorers.rm.render import PlainTemplate, TemplateRendering
from service.scorers.transport.breaker import BreakerState
from tests.support.arms import score_items
from tests.vllm.conftest import RM, SERVED, START_SECONDS, VllmServer
from tests.vllm.reference import TOLERANCE, Reference, some_items

pytestmark = pytest.mark.slow

CALLERS = 4
SECONDS = 60.0
"""Each call's deadline. A request that vLLM leaves hanging must be given up and sent elsewhere long before."""


class Traffic:
    """Callers that score known items again and again, and check every reward."""

    def __init__(self, arm: VllmArm, items: list[tuple[str, str]], expected: list[float]) -> None:
        self._arm = arm
        self._items = items
        self._expected = expected
        self._stopping = False
        self._failed = False
        self._tasks: list[asyncio.Task[None]] = []
        self._progress = asyncio.Condition()
        self.answered = 0

    async def __aenter__(self) -> Traffic:
        self._tasks = [asyncio.create_task(self._call(number)) for number in range(CALLERS)]
        return self

    async def __aexit__(self, *_: object) -> None:
        self._stopping = True
        await asyncio.gather(*self._tasks)

    async def more(self, count: int) -> None:
        """Return after that many further answers, or at once when a caller has failed."""
        wanted = self.answered + count
        async with self._progress:
            await self._progress.wait_for(lambda: self.answered >= wanted or self._failed)

    async def _call(self, number: int) -> None:
        try:
            await self._score_until_stopped(number)
        except BaseException:
            self._failed = True
            raise
        finally:
            async with self._progress:
                self._progress.notify_all()

    async def _score_until_stopped(self, number: int) -> None:
        while not self._stopping:
            start = (number * 7 + self.answered) % (len(self._items) - 2)
            deadline = asyncio.get_running_loop().time() + SECONDS
            rewards = await score_items(self._arm, self._items[start : start + 2], deadline=deadline)
            assert list(rewards) == pytest.approx(self._expected[start : start + 2], abs=TOLERANCE)
            self.answered += 1
            async with self._progress:
                self._progress.notify_all()


@pytest.fixture
async def arm(server: VllmServer, cpu_worker: str) -> AsyncIterator[VllmArm]:
    """vLLM and the CPU worker as replicas of one RM, watched as the gateway watches them."""
    config = ArmConfig(
        name="rm",
        urls=(server.url, cpu_worker),
        model=SERVED,
        rendering=TemplateRendering(PlainTemplate()),
        attempt_timeout_seconds=5.0,
    )
    arm = VllmArm(config)
    monitor = HealthMonitor([arm], HealthPolicy(0.5, 5.0), np.random.default_rng(0))
    await monitor.check_all()
    assert [one.state for one in arm.snapshots()] == [BreakerState.CLOSED] * 2, arm.snapshots()
    monitor.start()
    yield arm
    await monitor.stop()
    await arm.close()


async def until_state(arm: VllmArm, state: BreakerState, seconds: float) -> None:
    """Wait until the breaker of the vLLM replica is in that state."""
    deadline = asyncio.get_running_loop().time() + seconds
    while arm.snapshots()[0].state is not state:
        assert asyncio.get_running_loop().time() < deadline, arm.snapshots()
        await asyncio.sleep(0.05)


@pytest.mark.parametrize("how", ["drained", "crashed"])
async def test_no_request_is_lost_when_vllm_goes_and_it_is_used_again_when_it_is_back(
    how: str, arm: VllmArm, server: VllmServer, demo_models: Path
) -> None:
    items = some_items(40)
    expected = Reference(demo_models / RM).rewards(items)
    async with Traffic(arm, items, expected) as traffic:
        await traffic.more(20)
        assert all(one.requests > 2 for one in arm.snapshots())
        if how == "drained":
            server.terminate()
        else:
            server.kill_engine()
        await traffic.more(50)
        await asyncio.to_thread(server.wait_until_left)
        await traffic.more(10)
        assert arm.snapshots()[0].state is not BreakerState.CLOSED
        assert arm.available
        if how == "crashed":
            return
        asked = arm.snapshots()[0].requests
        await traffic.more(10)
        assert arm.snapshots()[0].requests == asked
        server.launch()
        await asyncio.to_thread(server.wait_until_healthy)
        await until_state(arm, BreakerState.CLOSED, START_SECONDS)
        asked = arm.snapshots()[0].requests
        await traffic.more(20)
        assert arm.snapshots()[0].requests > asked

"""The load that workers tell, and the choice among replicas that follows it."""

from __future__ import annotations

import asyncio
from typing import Any

import numpy as np
import pytest

from service.scorers.rm.client import ArmConfig, VllmArm
from service.scorers.rm.health import LOAD_VALID_INTERVALS, HealthMonitor, HealthPolicy
from service.scorers.rm.render import PlainTemplate, TemplateRendering
from service.scorers.transport.load import read_load, write_load
from service.scorers.wire import PROBE_RESPONSE, ServedModel, sigmoid
from service.workers.server import WorkerApp, worker_config
from tests.service.scorers.worker_servers import Json, ScriptedWorker, Serve, reply, soon, until
from tests.support.arms import score_items

VLLM = b"""# HELP vllm:num_requests_running Number of requests in model execution batches.
# TYPE vllm:num_requests_running gauge
vllm:num_requests_running{engine="0",model_name="a } 9"} 3.0
vllm:num_requests_running{engine="1",model_name="b"} 2.0
# TYPE vllm:num_requests_waiting gauge
vllm:num_requests_waiting{engine="0",model_name="a } 9"} 1.1e+01
vllm:num_requests_waiting_by_reason{engine="0",reason="capacity"} 500.0
vllm:request_success_total{engine="0",finished_reason="stop"} 700.0
"""
PLAIN = TemplateRendering(PlainTemplate())
PAIR = [("p", "a"), ("p", "bb")]


def distinct(count: int) -> list[tuple[str, str]]:
    """Items of which none is equal to another: equal ones are asked once."""
    return [("p", "x" * number) for number in range(count)]


@pytest.mark.parametrize(
    ("metrics", "load"),
    [
        (VLLM, 16),
        (b"vllm:num_requests_running 4 1700000000000\n", 4),
        (b"vllm:num_requests_running NaN\n", None),
        (b"vllm:num_requests_running\n", None),
        (b"process_cpu_seconds_total 3.0\n", None),
        (b"<html>\xff</html>", None),
        (b"", None),
        (write_load({'odd " name\\': 5, "b": 0}), 5),
    ],
)
def test_what_runs_and_waits_is_read_from_vllm_s_metrics_alone(metrics: bytes, load: int | None) -> None:
    assert read_load(metrics) == load


def steady(request: Json) -> tuple[int, Any]:
    """1.5 for everything, so that the probe passes."""
    reward = 1.5 if request.get("use_activation") is False else sigmoid(1.5)
    return 200, reply([reward] * len(request.get("input", "1")))


class BusyWorker(ScriptedWorker):
    """Tells a load of its own."""

    def __init__(self, load: int) -> None:
        super().__init__()
        self.answer = steady
        self.load = load
        self.polls = 0

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http" or scope["path"] != "/metrics":
            await super().__call__(scope, receive, send)
            return
        self.polls += 1
        body = f'vllm:num_requests_waiting{{engine="0"}} {self.load}.0\n'.encode()
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"%d" % len(body))]})
        await send({"type": "http.response.body", "body": body})

    @property
    def pairs(self) -> int:
        """Requests that were no health checks."""
        return sum(
            PROBE_RESPONSE not in text
            for request in self.requests
            for text in request.get("input", [PROBE_RESPONSE])[:1]
        )


def arm_of(*urls: str, **options: Any) -> VllmArm:
    return VllmArm(ArmConfig(name="rm", urls=urls, rendering=PLAIN, **options))


async def measured(arm: VllmArm, *workers: BusyWorker) -> None:
    """Health checks until every worker was asked for its load after its probe."""
    monitor = HealthMonitor([arm], HealthPolicy(interval_seconds=0.02), np.random.default_rng(0))
    await monitor.check_all()
    monitor.start()
    await until(lambda: all(worker.polls >= 2 for worker in workers))
    await monitor.stop()


async def test_a_replica_that_others_keep_busy_is_asked_less(serve: Serve) -> None:
    busy, idle = BusyWorker(40), BusyWorker(0)
    now = 0.0
    config = ArmConfig(name="rm", urls=(serve(busy), serve(idle)), rendering=PLAIN)
    arm = VllmArm(config, clock=lambda: now)
    await measured(arm, busy, idle)
    assert [snapshot.others for snapshot in arm.snapshots()] == [40, 0]
    for _ in range(6):
        await score_items(arm, PAIR, deadline=soon())
    assert (busy.pairs, idle.pairs) == (0, 6)
    # Its word goes out of date where it is not repeated.
    now = LOAD_VALID_INTERVALS * 0.02 + 0.001
    for _ in range(6):
        await score_items(arm, PAIR, deadline=soon())
    assert (busy.pairs, idle.pairs) == (3, 9)
    await arm.close()


async def test_what_is_ours_is_not_counted_twice(serve: Serve) -> None:
    first, second = BusyWorker(64), BusyWorker(64)
    first.delay = second.delay = 0.5
    arm = arm_of(serve(first), serve(second))
    calls = [asyncio.create_task(score_items(arm, distinct(64), deadline=soon())) for _ in range(2)]
    await until(lambda: first.in_flight and second.in_flight)
    assert [replica.load for replica in arm.replicas] == [64, 64]
    for replica in arm.replicas:
        replica.report_load(70, valid_seconds=60)
    assert [(snapshot.items, snapshot.others) for snapshot in arm.snapshots()] == [(64, 6), (64, 6)]
    await asyncio.gather(*calls)
    assert [replica.load for replica in arm.replicas] == [6, 6]
    arm.replicas[0].report_load(None, valid_seconds=60)
    assert arm.replicas[0].others == 0
    await arm.close()


async def test_items_count_rather_than_requests(serve: Serve) -> None:
    workers = [ScriptedWorker(), ScriptedWorker()]
    for worker in workers:
        worker.delay = 0.3
    arm = arm_of(*map(serve, workers))
    many = asyncio.create_task(score_items(arm, distinct(60), deadline=soon()))
    await until(lambda: workers[0].requests or workers[1].requests)
    few = [asyncio.create_task(score_items(arm, PAIR, deadline=soon())) for _ in range(5)]
    await asyncio.gather(many, *few)
    assert sorted(len(worker.requests) for worker in workers) == [1, 5]
    await arm.close()


async def test_a_lone_replica_and_one_that_tells_no_load_are_simply_asked(serve: Serve) -> None:
    alone = BusyWorker(9)
    arm = arm_of(serve(alone))
    monitor = HealthMonitor([arm], HealthPolicy(interval_seconds=0.02), np.random.default_rng(0))
    await monitor.check_all()
    monitor.start()
    before = len(alone.requests)
    await until(lambda: len(alone.requests) > before + 3)
    await monitor.stop()
    assert alone.polls == 0
    await arm.close()
    silent = [ScriptedWorker(), ScriptedWorker()]
    for worker in silent:
        worker.answer = steady
    arm = arm_of(*map(serve, silent))
    monitor = HealthMonitor([arm], HealthPolicy(interval_seconds=0.02), np.random.default_rng(0))
    await monitor.check_all()
    monitor.start()
    checks = sum(len(worker.requests) for worker in silent)
    await until(lambda: sum(len(worker.requests) for worker in silent) > checks + 6)
    assert arm.available
    assert monitor.unexpected_errors == 0
    assert [snapshot.others for snapshot in arm.snapshots()] == [0, 0]
    await monitor.stop()
    await arm.close()


async def test_our_own_worker_tells_how_many_inputs_it_has(serve: Serve) -> None:
    class Slow:
        """A backend that answers when it is let."""

        models = (ServedModel("rm", max_model_len=10),)

        def __init__(self) -> None:
            self.entered = False
            self.open = False

        async def start(self) -> None: ...

        async def stop(self) -> None: ...

        def raw_by_default(self, model: str) -> bool:
            return False

        async def score(self, model: str, contents: Any, *, add_special_tokens: bool) -> Any:
            self.entered = True
            while not self.open:  # noqa: ASYNC110 - opened from another thread
                await asyncio.sleep(0.005)
            from service.workers.server import Scored

            return [Scored(0.0, 1) for _ in contents]

    backend = Slow()
    app = WorkerApp(backend)
    assert worker_config(app, host="127.0.0.1", port=0).lifespan == "on"
    arm = arm_of(serve(app))
    call = asyncio.create_task(score_items(arm, distinct(6), deadline=soon()))
    await until(lambda: backend.entered)
    told = await arm.replicas[0].check("GET", "/metrics", deadline=soon())
    assert (told.status, read_load(told.body)) == (200, 6)
    backend.open = True
    await call
    assert read_load((await arm.replicas[0].check("GET", "/metrics", deadline=soon())).body) == 0
    await arm.close()

"""Registration probes and the health monitor, against real servers that go away and come back."""

from __future__ import annotations

import asyncio
import math
from typing import Any

import numpy as np
import pytest

from service.workers.breaker import BreakerPolicy, BreakerState
from service.workers.client import ArmConfig, VllmArm
from service.workers.health import HealthMonitor, HealthPolicy
from service.workers.probe import probe
from service.workers.render import ChatTemplate, PlainTemplate, TemplateRendering
from tests.service.workers.worker_servers import Json, RunningWorker, ScriptedWorker, Serve, error, reply, soon, until

PLAIN = TemplateRendering(PlainTemplate())
FAST = HealthPolicy(interval_seconds=0.02, timeout_seconds=0.5)


def logits(raw: float, *, default: float | None = None, messages: float | None = None) -> Any:
    """Answers like vLLM: `raw` with the flag, its sigmoid without; `messages` when templated by the worker."""

    def answer(request: Json) -> tuple[int, Any]:
        value = messages if messages is not None and "messages" in request else raw
        if request.get("use_activation") is False:
            return 200, reply([value])
        return 200, reply([1 / (1 + math.exp(-value)) if default is None else default])

    return answer


def arm_for(*urls: str, **options: Any) -> VllmArm:
    return VllmArm(ArmConfig(name="rm", urls=urls, **options))


async def test_a_good_worker_passes(serve: Serve) -> None:
    worker = ScriptedWorker()
    worker.answer = logits(-1.55)
    arm = arm_for(serve(worker), rendering=PLAIN)
    (report,) = await probe(arm, deadline=soon())
    assert report.ok
    assert not report.warnings
    assert (report.served, report.raw) == (("rm",), -1.55)
    await arm.close()


@pytest.mark.parametrize(
    ("answer", "problem", "warning"),
    [
        (logits(-1.55, default=0.9), "neither the raw", ""),
        (logits(0.42, default=0.42), "", "may ignore the flag"),
        (logits(-1.55, default=-1.55), "", ""),
        (logits(-0.79, messages=-0.97), "template or its special tokens differ", ""),
        (lambda request: (200, reply([0.1], classes=2)), "one finite reward", ""),
        (lambda request: (400, error("no chat template", 400)), "no chat template", ""),
    ],
)
async def test_what_is_wrong_with_a_worker_is_said(serve: Serve, answer: Any, problem: str, warning: str) -> None:
    worker = ScriptedWorker()
    worker.answer = answer
    arm = arm_for(serve(worker), rendering=PLAIN)
    (report,) = await probe(arm, deadline=soon())
    for found, words in ((report.problems, problem), (report.warnings, warning)):
        assert (words in " ".join(found)) if words else not found
    await arm.close()


async def test_a_worker_of_another_model_and_one_that_is_gone_are_told_apart(serve: Serve, refused_url: str) -> None:
    arm = arm_for(serve(ScriptedWorker("other")), refused_url)
    other, gone = await probe(arm, deadline=soon())
    assert "serves other, not 'rm'" in other.problems[0]
    assert not gone.ok
    await arm.close()


async def test_the_probe_can_use_a_template_of_the_model(serve: Serve) -> None:
    worker = ScriptedWorker()
    worker.answer = logits(2.0)
    arm = arm_for(serve(worker), rendering=TemplateRendering(ChatTemplate("{{ messages[0].content }}!")))
    assert (await probe(arm, deadline=soon()))[0].ok
    assert worker.requests[0]["input"] == ["ping!"]
    await arm.close()


async def test_the_monitor_takes_a_dead_replica_out_and_back_without_traffic(serve: Serve) -> None:
    worker = ScriptedWorker()
    arm = arm_for(serve(worker), breaker=BreakerPolicy(failures_to_open=2, backoff_seconds=30))
    monitor = HealthMonitor([arm], FAST, np.random.default_rng(0))
    monitor.start()
    await until(lambda: worker.requests)
    assert arm.available
    worker.answer = lambda request: (503, error("asleep", 503))
    await until(lambda: not arm.available)
    assert arm.snapshots()[0].state is BreakerState.OPEN
    worker.answer = worker.lengths
    await until(lambda: arm.available)
    assert monitor.running
    assert monitor.unexpected_errors == 0
    await monitor.stop()
    assert not monitor.running
    await arm.close()


async def test_a_check_that_finds_the_port_closed_frees_what_hangs_there(serve: Serve) -> None:
    """vLLM closes its port on SIGTERM first and may leave requests hanging."""
    good = ScriptedWorker()
    stuck = asyncio.Event()

    async def hang(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        stuck.set()
        try:
            while await reader.read(4096):
                pass
        except ConnectionError:
            pass
        finally:
            writer.close()

    server = await asyncio.start_server(hang, "127.0.0.1", 0)
    url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    arm = arm_for(url, serve(good), attempt_timeout_seconds=60)
    task = asyncio.create_task(arm.score([("p", "four")], deadline=soon(60)))
    await stuck.wait()
    server.close()
    monitor = HealthMonitor([arm], FAST, np.random.default_rng(0))
    monitor.start()
    async with asyncio.timeout(5):
        assert await task == [4.0]
    assert arm.snapshots()[0].state is BreakerState.OPEN
    await monitor.stop()
    await arm.close()
    await asyncio.sleep(0.01)


async def test_checks_all_at_once_at_start_up(serve: Serve, refused_url: str) -> None:
    arm = arm_for(serve(ScriptedWorker()), refused_url)
    await HealthMonitor([arm], FAST, np.random.default_rng(0)).check_all()
    assert [snapshot.state for snapshot in arm.snapshots()] == [BreakerState.CLOSED, BreakerState.OPEN]
    await arm.close()


async def test_a_worker_that_is_stopped_in_the_middle_of_traffic_costs_no_call(serve: Serve) -> None:
    doomed, good = ScriptedWorker(), ScriptedWorker()
    doomed.delay = good.delay = 0.01
    running = RunningWorker(doomed)
    arm = arm_for(running.url, serve(good))
    calls = [asyncio.create_task(arm.score([("p", "four")] * 5, deadline=soon(20))) for _ in range(20)]
    await until(lambda: doomed.requests)
    running.stop()
    assert await asyncio.gather(*calls) == [[4.0] * 5] * 20
    running.join()
    await arm.close()


async def test_a_senseless_policy_is_refused() -> None:
    with pytest.raises(ValueError, match="health policy"):
        HealthPolicy(interval_seconds=0)

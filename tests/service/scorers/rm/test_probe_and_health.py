"""Registration probes and the health monitor, against real servers that go away and come back."""

from __future__ import annotations

import asyncio
import json
import logging
import math
from typing import Any

import numpy as np
import pytest

from service.scorers.rm.client import ArmConfig, VllmArm
from service.scorers.rm.health import HealthMonitor, HealthPolicy
from service.scorers.rm.probe import probe
from service.scorers.rm.render import ChatTemplate, PlainTemplate, TemplateRendering
from service.scorers.transport.breaker import BreakerPolicy, BreakerState
from service.telemetry import JsonFormatter
from tests.service.scorers.worker_servers import (
    Json,
    RawServer,
    RunningWorker,
    ScriptedWorker,
    Serve,
    error,
    reply,
    soon,
    until,
)
from tests.support.arms import score_items

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
        (lambda request: (200, reply([0.1], classes=2)), "set `head` or `heads`", ""),
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
    assert other.unavailable is None
    assert (gone.ok, gone.problems) == (False, ())
    assert gone.unavailable is not None
    await arm.close()


async def test_a_worker_that_lists_no_models_but_answers_may_be_used(serve: Serve) -> None:
    """vLLM's API key guards `/v1/models` alone."""

    class Guarded(ScriptedWorker):
        async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
            if scope["type"] == "http" and scope["path"] == "/v1/models":
                await send({"type": "http.response.start", "status": 401, "headers": [(b"content-length", b"0")]})
                await send({"type": "http.response.body"})
            else:
                await super().__call__(scope, receive, send)

    worker = Guarded()
    worker.answer = logits(-1.55)
    arm = arm_for(serve(worker))
    (report,) = await probe(arm, deadline=soon())
    assert report.ok
    assert "/v1/models answered 401" in report.warnings[0]
    await arm.close()


async def test_a_worker_that_is_still_loading_has_no_problem(serve: Serve) -> None:
    worker = ScriptedWorker()
    worker.answer = lambda request: (503, error("loading", 503))
    arm = arm_for(serve(worker))
    (report,) = await probe(arm, deadline=soon())
    assert (report.ok, report.problems) == (False, ())
    assert "loading" in (report.unavailable or "")
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
    task = asyncio.create_task(score_items(arm, [("p", "four")], deadline=soon(60)))
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


async def test_a_replica_with_a_problem_gets_no_traffic_until_a_probe_passes(serve: Serve) -> None:
    wrong, good = ScriptedWorker("other"), ScriptedWorker()
    arm = arm_for(serve(wrong), serve(good), breaker=BreakerPolicy(backoff_seconds=0.001, max_backoff_seconds=0.001))
    monitor = HealthMonitor([arm], FAST, np.random.default_rng(0))
    await monitor.check_all()
    rejected, fine = arm.snapshots()
    assert rejected.problem == "serves other, not 'rm': check the served model name"
    assert rejected.state is BreakerState.OPEN
    assert (fine.problem, fine.state) == (None, BreakerState.CLOSED)
    await asyncio.gather(*(score_items(arm, [("p", "four")], deadline=soon()) for _ in range(8)))
    assert not wrong.requests
    wrong.name = "rm"
    monitor.start()
    await until(lambda: arm.snapshots()[0].state is BreakerState.CLOSED)
    assert arm.snapshots()[0].problem is None
    await monitor.stop()
    await arm.close()


async def test_a_replica_whose_template_differs_is_kept_out_though_it_answers(serve: Serve) -> None:
    worker = ScriptedWorker()
    worker.answer = logits(-0.79, messages=-0.97)
    arm = arm_for(serve(worker), rendering=PLAIN, breaker=BreakerPolicy(backoff_seconds=0.001))
    monitor = HealthMonitor([arm], FAST, np.random.default_rng(0))
    await monitor.check_all()
    monitor.start()
    seen = len(worker.requests)
    await until(lambda: len(worker.requests) > seen + 4)
    assert not arm.available
    assert "template" in (arm.snapshots()[0].problem or "")
    await monitor.stop()
    await arm.close()


async def test_a_worker_that_comes_up_after_start_up_is_probed_before_it_gets_traffic(refused_url: str) -> None:
    arm = arm_for(refused_url, breaker=BreakerPolicy(backoff_seconds=0.001, max_backoff_seconds=0.001))
    monitor = HealthMonitor([arm], FAST, np.random.default_rng(0))
    await monitor.check_all()
    assert (arm.available, arm.snapshots()[0].problem) == (False, None)
    monitor.start()
    port = int(refused_url.rsplit(":", 1)[1])
    wrong = RunningWorker(ScriptedWorker("other"), port)
    await until(lambda: arm.snapshots()[0].problem)
    assert not arm.available
    wrong.stop()
    wrong.join()
    right = RunningWorker(ScriptedWorker(), port)
    await until(lambda: arm.available)
    assert arm.snapshots()[0].problem is None
    await monitor.stop()
    right.stop()
    right.join()
    await arm.close()


async def test_a_replica_that_refused_is_probed_again_before_it_gets_traffic() -> None:
    first = RunningWorker(ScriptedWorker())
    port = int(first.url.rsplit(":", 1)[1])
    arm = arm_for(first.url, breaker=BreakerPolicy(backoff_seconds=0.001, max_backoff_seconds=0.001))
    monitor = HealthMonitor([arm], FAST, np.random.default_rng(0))
    await monitor.check_all()
    monitor.start()
    assert arm.available
    first.stop()
    first.join()
    await until(lambda: not arm.available)
    other = ScriptedWorker()
    other.answer = logits(-1.55, default=0.9)
    second = RunningWorker(other, port)
    await until(lambda: arm.snapshots()[0].problem)
    assert not arm.available
    await monitor.stop()
    second.stop()
    second.join()
    await arm.close()


async def test_a_replica_that_begins_to_refuse_the_check_is_probed_for_the_reason(serve: Serve) -> None:
    worker = ScriptedWorker()
    arm = arm_for(serve(worker))
    monitor = HealthMonitor([arm], FAST, np.random.default_rng(0))
    await monitor.check_all()
    monitor.start()
    worker.name = "other"
    worker.answer = lambda request: (404, error("The model `rm` does not exist.", 404))
    await until(lambda: "serves other" in (arm.snapshots()[0].problem or ""))
    await monitor.stop()
    await arm.close()


async def test_a_replica_in_use_that_is_too_slow_for_a_whole_probe_stays_in_use(serve: Serve) -> None:
    worker = ScriptedWorker()

    def slow_by_default(request: Json) -> tuple[int, Any]:
        worker.delay = 30
        return worker.lengths(request)

    worker.answer = slow_by_default
    arm = arm_for(serve(worker), breaker=BreakerPolicy(failures_to_open=1))
    monitor = HealthMonitor([arm], HealthPolicy(interval_seconds=0.02, timeout_seconds=1.0), np.random.default_rng(0))
    monitor.start()
    await until(lambda: len(worker.requests) == 2)
    worker.answer, worker.delay = worker.lengths, 0.0
    await until(lambda: len(worker.requests) > 2)
    assert (arm.available, arm.snapshots()[0].failures) == (True, 0)
    await monitor.stop()
    await arm.close()


async def test_start_up_does_not_wait_for_a_dead_worker_longer_than_a_check(raw_server: RawServer) -> None:
    async def silence(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read()

    async with raw_server(silence) as url:
        arm = arm_for(url, attempt_timeout_seconds=60)
        async with asyncio.timeout(20):
            await HealthMonitor([arm], FAST, np.random.default_rng(0)).check_all()
        assert not arm.available
        assert arm.snapshots()[0].problem is None
        await arm.close()


async def test_logs_name_the_model_the_replica_and_the_reason(
    serve: Serve, refused_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, logger="service.workers")
    flag_ignored = ScriptedWorker()
    flag_ignored.answer = logits(0.42, default=0.42)
    arm = arm_for(serve(ScriptedWorker("other")), refused_url, serve(flag_ignored))
    monitor = HealthMonitor([arm], FAST, np.random.default_rng(0))
    for _ in range(3):
        await monitor.check_all()
    lines = [json.loads(JsonFormatter().format(record)) for record in caplog.records]
    found = {(line["event"], line["url"]): line for line in lines if line["level"] == "warning"}
    wrong, gone, ignored = arm.config.urls
    assert "serves other" in found["worker replica rejected", wrong]["reason"]
    assert "onnect" in found["worker replica is not ready", gone]["reason"]
    assert "ignore the flag" in found["worker probe", ignored]["reason"]
    assert {line["model"] for line in lines} == {"rm"}
    assert len(found) == sum(line["level"] == "warning" for line in lines), "said once, not at every check"
    await arm.close()


async def test_a_fault_of_our_own_is_counted_logged_and_not_trusted(
    serve: Serve, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    arm = arm_for(serve(ScriptedWorker()))
    monitor = HealthMonitor([arm], FAST, np.random.default_rng(0))
    await monitor.check_all()

    def fail(*args: object, **options: object) -> None:
        raise RuntimeError("a bug")

    monkeypatch.setattr(arm.replicas[0], "check", fail)
    monitor.start()
    await until(lambda: monitor.unexpected_errors >= 3)
    assert monitor.running
    await monitor.stop()
    assert not arm.available
    line = json.loads(JsonFormatter().format(caplog.records[0]))
    assert (line["url"], "a bug" in line["exception"]) == (arm.replicas[0].url, True)
    await arm.close()


async def test_a_worker_that_is_stopped_in_the_middle_of_traffic_costs_no_call(serve: Serve) -> None:
    doomed, good = ScriptedWorker(), ScriptedWorker()
    doomed.delay = good.delay = 0.01
    running = RunningWorker(doomed)
    arm = arm_for(running.url, serve(good))
    calls = [asyncio.create_task(score_items(arm, [("p", "four")] * 5, deadline=soon(20))) for _ in range(20)]
    await until(lambda: doomed.requests)
    running.stop()
    assert await asyncio.gather(*calls) == [[4.0] * 5] * 20
    running.join()
    await arm.close()


async def test_a_senseless_policy_is_refused() -> None:
    with pytest.raises(ValueError, match="health policy"):
        HealthPolicy(interval_seconds=0)

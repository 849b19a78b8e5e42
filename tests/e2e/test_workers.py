"""Several gateway processes at one port: real processes, a real store, real signals."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from tests.support.processes import READY_SECONDS, Caller, Service, Services, fetch, write_recorded_pairs
from tests.support.workers import ask, children_of

if TYPE_CHECKING:
    from router_core.records import LabelledPair
    from tests.conftest import ValkeyProcess

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="needs Linux: SO_REUSEPORT, /proc"),
]


HANG_SECONDS = 5
"""Long enough for a busy machine not to be silent for so long."""


class Crew:
    """`serve --workers 2`, and the pairs that its worker knows."""

    def __init__(self, gateway: Service, pairs: list[LabelledPair]) -> None:
        self.gateway = gateway
        self.pairs = pairs

    @property
    def pid(self) -> int:
        """Of the process that holds the port."""
        assert self.gateway.process is not None
        return self.gateway.process.pid

    def both(self, *, without: int = 0) -> list[int]:
        """Pids of the two, once both answer; none of them is `without`."""
        until = time.monotonic() + READY_SECONDS
        while time.monotonic() < until:
            pids = children_of(self.pid)
            if len(pids) == 2 and without not in pids:
                assert [ask(self.gateway.port, pid, "/healthz")[0] for pid in pids] == [200, 200]
                return pids
            time.sleep(0.05)
        raise AssertionError(self.gateway.log.read_text()[-3000:])

    def body(self, index: int) -> dict[str, Any]:
        """Of one pair."""
        instance = self.pairs[index].instance
        return {"prompt": instance.prompt, "responses": list(instance.responses)}


@pytest.fixture
def crew(request: pytest.FixtureRequest, tmp_path: Path, own_valkey_server: ValkeyProcess) -> Iterator[Crew]:
    """Two processes; a test's parameter is their `hang_seconds`."""
    pytest.importorskip("wordllama", reason="needs reward-router[embedded]")
    pairs = write_recorded_pairs(tmp_path / "pairs.jsonl", 24)
    with Services(tmp_path) as services:
        worker = services.worker(tmp_path / "pairs.jsonl")
        worker.wait_until_ready()
        settings = {"block_size": 4, "refresh_events": 8, "hang_seconds": getattr(request, "param", 30)}
        gateway = services.gateway("gateway", worker, own_valkey_server.url, workers=2, **settings)
        gateway.wait_until_ready()
        yield Crew(gateway, pairs)


def learned(crew: Crew, pid: int, version: int) -> dict[str, Any]:
    """The posterior of one process, once it has learned from so many events."""
    until = time.monotonic() + READY_SECONDS
    while time.monotonic() < until:
        status, document = ask(crew.gateway.port, pid, "/posterior")
        if status == 200 and document["version"] >= version:
            found: dict[str, Any] = document
            return found
        time.sleep(0.05)
    raise AssertionError(f"process {pid} has not learned from {version} events")


def total(metrics: str, name: str) -> float:
    """Sum over the labels of one metric."""
    rows = re.findall(rf"^reward_router_{name}(?:\{{[^}}]*\}})? (\S+)$", metrics, re.M)
    return sum(map(float, rows))


def count_of_stage(metrics: str, stage: str) -> float:
    """Requests whose time in a stage was taken."""
    (count,) = re.findall(rf'^reward_router_stage_seconds_count\{{stage="{stage}"\}} (\S+)$', metrics, re.M)
    return float(count)


def test_feedback_to_any_process_teaches_all_alike(crew: Crew) -> None:
    first, second = crew.both()
    port = crew.gateway.port
    for index in range(len(crew.pairs)):
        asked, told = (first, second) if index % 2 else (second, first)
        status, reply = ask(port, asked, "/reward", crew.body(index))
        assert status == 200, reply
        feedback = {"decision_id": reply["decision_id"], "preferred": crew.pairs[index].label}
        assert ask(port, told, "/feedback", feedback)[0] == 200
    posteriors = [learned(crew, pid, len(crew.pairs)) for pid in (first, second)]
    assert posteriors[0]["digest"] == posteriors[1]["digest"]
    # Any of them answers a scrape for both.
    for pid in (first, second):
        status, metrics = ask(port, pid, "/metrics")
        assert status == 200
        assert total(metrics, "decisions_total") == len(crew.pairs)
        assert total(metrics, "feedback_total") == len(crew.pairs)
        assert total(metrics, "store_up") == 1
        assert total(metrics, "worker_up") == 3
    # Times are written down every few seconds only.
    until = time.monotonic() + READY_SECONDS
    while count_of_stage(ask(port, first, "/metrics")[1], "total") < len(crew.pairs):
        assert time.monotonic() < until
        time.sleep(0.1)
    assert count_of_stage(ask(port, second, "/metrics")[1], "total") == len(crew.pairs)


def test_a_killed_process_is_replaced_and_the_port_keeps_answering(crew: Crew) -> None:
    first, second = crew.both()
    assert ask(crew.gateway.port, first, "/reward", crew.body(0))[0] == 200
    os.kill(first, signal.SIGKILL)
    # Its socket is gone with it, so that every new connection is the other's, until there are two again.
    deaf = 0
    until = time.monotonic() + READY_SECONDS
    while len(children_of(crew.pid)) < 2 or first in children_of(crew.pid):
        deaf += fetch(f"{crew.gateway.url}/healthz")[0] != 200
        assert time.monotonic() < until, crew.gateway.log.read_text()[-3000:]
    # The one request that a dying process had taken may be lost.
    assert deaf <= 1
    pids = crew.both(without=first)
    assert second in pids
    (fresh,) = set(pids) - {second}
    learned(crew, second, 0)
    status, metrics = ask(crew.gateway.port, second, "/metrics")
    assert status == 200
    # What it has counted stays; what it was doing is over.
    assert total(metrics, "decisions_total") == 1
    assert total(metrics, "requests_in_flight") == 0
    until = time.monotonic() + READY_SECONDS
    while ask(crew.gateway.port, fresh, "/reward", crew.body(1))[0] != 200:
        assert time.monotonic() < until
    assert "gateway process left" in crew.gateway.log.read_text()


@pytest.mark.parametrize("crew", [HANG_SECONDS], indirect=True)
def test_a_process_that_hangs_is_killed_and_replaced(crew: Crew) -> None:
    first, second = crew.both()
    os.kill(first, signal.SIGSTOP)
    pids = crew.both(without=first)
    assert second in pids
    log = crew.gateway.log.read_text()
    assert f'"pid": {first}' in log
    assert "gateway process hangs, was killed" in log
    assert "gateway process left" in log


@pytest.mark.parametrize("crew", [HANG_SECONDS], indirect=True)
def test_processes_that_were_stopped_with_their_parent_live_on(crew: Crew) -> None:
    pids = crew.both()
    together = [crew.pid, *pids]
    for pid in together:
        os.kill(pid, signal.SIGSTOP)
    time.sleep(HANG_SECONDS + 1)
    for pid in together:
        os.kill(pid, signal.SIGCONT)
    assert crew.both() == pids
    time.sleep(1)
    assert crew.both() == pids
    assert "hangs" not in crew.gateway.log.read_text()


async def test_a_signal_lets_both_answer_what_they_have_taken(crew: Crew) -> None:
    crew.both()
    caller = Caller(crew.gateway.url)
    requests = [asyncio.create_task(caller.post("/reward", crew.body(index))) for index in range(16)]
    await asyncio.sleep(0)
    assert {status for status, _ in await asyncio.gather(*requests)} == {200}
    assert crew.gateway.process is not None
    crew.gateway.process.send_signal(signal.SIGTERM)
    assert await asyncio.to_thread(crew.gateway.process.wait, 30) == 0
    assert fetch(f"{crew.gateway.url}/healthz")[0] == 0
    await caller.close()


def test_processes_end_with_the_one_that_holds_the_port(crew: Crew) -> None:
    pids = crew.both()
    crew.gateway.kill()
    until = time.monotonic() + READY_SECONDS
    while any(Path(f"/proc/{pid}/fd").exists() and fetch(f"{crew.gateway.url}/healthz")[0] for pid in pids):
        assert time.monotonic() < until
        time.sleep(0.05)


def serve(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    (folder / "pool.yaml").write_text("models: [{name: rm, urls: ['http://127.0.0.1:9'], rendering: template}]\n")
    return subprocess.run(
        [sys.executable, "-m", "service.cli", "serve", "--pool", str(folder / "pool.yaml"), "--workers", "2", *words],
        capture_output=True,
        text=True,
        timeout=90,
        check=False,
    )


def test_a_taken_port_is_one_sentence_and_status_2(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        done = serve(tmp_path, "--store", "redis://127.0.0.1:9/0", "--port", str(taken.getsockname()[1]))
    assert done.returncode == 2, done.stderr
    assert "choose another host or port" in " ".join(done.stderr.split())


def test_what_no_process_can_start_with_ends_all(tmp_path: Path) -> None:
    done = serve(tmp_path, "--store", "redis://127.0.0.1:9/0", "--port", "0", "--policy", "nonsense")
    assert done.returncode == 2, done.stderr
    assert "nonsense" in done.stderr
    assert "Traceback" not in done.stderr

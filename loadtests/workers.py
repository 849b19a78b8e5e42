"""Requests/s of `reward-router serve --workers N` at one port, for N = 1 and 2.

    python -m loadtests.workers [--json OUT] [--rounds N] [--requests N] [--workers N …]

The real command with a real store, four stub RMs and the static encoder, one pair a request, 32 connections. The
numbers of processes take turns; medians over rounds are printed. Nothing is pinned: load generator, stub and store
share the cores with the gateways, so that N processes need N free cores beside them to be N times as fast. Requests a
CPU second say what a process costs, whatever else the machine does.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
import urllib.request
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from statistics import median
from typing import Any

import uvloop

from loadtests.client import load, request_bytes
from loadtests.gateway import cpu_seconds, long_pairs
from loadtests.report import describe, machine, table, write_json
from loadtests.scene import scene
from loadtests.stub import MODELS
from service.cli.processes import free_port
from service.pool import ModelEntry, PoolFile, dump_pool

CONNECTIONS = 32
"""The kernel divides them among the processes by chance; with many, no process is left out."""

START_SECONDS = 120.0
"""How long a gateway may take until it is ready."""


class Served:
    """`reward-router serve` with some processes; ended by `close`.

    Args:
        workers: how many.
        pool: pool file.
        store: URL of the store.
        folder: for its log.
    """

    def __init__(self, workers: int, pool: Path, store: str, folder: Path) -> None:
        self.port = free_port(0)
        self._log = folder / f"serve-{workers}.log"
        words = ["--pool", str(pool), "--store", store, "--run", f"workers-{workers}", "--workers", str(workers)]
        with self._log.open("wb") as output:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "service.cli", "serve", *words, "--port", str(self.port)],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
            )
        self._workers = workers

    def wait(self) -> None:
        """Return when every process serves."""
        deadline = time.monotonic() + START_SECONDS
        while not self._ready() or len(self._serving()) < self._workers:
            if self.process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"not ready: {self._log.read_text('utf-8')[-2000:]}")
            time.sleep(0.1)

    def _ready(self) -> bool:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/readyz", timeout=2) as answer:
                return bool(answer.status == 200)
        except OSError:
            return False

    def _serving(self) -> list[int]:
        """Pids of the processes that serve: those that listen."""
        if self._workers == 1:
            return [self.process.pid]
        listed = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()
        return [int(pid) for pid in listed if b"serve_one" in Path(f"/proc/{pid}/cmdline").read_bytes()]

    def cpu_seconds(self) -> float:
        """CPU time of all of them so far."""
        return sum(map(cpu_seconds, self._serving()))

    def close(self) -> None:
        """End it."""
        self.process.terminate()
        try:
            self.process.wait(30)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


async def measure(served: Served, messages: Sequence[bytes], requests: int) -> dict[str, float]:
    """One turn of one number of processes."""
    await load(served.port, messages, count=requests // 10, concurrency=CONNECTIONS)
    before = served.cpu_seconds()
    seconds, wall = await load(served.port, messages, count=requests, concurrency=CONNECTIONS)
    spent = served.cpu_seconds() - before
    return {
        "requests_per_second": requests / wall,
        "p50_ms": median(seconds) * 1e3,
        "requests_per_cpu_second": requests / spent,
    }


async def run(counts: Sequence[int], rounds: int, requests: int) -> dict[int, dict[str, float]]:
    """Start all, measure in turn, end all; medians by number of processes."""
    messages = [request_bytes("/reward", pair.reward()) for pair in long_pairs(1024)]
    with ExitStack() as stack:
        place = stack.enter_context(scene())
        folder, children = place.folder, place.children
        children.start("stub", "stub", "/health", tested=False)
        url = f"http://127.0.0.1:{children.ports['stub']}"
        pool = folder / "pool.yaml"
        models = [ModelEntry(name=name, urls=(url,), rendering="template") for name in MODELS]
        dump_pool(PoolFile(name="bench", models=tuple(models)), pool)
        served = {count: Served(count, pool, place.store_url, folder) for count in counts}
        for one in served.values():
            stack.callback(one.close)
        for one in served.values():
            one.wait()
        turns: dict[int, list[dict[str, float]]] = {count: [] for count in counts}
        for _ in range(rounds):
            for count, one in served.items():
                turns[count].append(await measure(one, messages, requests))
    return {count: {key: median(turn[key] for turn in taken) for key in taken[0]} for count, taken in turns.items()}


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(prog="python -m loadtests.workers", description=__doc__.partition("\n")[0])
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    parser.add_argument("--rounds", type=int, default=5, help="turns of each [default: 5]")
    parser.add_argument("--requests", type=int, default=4000, help="requests per turn [default: 4000]")
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2], help="numbers of processes [default: 1 2]")
    options = parser.parse_args(arguments)
    facts = machine()
    print(describe(facts))
    figures = uvloop.run(run(options.workers, options.rounds, options.requests))
    print(f"{options.rounds} rounds of {options.requests} requests, {CONNECTIONS} connections, "
          f"{len(os.sched_getaffinity(0))} cores shared by all")  # fmt: skip
    table(
        "one pair a request, static encoder",
        ("processes", "requests/s", "p50 ms", "requests/CPU s"),
        [(str(count), *(f"{value:,.1f}" for value in row.values())) for count, row in figures.items()],
    )
    document: dict[str, Any] = {"machine": facts, "connections": CONNECTIONS, "by_workers": figures}
    write_json(options.json, document)


if __name__ == "__main__":
    main()

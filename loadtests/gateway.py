"""What the gateway adds over calling a worker directly, beside a FastAPI + aiohttp pass-through, in one run.

    python -m loadtests.gateway [--json OUT] [--rounds N] [--quick] [--tracing] [--against CHECKOUT]

One process each: a stub worker (constant rewards), the pass-through, and the real gateway (`service.app.create_app` on
uvicorn, uvloop and httptools, with a real embedded store) in several settings. They take turns in interleaved rounds;
medians over rounds are printed. Loopback only.

Cores: with two or more, the process under test has the last core to itself, and stub, store and load generator share
the first. A process of idle priority keeps each core awake: on a virtual machine a core that sleeps for a few
microseconds, as it does three times a request at concurrency 1, comes back cold, which doubles all CPU times and says
nothing about the code; `--let-cores-sleep` leaves that out. Requests per second of a core are requests per second of
the gateway's own CPU time (all its threads).

`--tracing` measures the gateway with spans on, too (docs/tracing.md); they are sent to the stub.

`--against` takes the folder of another checkout of this project (`git worktree add`): its gateway runs too, in turns
with this one, and a last table has the ratios of the two within each round.
"""

from __future__ import annotations

import argparse
import json
import os
import pydoc_data.topics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import uvloop

from loadtests.client import load, request_bytes
from loadtests.report import describe, machine, table, write_json
from loadtests.stub import MODELS
from service.cli.processes import free_port
from service.pool import ModelEntry, PoolFile, dump_pool
from service.scorers.rm.render import PlainTemplate
from service.stores.embedded import EmbeddedStore

SEED = 7

FEEDBACKS = 320
"""Feedbacks given before anything is measured, so that the posterior has absorbed blocks and holds tails."""

BATCH = 256
"""Pairs of one `/reward/batch` request."""

GOALS = {
    "added p50 at concurrency 1, ms": "<= 1.0 (aim 0.45)",
    "requests/s a core at concurrency 16": ">= 1500 (aim 3500)",
    "pairs/s of /reward/batch": ">= 5000",
}

SINGLES = (
    ("hash64", "look-up encoder d=64", "short"),
    ("hash576", "look-up encoder d=576", "short"),
    ("hash576", "look-up encoder d=576", "long"),
    ("static", "static encoder d=128", "long"),
)
"""The gateways that are measured: process, name and texts."""

TRACED = "ours, spans on, static encoder d=128, long"
"""Name of the gateway that makes spans, beside the same one without."""

OTHER = "the other checkout"
"""Its name in the tables."""

START_SECONDS = 60.0
"""How long a child may take until it answers."""


@dataclass(frozen=True, slots=True)
class Pair:
    """One prompt with two responses."""

    prompt: str
    responses: tuple[str, str]

    def reward(self) -> bytes:
        """Body of `/reward`."""
        return json.dumps({"prompt": self.prompt, "responses": self.responses}).encode()

    def classify(self) -> bytes:
        """Body of `/classify`: what the gateway sends for this pair."""
        texts = [PlainTemplate().render(self.prompt, response) for response in self.responses]
        return json.dumps({"model": MODELS[0], "input": texts, "use_activation": False}).encode()


@dataclass(frozen=True, slots=True)
class Target:
    """One process under test with one kind of texts.

    Attributes:
        name: for the table.
        base: name of the bare target that its times are compared with; its own for a bare one.
        process: key of the child.
        messages: prebuilt requests.
    """

    name: str
    base: str
    process: str
    messages: list[bytes]


@dataclass(frozen=True, slots=True)
class Figures:
    """One target in one round: seconds at concurrency 1, requests/s at 1 and 16, CPU seconds per request at 16."""

    p50: float
    p99: float
    rate1: float
    rate16: float
    cpu_seconds: float


class Children:
    """The processes under test; ends those that it started.

    Args:
        folder: for logs and the pool file.
        cores: (for everything else, for the process under test), or None where there is one core only.
    """

    def __init__(self, folder: Path, cores: tuple[int, int] | None) -> None:
        self._folder = folder
        self._cores = cores
        self.ports: dict[str, int] = {}
        self.processes: dict[str, subprocess.Popen[bytes]] = {}

    def __enter__(self) -> Children:
        return self

    def __exit__(self, *_: object) -> None:
        for process in self.processes.values():
            process.terminate()
        for process in self.processes.values():
            try:
                process.wait(15)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()

    def start(self, name: str, kind: str, ready: str, *more: str, tested: bool, folder: Path | None = None) -> None:
        """Start `python -m loadtests.stub KIND`, of the checkout in `folder`, and wait for 200 from GET `ready`."""
        port = free_port(0)
        core = [] if self._cores is None else ["--core", str(self._cores[tested])]
        log = self._folder / f"{name}.log"
        with log.open("wb") as output:
            self.processes[name] = process = subprocess.Popen(
                [sys.executable, "-m", "loadtests.stub", kind, "--port", str(port), *core, *more],
                cwd=folder,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
            )
        self.ports[name] = port
        deadline = time.monotonic() + START_SECONDS
        while True:
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{port}{ready}", timeout=2) as answer:
                    if answer.status == 200:
                        return
            except OSError as error:
                if process.poll() is not None or time.monotonic() > deadline:
                    raise RuntimeError(f"{name} did not start: {log.read_text('utf-8')[-2000:]}") from error
            time.sleep(0.1)

    def keep_awake(self) -> None:
        """One process of idle priority per core, where cores are pinned."""
        for core in self._cores or ():
            self.processes[f"awake{core}"] = subprocess.Popen(
                [sys.executable, "-m", "loadtests.stub", "awake", "--core", str(core)],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
            )

    def cpu_seconds(self, name: str) -> float:
        """CPU time of all threads of a child so far."""
        return cpu_seconds(self.processes[name].pid)


def cpu_seconds(pid: int) -> float:
    """CPU time of all threads of a process, from the scheduler in nanoseconds, else from its ticks of 10 ms."""
    tasks = Path(f"/proc/{pid}/task")
    try:
        return sum(int((task / "schedstat").read_text().split()[0]) for task in tasks.iterdir()) / 1e9
    except (OSError, ValueError, IndexError):
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def short_pairs(count: int) -> list[Pair]:
    """A line each."""
    return [
        Pair(f"What is {i} + {i % 97}? Answer with the number.", (f"The answer is {i + i % 97}.", f"It is {i}."))
        for i in range(count)
    ]


def long_pairs(count: int) -> list[Pair]:
    """English prose from the Python manual: prompt and response together about 1,700 characters, 350 tokens."""
    text = "\n".join(pydoc_data.topics.topics[topic] for topic in sorted(pydoc_data.topics.topics))
    text = " ".join(text.encode("ascii", "ignore").decode().split())
    rng = np.random.default_rng(SEED)

    def piece(low: int, high: int) -> str:
        start = int(rng.integers(len(text) - high))
        return text[start : start + int(rng.integers(low, high))]

    return [Pair(piece(200, 800), (piece(400, 2000), piece(400, 2000))) for _ in range(count)]


async def measure(children: Children, target: Target, requests: int) -> Figures:
    """One turn of one target."""
    port = children.ports[target.process]
    await load(port, target.messages, count=min(50, requests), concurrency=4)
    alone, wall1 = await load(port, target.messages, count=requests, concurrency=1)
    before = children.cpu_seconds(target.process)
    _, wall16 = await load(port, target.messages, count=3 * requests, concurrency=16)
    spent = children.cpu_seconds(target.process) - before
    return Figures(
        float(np.median(alone)),
        float(np.quantile(alone, 0.99)),
        len(alone) / wall1,
        3 * requests / wall16,
        spent / (3 * requests),
    )


async def teach(port: int, messages: Sequence[bytes]) -> None:
    """Feedback on the first decisions, so that draws meet a posterior in its working state."""
    replies: list[bytes] = []
    await load(port, messages, count=FEEDBACKS, concurrency=8, keep=replies)
    ids = [json.loads(reply.partition(b"\r\n\r\n")[2])["decision_id"] for reply in replies]
    feedback = [
        request_bytes("/feedback", json.dumps({"decision_id": name, "preferred": i % 2}).encode())
        for i, name in enumerate(ids)
    ]
    await load(port, feedback, count=len(feedback), concurrency=8)


def stage_means(port: int) -> dict[str, float]:
    """Sum of seconds per stage since the gateway started, and the number of requests, from its own metrics."""
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=5) as answer:
        lines = answer.read().decode().splitlines()
    out: dict[str, float] = {}
    for line in lines:
        name, _, value = line.rpartition(" ")
        if name.startswith("reward_router_stage_seconds_sum"):
            out[name.split('"')[1]] = float(value)
        if name == 'reward_router_stage_seconds_count{stage="total"}':
            out["requests"] = float(value)
    return out


async def measure_batches(children: Children, process: str, pairs: Sequence[Pair], count: int) -> dict[str, float]:
    """`/reward/batch` of 256 pairs, one at a time: pairs per second of wall and of the gateway's CPU."""
    items = [{"prompt": pair.prompt, "responses": pair.responses} for pair in pairs[:BATCH]]
    message = request_bytes("/reward/batch", json.dumps({"items": items}).encode())
    port = children.ports[process]
    await load(port, [message], count=2, concurrency=1)
    stages, before = stage_means(port), children.cpu_seconds(process)
    seconds, wall = await load(port, [message], count=count, concurrency=1)
    after, spent = stage_means(port), children.cpu_seconds(process) - before
    encoding = (after["encode"] - stages["encode"]) / count
    return {
        "pairs_per_second": count * BATCH / wall,
        "pairs_per_second_apart_from_encoding": BATCH / (float(np.median(seconds)) - encoding),
        "pairs_per_cpu_second": count * BATCH / spent,
        "p50_ms": float(np.median(seconds)) * 1e3,
        "encode_ms": encoding * 1e3,
    }


async def run(
    rounds: int, requests: int, batches: int, *, awake: bool, tracing: bool = False, against: Path | None = None
) -> dict[str, Any]:
    """Start everything, measure in turn, and end everything."""
    short, long = short_pairs(1024), long_pairs(1024)
    cores = sorted(os.sched_getaffinity(0))
    pinned = (cores[0], cores[-1]) if len(cores) > 1 else None
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="loadtest-")))
        if pinned is not None:
            stack.callback(os.sched_setaffinity, 0, set(cores))
            os.sched_setaffinity(0, {pinned[0]})
        store = stack.enter_context(EmbeddedStore(folder / "store"))
        children = stack.enter_context(Children(folder, pinned))
        if awake:
            children.keep_awake()
        children.start("stub", "stub", "/health", tested=False)
        stub_url = f"http://127.0.0.1:{children.ports['stub']}"
        pool = folder / "pool.yaml"
        models = [ModelEntry(name=name, urls=(stub_url,), rendering="template") for name in MODELS]
        dump_pool(PoolFile(name="bench", models=tuple(models)), pool)
        children.start("proxy", "proxy", "/openapi.json", "--upstream", stub_url, tested=True)
        encoders = {"hash64": "hash:64", "hash576": "hash:576", "static": "static"}
        checkouts: list[tuple[str, str, Path | None]] = [("ours", "", None)]
        if against is not None:
            checkouts.append((OTHER, "-other", against))
        for _, suffix, checkout in checkouts:
            for name, encoder in encoders.items():
                key = name + suffix
                children.start(
                    *(key, "gateway", "/readyz", "--pool", str(pool), "--store", store.url, "--run", key),
                    *("--encoder", encoder),
                    tested=True,
                    folder=checkout,
                )
        if tracing:
            children.start(
                *("traced", "gateway", "/readyz", "--pool", str(pool), "--store", store.url, "--run", "traced"),
                *("--encoder", "static", "--tracing", stub_url),
                tested=True,
            )
        direct = {
            kind: [request_bytes("/classify", p.classify()) for p in pairs] for kind, pairs in _kinds(short, long)
        }
        routed = {kind: [request_bytes("/reward", p.reward()) for p in pairs] for kind, pairs in _kinds(short, long)}
        for _, suffix, _ in checkouts:
            for name in encoders:
                await teach(children.ports[name + suffix], routed["short"])
        if tracing:
            await teach(children.ports["traced"], routed["short"])
        targets = [
            Target("stub, short texts", "stub, short texts", "stub", direct["short"]),
            Target("stub, long texts", "stub, long texts", "stub", direct["long"]),
            Target("FastAPI + aiohttp, short", "stub, short texts", "proxy", direct["short"]),
            Target("FastAPI + aiohttp, long", "stub, long texts", "proxy", direct["long"]),
            *(
                Target(f"{who}, {what}, {kind}", f"stub, {kind} texts", name + suffix, routed[kind])
                for name, what, kind in SINGLES
                for who, suffix, _ in checkouts
            ),
            *([Target(TRACED, "stub, long texts", "traced", routed["long"])] if tracing else []),
        ]
        taken: dict[str, list[Figures]] = {target.name: [] for target in targets}
        encode = {"before": stage_means(children.ports["static"])}
        for _ in range(rounds):
            for target in targets:
                taken[target.name].append(await measure(children, target, requests))
        encode["after"] = stage_means(children.ports["static"])
        batch: dict[str, list[dict[str, float]]] = {}
        texts = {"short": short, "long": long}
        for _ in range(rounds):
            for name, what, kind in SINGLES:
                for who, suffix, _ in checkouts:
                    turn = await measure_batches(children, name + suffix, texts[kind], batches)
                    batch.setdefault(f"{who}, {what}, {kind}", []).append(turn)
    asked = encode["after"]["requests"] - encode["before"]["requests"]
    stages = {
        stage: (encode["after"][stage] - encode["before"][stage]) / asked * 1e3
        for stage in encode["after"]
        if stage != "requests"
    }
    return {
        "pinned": pinned is not None,
        "cores_kept_awake": awake and pinned is not None,
        "rounds": rounds,
        "requests_per_round": {"concurrency 1": requests, "concurrency 16": 3 * requests},
        "single": {target.name: _summary(target, taken) for target in targets},
        "batch_256": {name: _medians(turns) for name, turns in batch.items()},
        "against": {} if against is None else _ratios(taken, batch),
        "static_encoder_stage_ms": stages,
    }


def _kinds(short: list[Pair], long: list[Pair]) -> list[tuple[str, list[Pair]]]:
    return [("short", short), ("long", long)]


def _summary(target: Target, taken: Mapping[str, list[Figures]]) -> dict[str, float]:
    """Medians over rounds; what is added is the median of the rounds' own differences."""
    own, base = taken[target.name], taken[target.base]
    return {
        "p50_ms": median(f.p50 for f in own) * 1e3,
        "p99_ms": median(f.p99 for f in own) * 1e3,
        "added_p50_ms": median(f.p50 - b.p50 for f, b in zip(own, base, strict=True)) * 1e3,
        "added_p50_ms_best_round": min(f.p50 - b.p50 for f, b in zip(own, base, strict=True)) * 1e3,
        "added_p99_ms": median(f.p99 - b.p99 for f, b in zip(own, base, strict=True)) * 1e3,
        "requests_per_second_c1": median(f.rate1 for f in own),
        "requests_per_second_c16": median(f.rate16 for f in own),
        "requests_per_cpu_second_c16": 1 / median(f.cpu_seconds for f in own),
        "cpu_microseconds_per_request": median(f.cpu_seconds for f in own) * 1e6,
    }


def _medians(turns: Sequence[Mapping[str, float]]) -> dict[str, float]:
    return {key: median(turn[key] for turn in turns) for key in turns[0]}


def _ratios(
    taken: Mapping[str, Sequence[Figures]], batch: Mapping[str, Sequence[Mapping[str, float]]]
) -> dict[str, dict[str, float]]:
    """This checkout over the other one, within each round: median, smallest and largest."""
    out: dict[str, dict[str, float]] = {}
    for _, what, kind in SINGLES:
        ours, other = f"ours, {what}, {kind}", f"{OTHER}, {what}, {kind}"
        pairs = list(zip(taken[ours], taken[other], strict=True))
        out[f"one pair, {what}, {kind}: p50"] = _spread([mine.p50 / its.p50 for mine, its in pairs])
        out[f"one pair, {what}, {kind}: CPU"] = _spread([mine.cpu_seconds / its.cpu_seconds for mine, its in pairs])
        turns = list(zip(batch[ours], batch[other], strict=True))
        for key, name in (("pairs_per_second", "time"), ("pairs_per_cpu_second", "CPU")):
            out[f"batch, {what}, {kind}: {name}"] = _spread([its[key] / mine[key] for mine, its in turns])
    return out


def _spread(ratios: Sequence[float]) -> dict[str, float]:
    return {"median": median(ratios), "smallest": min(ratios), "largest": max(ratios)}


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(prog="python -m loadtests.gateway", description=__doc__.partition("\n")[0])
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    parser.add_argument("--rounds", type=int, default=5, help="turns of each target [default: 5]")
    parser.add_argument("--requests", type=int, default=600, help="requests per turn at concurrency 1 [default: 600]")
    parser.add_argument("--quick", action="store_true", help="2 rounds of 300 requests")
    parser.add_argument("--let-cores-sleep", action="store_true", help="do not keep the cores awake")
    parser.add_argument("--tracing", action="store_true", help="measure a gateway that makes spans, too")
    parser.add_argument("--against", type=Path, metavar="CHECKOUT", help="take turns with this other checkout")
    options = parser.parse_args(arguments)
    rounds, requests = (2, 300) if options.quick else (options.rounds, options.requests)
    facts = machine()
    print(describe(facts))
    batches, awake = 8 if options.quick else 12, not options.let_cores_sleep
    figures = uvloop.run(run(rounds, requests, batches, awake=awake, tracing=options.tracing, against=options.against))
    where = "the process under test has a core to itself" if figures["pinned"] else "one core, shared by all"
    where += ", cores kept awake" if figures["cores_kept_awake"] else ""
    print(f"seed {SEED}; {rounds} interleaved rounds; {where}; K = {len(MODELS)}; posterior with {FEEDBACKS} feedbacks")
    table(
        "one pair a request, ms; added: over the bare stub in the same round",
        ("what", "p50", "p99", "added p50", "best round", "added p99", "req/s c1", "req/s c16", "req/CPU s", "CPU µs"),
        [
            (name, *(f"{row[key]:.3f}" if "ms" in key else f"{row[key]:,.0f}" for key in row))
            for name, row in figures["single"].items()
        ],
    )
    table(
        f"/reward/batch of {BATCH}",
        ("what", "pairs/s", "apart from encoding", "pairs/CPU s", "p50 ms", "of it encoding ms"),
        [(name, *(f"{value:,.1f}" for value in row.values())) for name, row in figures["batch_256"].items()],
    )
    table(
        "static encoder, ms per request by the gateway's own metrics (waiting included)",
        ("stage", "ms"),
        list(figures["static_encoder_stage_ms"].items()),
    )
    if figures["against"]:
        table(
            "ours / the other checkout, within each round",
            ("what", "median", "smallest", "largest"),
            [(name, *(f"{value:.2f}" for value in row.values())) for name, row in figures["against"].items()],
        )
    print("goals: " + "; ".join(f"{name} {goal}" for name, goal in GOALS.items()))
    write_json(options.json, {"machine": facts, "seed": SEED, "goals": GOALS, **figures})


if __name__ == "__main__":
    main()

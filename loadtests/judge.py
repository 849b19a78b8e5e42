"""What the gateway costs a judge, and what a judge that hangs costs the others.

    python -m loadtests.judge [--pairs-per-second R ...] [--rounds N] [--json OUT]
    python -m loadtests.judge --url http://127.0.0.1:8000 --model NAME [--label-mass M]

A stub judge answers chat completions with log-probabilities at a steady rate, as one GPU does; `--url` names a real
server. It is asked about the same pairs directly, with as many requests in flight, and through one real gateway
(`service.app.create_app` with a real embedded store). Then the p99 of pairs that go to a reward model (another stub) is
taken while the judge is quiet, and while callers wait for the judge, which has stopped answering. What is compared
takes turns. Loopback only; takes about a minute.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import aiohttp
import numpy as np

from loadtests.client import load, request_bytes
from loadtests.gateway import Pair, short_pairs
from loadtests.report import describe, machine, table, use_one_blas_thread, write_json
from loadtests.scene import Scene, StubServer, scene
from loadtests.stub import MODELS, Device
from router_core.records import Instance
from service.pool import ModelEntry, PoolFile, dump_pool
from service.scorers.judge.dialogue import ChatDialogue, ChatOptions
from service.scorers.judge.entry import JudgeEntry
from service.scorers.judge.rubrics import Style, load_rubric
from service.scorers.judge.verdicts import LABEL_MASS
from service.scorers.judge.wire import CHAT_PATH

JUDGE = "judge"
IN_FLIGHT = 32
"""Pairs asked about at once; twice as many comparisons."""

WAITING = 16
"""Callers that wait for the judge that hangs."""

JUDGE_SECONDS = 5.0
"""The judge's `timeout_seconds` where it hangs."""

RM_REQUESTS = 1500
"""Pairs per turn that go to the reward model."""

RATE_GOAL, P99_GOAL = 0.95, 1.10

ANSWER = json.dumps(
    {
        "choices": [
            {
                "index": 0,
                "message": {"role": "assistant", "content": "A"},
                "finish_reason": "length",
                "logprobs": {
                    "content": [
                        {
                            "token": "A",
                            "logprob": -0.4,
                            "top_logprobs": [
                                {"token": "A", "logprob": -0.4},
                                {"token": "B", "logprob": -1.2},
                                *({"token": f"t{number}", "logprob": -5.0 - number} for number in range(18)),
                            ],
                        }
                    ]
                },
            }
        ]
    }
).encode()


class StubJudge(StubServer):
    """Answers every comparison alike, at a steady rate.

    Attributes:
        rate: comparisons a second.
        hangs: it accepts requests and answers none.
    """

    def __init__(self) -> None:
        super().__init__()
        self.hangs = False
        self._device = Device(1.0)

    def set_rate(self, comparisons_per_second: float) -> None:
        """Be as fast as that from now on."""
        self._device = Device(comparisons_per_second)

    async def answer(self, method: str, path: str, body: bytes) -> tuple[int, bytes]:
        """See `StubServer`."""
        if method != "POST":
            return 200, b'{"data":[{"id":"stub"}]}'
        while self.hangs:  # noqa: ASYNC110 - ends with the connection, or when the next turn begins
            await asyncio.sleep(0.05)
        await asyncio.sleep(self._device.done_at(1) - asyncio.get_running_loop().time())
        return 200, ANSWER


def comparisons(pairs: Sequence[Pair], options: ChatOptions) -> list[bytes]:
    """Return the requests that the gateway makes of these pairs."""
    dialogue, rubric = ChatDialogue(options), load_rubric("helpfulness")
    bodies = []
    for pair in pairs:
        instance = Instance(pair.prompt, pair.responses)
        for shown in ((0, 1), (1, 0)):
            bodies.append(dialogue.body(rubric.write(instance, shown, Style.LETTER, b"loadtest"), Style.LETTER))
    return [request_bytes(CHAT_PATH, body) for body in bodies]


def routed(pairs: Sequence[Pair], policy: str) -> list[bytes]:
    """Return requests of `/reward` by a policy."""
    return [
        request_bytes("/reward", json.dumps({"prompt": p.prompt, "responses": p.responses, "policy": policy}).encode())
        for p in pairs
    ]


async def rates(
    judge_port: int, gateway_port: int, pairs: Sequence[Pair], options: ChatOptions, rounds: int
) -> dict[str, Any]:
    """Return pairs/s directly and through the gateway, by round."""
    direct_messages, routed_messages = comparisons(pairs, options), routed(pairs, f"single:{JUDGE}")
    found: dict[str, list[float]] = {"direct": [], "gateway": []}
    for _ in range(rounds):
        _, seconds = await load(judge_port, direct_messages, count=2 * len(pairs), concurrency=2 * IN_FLIGHT)
        found["direct"].append(len(pairs) / seconds)
        _, seconds = await load(gateway_port, routed_messages, count=len(pairs), concurrency=IN_FLIGHT)
        found["gateway"].append(len(pairs) / seconds)
    ratios = [gateway / direct for gateway, direct in zip(found["gateway"], found["direct"], strict=True)]
    return {**found, "ratios": ratios}


async def hanging(judge: StubJudge, gateway_port: int, pairs: Sequence[Pair], rounds: int) -> dict[str, Any]:
    """Return the p99 of pairs to the reward model in ms, with the judge quiet and hanging, by round."""
    to_model, to_judge = routed(pairs, f"single:{MODELS[0]}"), pairs[0]
    found: dict[str, list[float]] = {"quiet": [], "hangs": []}
    url = f"http://127.0.0.1:{gateway_port}/reward"
    body = {"prompt": to_judge.prompt, "responses": to_judge.responses, "policy": f"single:{JUDGE}"}
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:

        async def wait_for_judge() -> None:
            while True:
                async with session.post(url, json=body) as answer:
                    await answer.read()
                if answer.status != 200:
                    await asyncio.sleep(0.05)

        await load(gateway_port, to_model, count=RM_REQUESTS, concurrency=4)
        for _ in range(rounds):
            for state in ("quiet", "hangs"):
                judge.hangs = state == "hangs"
                waiting = [asyncio.create_task(wait_for_judge()) for _ in range(WAITING if judge.hangs else 0)]
                await asyncio.sleep(0.2)
                seconds, _ = await load(gateway_port, to_model, count=RM_REQUESTS, concurrency=4)
                for task in waiting:
                    task.cancel()
                await asyncio.gather(*waiting, return_exceptions=True)
                judge.hangs = False
                found[state].append(1e3 * float(np.percentile(seconds, 99)))
    return {**found, "ratios": [hang / quiet for hang, quiet in zip(found["hangs"], found["quiet"], strict=True)]}


def start_gateway(place: Scene, entry: JudgeEntry) -> int:
    """Start a gateway with stub reward models and the judge; returns its port."""
    children = place.children
    if "stub" not in children.ports:
        children.start("stub", "stub", "/v1/models", tested=False)
    rm_url = f"http://127.0.0.1:{children.ports['stub']}"
    models = [ModelEntry(name=name, urls=(rm_url,), rendering="template") for name in MODELS]
    pool = place.folder / "pool.yaml"
    dump_pool(PoolFile(name="judge", models=(*models, entry)), pool)
    options = ("--pool", str(pool), "--store", place.store_url, "--run", "judge", "--encoder", "hash:64")
    children.start("gateway", "gateway", "/readyz", *options, tested=True)
    return children.ports["gateway"]


async def measure(place: Scene, options: argparse.Namespace) -> dict[str, Any]:
    """All figures."""
    figures: dict[str, Any] = {}
    chat = ChatOptions(options.model, label_mass=options.label_mass)
    if options.url:
        entry = JudgeEntry(
            name=JUDGE,
            kind="judge",
            urls=(options.url,),
            model=options.model,
            verdict="logprobs",
            label_mass=options.label_mass,
        )
        port = await asyncio.to_thread(start_gateway, place, entry)
        judge_port = int(options.url.rstrip("/").rpartition(":")[2])
        figures["real"] = await rates(judge_port, port, short_pairs(options.pairs), chat, options.rounds)
        return figures
    judge = StubJudge()
    judge_url = await judge.start()
    judge_port = int(judge_url.rpartition(":")[2])
    judge.set_rate(1e4)
    entry = JudgeEntry(
        name=JUDGE,
        kind="judge",
        urls=(judge_url,),
        model=options.model,
        verdict="logprobs",
        timeout_seconds=JUDGE_SECONDS,
    )
    port = await asyncio.to_thread(start_gateway, place, entry)
    for rate in options.pairs_per_second:
        judge.set_rate(2 * rate)
        pairs = short_pairs(max(4 * IN_FLIGHT, round(4 * rate)))
        figures[f"{rate:g}"] = await rates(judge_port, port, pairs, chat, options.rounds)
    figures["hanging"] = await hanging(judge, port, short_pairs(64), options.rounds)
    judge.stop()
    return figures


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(prog="python -m loadtests.judge", description=__doc__)
    parser.add_argument("--pairs-per-second", type=float, nargs="+", default=[25.0, 100.0], help="of the stub judge")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--url", help="of a real server without a key, instead of the stub")
    parser.add_argument("--model", default="stub", help="the server's name for its model")
    parser.add_argument("--label-mass", type=float, default=LABEL_MASS)
    parser.add_argument("--pairs", type=int, default=64, help="pairs per turn with --url")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    options = parser.parse_args()
    use_one_blas_thread()
    facts = machine()
    print(describe(facts))
    with scene() as place:
        figures = asyncio.run(measure(place, options))
    rows: list[Sequence[object]] = [
        (name, *(statistics.median(one[key]) for key in ("direct", "gateway", "ratios")))
        for name, one in figures.items()
        if name != "hanging"
    ]
    columns = ("judge's pairs/s", "direct, pairs/s", "through the gateway, pairs/s", "ratio")
    table(f"Judge pairs/s, medians of {options.rounds} rounds; goal: ratio at least {RATE_GOAL:g}", columns, rows)
    if "hanging" in figures:
        one = figures["hanging"]
        row = tuple(statistics.median(one[key]) for key in ("quiet", "hangs", "ratios"))
        columns = ("judge quiet, ms", f"{WAITING} callers wait for it, ms", "ratio")
        table(f"p99 of pairs to a reward model while the judge hangs; goal: ratio at most {P99_GOAL:g}", columns, [row])
    write_json(options.json, {"machine": facts, "figures": figures})


if __name__ == "__main__":
    main()

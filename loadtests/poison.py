"""What one caller's bad texts cost the others: the share of innocent instances that lose their reward.

    python -m loadtests.poison [--seconds S] [--share P] [--repeat] [--json OUT]
    python -m loadtests.poison --kinds [--texts N] [--share P] [--json OUT]

One real gateway (`service.app.create_app` with a real embedded store) and four stub RMs of one worker each. A text that
holds `MARK` makes every RM fail in its own way: status 500, a reward `null`, a reward NaN. Callers
send single instances and batches, first without and then with a share of marked texts, and count which instances came
back without a reward. Also printed: items that the workers scored per instance sent, so that the price of finding the
culprits is seen. With `--repeat` the marked texts are few and come again and again, as from a caller that retries: the
gateway then knows them (`service.scorers.transport.culprits`). Loopback only; takes about a minute.

`--kinds` sends 1,000 different marked texts among others to one scorer of each kind, and counts whose reward is lost:
`loadtests.poison_kinds`.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Any

import aiohttp
import msgspec
import numpy as np

from loadtests.report import describe, machine, table, use_one_blas_thread, write_json
from loadtests.scene import Scene, StubServer, scene
from loadtests.stub import MODELS
from service.pool import ModelEntry, PoolFile, dump_pool
from service.scorers.wire import CLASSIFY_PATH, MODELS_PATH, ModelList, ServedModel, sigmoid

MARK = "POISON"
"""The word on which every RM fails."""

FAULTS = ("500", "null", "NaN", "500")
"""What the RMs of `MODELS` answer then, in their order."""

ANSWER_SECONDS = 0.01
"""Time of a stub for one request."""

BATCH = 40
"""Instances of one batch."""

SINGLES_AT_ONCE, BATCHES_AT_ONCE = 8, 2
"""Callers of each kind."""

GOAL = 0.01
"""Largest share of innocent instances that may lose their reward."""

REPEATED_TEXTS = 4
"""Different marked texts with `--repeat`."""

SEED = 11


class _Question(msgspec.Struct):
    """The part of a request that a stub reads."""

    input: list[str] | str | None = None
    use_activation: bool | None = None


class StubWorker(StubServer):
    """Scores a text by its length, and fails on requests that hold `MARK`.

    Args:
        model: the name that it serves.
        fault: one of `FAULTS`.
    """

    def __init__(self, model: str, fault: str) -> None:
        super().__init__()
        self.items = 0
        self._model = model
        self._fault = fault

    async def answer(self, method: str, path: str, body: bytes) -> tuple[int, bytes]:
        """See `StubServer`."""
        if path == MODELS_PATH:
            return 200, msgspec.json.encode(ModelList([ServedModel(self._model)]))
        if path != CLASSIFY_PATH:
            return 404, b"{}"
        question = msgspec.json.decode(body, type=_Question)
        if question.input is None:
            return 400, b'{"error":{"message":"this stub reads texts, no conversations","code":400}}'
        texts = [question.input] if isinstance(question.input, str) else question.input
        self.items += len(texts)
        await asyncio.sleep(ANSWER_SECONDS)
        bad = [MARK in text for text in texts]
        if any(bad) and self._fault == "500":
            return (
                500,
                b'{"error":{"message":"EngineCore encountered an issue","code":500}}',
            )
        raw = question.use_activation is False
        rewards = [len(text) % 50 / 10 - 2.5 for text in texts]
        shown = [self._fault if b else repr(r if raw else sigmoid(r)) for b, r in zip(bad, rewards, strict=True)]
        rows = [f'{{"index":{i},"label":"-","probs":[{value}],"num_classes":1}}' for i, value in enumerate(shown)]
        return 200, b'{"data":[' + ",".join(rows).encode() + b"]}"


@dataclass(slots=True)
class Tally:
    """Instances by what became of them: `ok`, or the code of their error."""

    innocent: Counter[str] = field(default_factory=Counter)
    poisoned: Counter[str] = field(default_factory=Counter)

    def note(self, poisoned: bool, outcome: str) -> None:
        """Count one instance."""
        (self.poisoned if poisoned else self.innocent)[outcome] += 1

    @property
    def lost(self) -> float:
        """Share of innocent instances without a reward."""
        total = self.innocent.total()
        return 1 - self.innocent["ok"] / total if total else 0.0


class Traffic:
    """Callers of one gateway.

    Args:
        session: HTTP.
        url: of the gateway.
        share: of instances with `MARK`.
        repeat: whether these hold few different texts.
    """

    def __init__(self, session: aiohttp.ClientSession, url: str, share: float, *, repeat: bool) -> None:
        self.singles, self.batches = Tally(), Tally()
        self._session = session
        self._url = url
        self._share = share
        self._repeat = repeat
        self._rng = np.random.default_rng(SEED)
        self._numbers = count()

    async def run(self, seconds: float) -> None:
        """Send until the time is over."""
        until = time.monotonic() + seconds
        callers = [self._single(until) for _ in range(SINGLES_AT_ONCE)]
        await asyncio.gather(*callers, *(self._batch(until) for _ in range(BATCHES_AT_ONCE)))

    def _instance(self) -> tuple[bool, dict[str, Any]]:
        poisoned = bool(self._rng.random() < self._share)
        number = next(self._numbers)
        if poisoned and self._repeat:
            number %= REPEATED_TEXTS
        word = MARK if poisoned else "sum"
        return poisoned, {"prompt": f"What is {number} + 1?", "responses": [f"The {word} is {number + 1}.", "No idea."]}

    async def _single(self, until: float) -> None:
        while time.monotonic() < until:
            poisoned, item = self._instance()
            async with self._session.post(f"{self._url}/reward", json=item) as answer:
                reply = await answer.json()
            self.singles.note(poisoned, reply["error"]["code"] if "error" in reply else "ok")

    async def _batch(self, until: float) -> None:
        while time.monotonic() < until:
            drawn = [self._instance() for _ in range(BATCH)]
            async with self._session.post(f"{self._url}/reward/batch", json={"items": [i for _, i in drawn]}) as answer:
                reply = await answer.json()
            results = reply.get("results") or [reply] * BATCH
            for (poisoned, _), result in zip(drawn, results, strict=True):
                self.batches.note(poisoned, result["error"]["code"] if result.get("error") else "ok")


async def measure(place: Scene, seconds: float, share: float, *, repeat: bool) -> dict[str, Any]:
    """Both phases; the figures of each."""
    workers = [StubWorker(model, fault) for model, fault in zip(MODELS, FAULTS, strict=True)]
    urls = [await worker.start() for worker in workers]
    entries = [ModelEntry(name=n, urls=(url,), rendering="template") for n, url in zip(MODELS, urls, strict=True)]
    pool = place.folder / "pool.yaml"
    dump_pool(PoolFile(name="poison", models=tuple(entries)), pool)
    options = ("--pool", str(pool), "--store", place.store_url, "--run", "poison", "--encoder", "hash:64")
    await asyncio.to_thread(lambda: place.children.start("gateway", "gateway", "/readyz", *options, tested=True))
    url = f"http://127.0.0.1:{place.children.ports['gateway']}"
    phases = {}
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:
        for name, phase_share in (("clean", 0.0), ("poisoned", share)):
            before = sum(worker.items for worker in workers)
            traffic = Traffic(session, url, phase_share, repeat=repeat)
            await traffic.run(seconds if phase_share else seconds / 3)
            sent = sum(t.innocent.total() + t.poisoned.total() for t in (traffic.singles, traffic.batches))
            items = sum(worker.items for worker in workers) - before
            phases[name] = _figures(traffic, items / (2 * sent))
    for worker in workers:
        worker.stop()
    return phases


def _figures(traffic: Traffic, items_per_response: float) -> dict[str, Any]:
    kinds = {"singles": traffic.singles, "batches": traffic.batches}
    return {
        "items_per_response": items_per_response,
        **{
            kind: {"innocent": dict(tally.innocent), "poisoned": dict(tally.poisoned), "lost": tally.lost}
            for kind, tally in kinds.items()
        },
    }


def _rows(phases: dict[str, Any]) -> list[Sequence[object]]:
    rows: list[Sequence[object]] = []
    for phase, figures in phases.items():
        for kind in ("singles", "batches"):
            one = figures[kind]
            sent = sum(one["innocent"].values())
            marked = ", ".join(f"{number} {code}" for code, number in one["poisoned"].items()) or "–"
            rows.append(
                (f"{phase}, {kind}", str(sent), f"{100 * one['lost']:.2f} %", marked, figures["items_per_response"])
            )
    return rows


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(prog="python -m loadtests.poison", description=__doc__)
    parser.add_argument("--seconds", type=float, default=30.0, help="of poisoned traffic; a third of it clean before")
    parser.add_argument("--share", type=float, help="of instances that are poisoned [default: 0.02, with --kinds 0.1]")
    parser.add_argument("--repeat", action="store_true", help=f"only {REPEATED_TEXTS} different poisoned texts")
    parser.add_argument("--kinds", action="store_true", help="one scorer of each kind, and a number of marked texts")
    parser.add_argument("--texts", type=int, default=1000, help="marked texts for each kind")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    options = parser.parse_args()
    options.share = options.share or (0.1 if options.kinds else 0.02)
    use_one_blas_thread()
    if options.kinds:
        from loadtests.poison_kinds import run

        run(options.texts, options.share, options.json)
        return
    facts = machine()
    print(describe(facts))
    with scene() as place:
        phases = asyncio.run(measure(place, options.seconds, options.share, repeat=options.repeat))
    columns = ("traffic", "innocent instances", "lost their reward", "poisoned instances", "items per response")
    table(
        f"{100 * options.share:g} % poisoned on every RM; goal: at most {100 * GOAL:g} % lost", columns, _rows(phases)
    )
    write_json(
        options.json,
        {"machine": facts, "share": options.share, "repeat": options.repeat, "phases": json.loads(json.dumps(phases))},
    )


if __name__ == "__main__":
    main()

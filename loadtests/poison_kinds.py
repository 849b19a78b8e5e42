"""1,000 poisoned texts for a scorer of each kind: whose reward is lost. `python -m loadtests.poison --kinds` runs it.

One real gateway with a real embedded store, and one scorer of each kind, asked by `single:NAME`, so that nobody falls
back. A text that holds `MARK` fails its scorer: the RM, the judge and the service (stubs) answer 500 to every request
that holds it; the rule, in a real `reward-router worker --rule`, raises, hangs, or ends its process. Callers send
single instances and batches until every marked text was sent, and count which of the others came back without a
reward. Loopback only; takes minutes.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import aiohttp
import msgspec
import numpy as np

from loadtests.judge import ANSWER
from loadtests.poison import BATCH, BATCHES_AT_ONCE, MARK, SINGLES_AT_ONCE, StubWorker, Tally
from loadtests.report import describe, machine, table, write_json
from loadtests.scene import Scene, StubServer, rule_worker, scene
from service.pool import ModelEntry, PoolFile, dump_pool
from service.scorers.http.entry import HttpEntry
from service.scorers.http.wire import HEALTH_PATH, Result, ScoreReply, ScoreRequest
from service.scorers.judge.entry import JudgeEntry
from service.scorers.rule.entry import RuleEntry
from service.scorers.wire import MODELS_PATH, ModelList, ServedModel

IN_BATCHES = 0.8
"""Share of the instances that come in batches."""

RULE_SECONDS = 1.0
"""After which a rule that hangs is ended."""

SEED = 12

RULE = f'''
"""A rule that some texts break, in one of three ways."""

import os
import time


def fragile(messages, response, reference, metadata):
    if "{MARK}" in response:
        number = int("".join(letter for letter in response if letter.isdigit()))
        if number % 25 == 0:
            os._exit(1)
        if number % 25 == 1:
            time.sleep(60)
        raise ValueError(response)
    return len(response) % 50 / 10
'''

Respond = Callable[[str, bytes], bytes]
"""(path, body) to the body of a 200."""


class Stub(StubServer):
    """An HTTP server that answers 500 to whatever holds `MARK`."""

    def __init__(self, respond: Respond) -> None:
        super().__init__()
        self._respond = respond

    async def answer(self, method: str, path: str, body: bytes) -> tuple[int, bytes]:
        """See `StubServer`."""
        if MARK.encode() in body:
            return 500, b'{"error":{"message":"internal error"}}'
        return 200, self._respond(path, body)


def judged(path: str, body: bytes) -> bytes:
    """Return what a judge says of any comparison."""
    return msgspec.json.encode(ModelList([ServedModel("stub")])) if path == MODELS_PATH else ANSWER


def scored(path: str, body: bytes) -> bytes:
    """Return what a service of the scorer protocol says."""
    if path == HEALTH_PATH:
        return b"{}"
    items = msgspec.json.decode(body, type=ScoreRequest).items
    return msgspec.json.encode(ScoreReply([Result([len(text) % 50 / 10 for text in one.responses]) for one in items]))


async def send(session: aiohttp.ClientSession, url: str, kind: str, texts: int, share: float) -> Tally:
    """Send so many marked texts among others to the scorer of a kind, and count what became of all."""
    rng = np.random.default_rng(SEED)
    total = round(texts / share)
    marked = np.zeros(total, np.bool_)
    marked[rng.choice(total, size=texts, replace=False)] = True
    items = [
        (
            bool(bad),
            {
                "prompt": f"What is {number} + 1?",
                "responses": [f"The {MARK if bad else 'sum'} is {number + 1}.", "No idea."],
            },
        )
        for number, bad in enumerate(marked)
    ]
    cut = round(IN_BATCHES * total)
    batches = iter([items[start : start + BATCH] for start in range(0, cut, BATCH)])
    singles = iter(items[cut:])
    tally = Tally()

    def note(bad: bool, result: dict[str, Any]) -> None:
        lost = result.get("error") or next((one for one in result.get("failure", []) if one), None)
        code = lost["code"] if isinstance(lost, dict) else lost
        tally.note(bad, code or "ok")

    async def post(path: str, body: dict[str, Any]) -> dict[str, Any]:
        async with session.post(f"{url}{path}", json={**body, "policy": f"single:{kind}"}) as answer:
            reply: dict[str, Any] = await answer.json()
            return reply

    async def drain_singles() -> None:
        for bad, item in singles:
            note(bad, await post("/reward", item))

    async def drain_batches() -> None:
        for batch in batches:
            reply = await post("/reward/batch", {"items": [item for _, item in batch]})
            for (bad, _), result in zip(batch, reply.get("results") or [reply] * len(batch), strict=True):
                note(bad, result)

    await asyncio.gather(
        *(drain_singles() for _ in range(SINGLES_AT_ONCE)), *(drain_batches() for _ in range(BATCHES_AT_ONCE))
    )
    return tally


async def measure(place: Scene, rule_url: str, texts: int, share: float) -> dict[str, Tally]:
    """Return what became of the instances, by kind."""
    rm, judge, http = StubWorker("rm", "500"), Stub(judged), Stub(scored)
    pool = place.folder / "pool.yaml"
    models = (
        ModelEntry(name="rm", urls=(await rm.start(),), rendering="template"),
        JudgeEntry(name="judge", kind="judge", urls=(await judge.start(),), model="stub", verdict="logprobs"),
        RuleEntry(name="rule", kind="rule", urls=(rule_url,)),
        HttpEntry(name="http", kind="http", urls=(await http.start(),)),
    )
    dump_pool(PoolFile(name="poison", models=models), pool)
    options = ("--pool", str(pool), "--store", place.store_url, "--run", "poison", "--encoder", "hash:64")
    await asyncio.to_thread(lambda: place.children.start("gateway", "gateway", "/readyz", *options, tested=True))
    url = f"http://127.0.0.1:{place.children.ports['gateway']}"
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:
        tallies = {model.name: await send(session, url, model.name, texts, share) for model in models}
    for stub in (rm, judge, http):
        stub.stop()
    return tallies


def run(texts: int, share: float, out: Path | None) -> None:
    """Measure and print.

    Args:
        texts: marked texts for each kind.
        share: of the instances that are marked.
        out: JSON file for the figures; None for none.
    """
    facts = machine()
    print(describe(facts))
    with scene() as place:
        (place.folder / "rule.py").write_text(RULE, "utf-8")
        rule = RuleEntry(
            name="rule",
            kind="rule",
            file=f"{place.folder / 'rule.py'}:fragile",
            processes=2,
            rule_seconds=RULE_SECONDS,
        )
        with rule_worker(place.folder, rule) as rule_url:
            tallies = asyncio.run(measure(place, rule_url, texts, share))
    rows: list[Sequence[object]] = [
        (
            kind,
            str(tally.poisoned.total()),
            str(tally.innocent.total()),
            str(tally.innocent.total() - tally.innocent["ok"]),
            ", ".join(f"{number} {code}" for code, number in tally.poisoned.items()),
        )
        for kind, tally in tallies.items()
    ]
    columns = ("kind", "poisoned texts", "other instances", "of these lost their reward", "poisoned texts became")
    table(f"{100 * share:g} % of the instances are poisoned; goal: nobody else's reward is lost", columns, rows)
    figures = {
        kind: {"innocent": dict(tally.innocent), "poisoned": dict(tally.poisoned)} for kind, tally in tallies.items()
    }
    write_json(out, {"machine": facts, "share": share, "kinds": json.loads(json.dumps(figures))})

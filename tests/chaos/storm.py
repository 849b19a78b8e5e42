"""Faults one after the other, drawn from a seed, while callers send requests and feedback and audits go on.

Two gateways, two workers that serve the same RMs, and a store, as real processes: one server that says "done" only when
its file is synced (`Storm`), or a cluster that says so when a replica has it too (`ClusterStorm`). Between them are
proxies whose connections can be cut or held. In each round one thing goes wrong, is mended, and everybody must come
back; the callers never stop. At the end the log is read without any code of the store.

`test_storm.py` runs it; `make chaos` runs it for long.
"""

from __future__ import annotations

import asyncio
import math
import os
import random
import resource
import signal
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import redis
from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]

from router_core.encoder.fuse import IDENTITY_DIM
from router_core.posterior import FoldSettings
from router_core.prior import no_prior
from router_core.records import Event, LabelledPair, Source
from tests.conftest import ValkeyProcess
from tests.support.cluster import Node, ValkeyCluster
from tests.support.cluster import until as until_in_thread
from tests.support.gateway import fold_from_scratch, read_events, until
from tests.support.processes import MODELS, Caller, Service, Services, fetch, models_at, write_recorded_pairs
from tests.support.proxy import Proxy

RUN: Final = "storm"
FOLD: Final = FoldSettings(block_size=8, refresh_events=256)
SETTINGS: Final[dict[str, object]] = {
    "run": RUN,
    "block_size": FOLD.block_size,
    "refresh_events": FOLD.refresh_events,
    "log_keep_events": 1_000_000,
    "store_timeout_seconds": 1,
    "worker_timeout_seconds": 2,
    "health_interval_seconds": 0.5,
    "on_store_unavailable": "answer",
    "log_level": "warning",
}
AUDIT: Final = {"referee": MODELS[0], "rate": 0.3, "schedule": "even"}
CALLERS: Final = 4
WAIT_SECONDS: Final = 90.0
STEPPED: Final = Path(__file__).parents[1] / "support" / "stepped"


Fault = Callable[[], Awaitable[None]]


@dataclass(slots=True)
class Seen:
    """What callers were told.

    Attributes:
        answered: replies to requests.
        unrecorded: those of them that said that the decision could not be saved.
        forgotten: decisions that were saved, and lost with a primary.
        acknowledged: decision -> id of the event, of feedback.
        statuses: how often something else than 200 came back, with its code; status 0 is a broken connection.
    """

    answered: int = 0
    unrecorded: int = 0
    forgotten: int = 0
    acknowledged: dict[str, str] = field(default_factory=dict)
    statuses: Counter[tuple[int, str]] = field(default_factory=Counter)

    def __str__(self) -> str:
        return (
            f"{self.answered} requests answered, {self.unrecorded} unrecorded, {self.forgotten} forgotten; "
            f"{len(self.acknowledged)} feedbacks acknowledged; asked again after {dict(self.statuses)}"
        )


@dataclass(slots=True)
class _Gateway:
    service: Service
    clock: Path
    to_store: Proxy
    to_workers: list[Proxy]
    up: bool = True
    """False while it is killed or paused: callers go to the other one, as behind a load balancer."""


class Calm:
    """The scene, its callers, the faults that need no certain store, and what must hold at the end.

    Args:
        folder: for files.
        seed: of the faults.
    """

    def __init__(self, folder: Path, seed: int) -> None:
        self._folder = folder
        self._rng = random.Random(seed)
        self._gateways: list[_Gateway] = []
        self._workers: list[Service] = []
        self._pairs: list[LabelledPair] = []
        self.settings: dict[str, object] = {}
        self.fail_overs: list[tuple[float, float]] = []
        """Times between which a saved decision may be lost: replicas are not waited for (docs/operations.md)."""
        self.seen = Seen()
        self.happened: Counter[str] = Counter()

    def store_port(self) -> int:
        """Return the port that the gateways' proxies lead to."""
        raise NotImplementedError

    def store_url(self, port: int) -> str:
        """Return the store's URL for a gateway whose proxy listens there."""
        raise NotImplementedError

    def faults(self) -> list[Fault]:
        """Return what may happen."""
        return [
            self._gateway_killed,
            self._gateway_paused,
            self._worker_killed,
            self._worker_paused,
            self._clock_stepped,
            self._worker_connections_cut,
            self._worker_connections_half_open,
        ]

    def log_url(self) -> str:
        """Return where the run's log is now, as a single server."""
        raise NotImplementedError

    async def run(self, rounds: int) -> None:
        """Set the scene, let so many faults happen under load, and check what is left."""
        self._pairs = write_recorded_pairs(self._folder / "pairs.jsonl", 100)
        with Services(self._folder) as services:
            self._workers = [services.worker(self._folder / "pairs.jsonl") for _ in range(2)]
            async with asyncio.TaskGroup() as proxies:
                ended = asyncio.Event()
                await self._open(services, proxies, ended)
                try:
                    await self._weather(rounds)
                    await self._check()
                finally:
                    ended.set()

    async def _open(self, services: Services, proxies: asyncio.TaskGroup, ended: asyncio.Event) -> None:
        async def proxy(port: int) -> Proxy:
            made: asyncio.Future[Proxy] = asyncio.get_running_loop().create_future()

            async def keep() -> None:
                async with Proxy(port) as one:
                    made.set_result(one)
                    await ended.wait()

            proxies.create_task(keep())
            return await made

        for index in range(2):
            to_store = await proxy(self.store_port())
            to_workers = [await proxy(worker.port) for worker in self._workers]
            clock = self._folder / f"clock-{index}"
            clock.write_text("0")
            pool = {"models": models_at(*[one.url for one in to_workers]), "audit": AUDIT}
            service = services.gateway_of(
                f"gateway-{index}",
                pool,
                self.store_url(to_store.port),
                {"STEPPED_CLOCK": str(clock), "PYTHONPATH": str(STEPPED)},
                **{**SETTINGS, **self.settings, "seed": index},
            )
            self._gateways.append(_Gateway(service, clock, to_store, to_workers))
        await self._all_well()

    async def _weather(self, rounds: int) -> None:
        """The callers, and one fault after the other."""
        going = asyncio.Event()
        async with asyncio.TaskGroup() as group:
            for index in range(CALLERS):
                group.create_task(self._call(index, going))
            try:
                deck: list[Fault] = []
                for _ in range(rounds):
                    deck = deck or self._rng.sample(self.faults(), len(self.faults()))
                    fault = deck.pop()
                    self.happened[fault.__name__.strip("_")] += 1
                    await fault()
                    await self._all_well()
                    await asyncio.sleep(self._rng.uniform(0.1, 0.4))
            finally:
                going.set()

    async def _all_well(self) -> None:
        """Wait until both gateways are ready and may ask every worker."""
        for gateway in self._gateways:
            await until(lambda one=gateway: self._well(one), f"{gateway.service.url} to be well", WAIT_SECONDS)

    async def _well(self, gateway: _Gateway) -> bool:
        if (await asyncio.to_thread(fetch, gateway.service.url + "/readyz"))[0] != 200:
            return False
        status, document = await asyncio.to_thread(fetch, gateway.service.url + "/models")
        return status == 200 and all(
            replica["state"] == "closed" for model in document for replica in model["replicas"]
        )

    # --- callers

    async def _call(self, number: int, stop: asyncio.Event) -> None:
        """Requests and feedback, one after the other; each is repeated until it is answered, as trainers do."""
        rng = random.Random(number)
        callers = [Caller(gateway.service.url) for gateway in self._gateways]
        while not stop.is_set():
            pair = rng.choice(self._pairs)
            body = {"prompt": pair.instance.prompt, "responses": pair.instance.responses}
            clock = asyncio.get_running_loop().time
            asked = clock()
            reply = await self._insist(callers, "/reward", body, rng)
            answered = clock()
            self.seen.answered += 1
            assert reply["model"] in MODELS, reply
            if not reply["recorded"]:
                self.seen.unrecorded += 1
            elif rng.random() < 0.6:
                decision = reply["decision_id"]
                told = await self._insist(
                    callers,
                    "/feedback",
                    {"decision_id": decision, "preferred": pair.label},
                    rng,
                    # Otherwise a decision that was said to be recorded is there.
                    may_be_unknown=any(begin <= answered and asked <= end for begin, end in self.fail_overs),
                )
                if told is None:
                    self.seen.forgotten += 1
                else:
                    self.seen.acknowledged[decision] = told["event_id"]
        for caller in callers:
            await caller.close()

    async def _insist(
        self, callers: list[Caller], path: str, body: object, rng: random.Random, *, may_be_unknown: bool = False
    ) -> Any:
        """The answer, by whichever gateway is up; None for 404 where that may be.

        A connection that breaks, and a gateway that says that it or its store is away, are asked again; any other
        answer than 200 fails the test.
        """
        async with asyncio.timeout(WAIT_SECONDS):
            while True:
                up = [index for index, gateway in enumerate(self._gateways) if gateway.up]
                if not up:
                    await asyncio.sleep(0.05)
                    continue
                status, document = await callers[rng.choice(up)].post(path, body, seconds=8)
                if status == 200:
                    return document
                code = "" if document is None else document["error"]["code"]
                if may_be_unknown and status == 404:
                    return None
                self.seen.statuses[status, code] += 1
                assert (status, code) in {(0, ""), (503, "store_unavailable")}, document
                await asyncio.sleep(0.05)

    # --- faults

    def _some_gateway(self) -> _Gateway:
        return self._rng.choice(self._gateways)

    async def _while(self, begin: Callable[[], object], end: Callable[[], object], seconds: float = 1.5) -> None:
        begin()
        await asyncio.sleep(self._rng.uniform(0.2, seconds))
        end()

    async def _gateway_killed(self) -> None:
        gateway = self._some_gateway()
        gateway.up = False
        await asyncio.to_thread(gateway.service.kill)
        gateway.service.launch()
        await asyncio.to_thread(gateway.service.wait_until_ready)
        gateway.up = True

    async def _gateway_paused(self) -> None:
        gateway = self._some_gateway()
        gateway.up = False
        await self._paused(_pid(gateway.service))
        gateway.up = True

    async def _worker_killed(self) -> None:
        worker = self._rng.choice(self._workers)
        await asyncio.to_thread(worker.kill)
        worker.launch()
        await asyncio.to_thread(worker.wait_until_ready)

    async def _worker_paused(self) -> None:
        await self._paused(_pid(self._rng.choice(self._workers)))

    async def _clock_stepped(self) -> None:
        self._some_gateway().clock.write_text(str(self._rng.choice((-7200, -30, 0, 30, 7200))))

    async def _worker_connections_cut(self) -> None:
        self._rng.choice(self._some_gateway().to_workers).cut()

    async def _worker_connections_half_open(self) -> None:
        proxy = self._rng.choice(self._some_gateway().to_workers)
        await self._while(proxy.hold, proxy.flow, seconds=3.0)

    async def _paused(self, pid: int, seconds: float = 1.5) -> None:
        await self._while(lambda: os.kill(pid, signal.SIGSTOP), lambda: os.kill(pid, signal.SIGCONT), seconds)

    # --- what must hold

    async def _check(self) -> None:
        """Exactly once, all of it, and the same everywhere."""
        await until(lambda: self._idle(), "the audits to be done and both gateways to have learned all", WAIT_SECONDS)
        events = read_events(self.log_url(), RUN)
        gold = Counter(event.decision_id for event in events if event.source is Source.TRAINER)
        audits = Counter(event.decision_id for event in events if event.source is Source.AUDIT)
        assert set(gold.values()) <= {1}, "feedback is learned once"
        assert set(audits.values()) <= {1}, "an audit is learned once"
        assert set(gold) == set(self.seen.acknowledged), "what is acknowledged is learned, and nothing else"
        assert audits
        digest = self._digest(events)
        for gateway in self._gateways:
            _, document = await asyncio.to_thread(fetch, gateway.service.url + "/posterior")
            assert (document["version"], document["digest"]) == (len(events), digest)

    async def _idle(self) -> bool:
        with redis.Redis.from_url(self.log_url()) as client:
            if client.zcard(f"rr:{{{RUN}}}:waiting"):
                return False
        versions = set()
        for gateway in self._gateways:
            status, document = await asyncio.to_thread(fetch, gateway.service.url + "/posterior")
            if status != 200:
                return False
            versions.add((document["version"], document["log_appended"]))
        return len(versions) == 1 and all(version == appended for version, appended in versions)

    def _digest(self, events: list[Event]) -> str:
        # The gateways fold with one thread of BLAS; the grouping of its sums depends on the number.
        with threadpool_limits(1, user_api="blas"):
            return fold_from_scratch(events, no_prior(len(MODELS), IDENTITY_DIM), FOLD).digest()


def _pid(service: Service) -> int:
    assert service.process is not None
    return service.process.pid


class Storm(Calm):
    """On one server, which is started again where it dies.

    Args:
        folder: see `Calm`.
        store: running, with `appendfsync always`.
        seed: see `Calm`.
    """

    def __init__(self, folder: Path, store: ValkeyProcess, seed: int) -> None:
        super().__init__(folder, seed)
        self._store = store

    def store_port(self) -> int:
        return self._store.port

    def store_url(self, port: int) -> str:
        return f"redis://127.0.0.1:{port}/0"

    def log_url(self) -> str:
        return self._store.url

    def faults(self) -> list[Fault]:
        return [
            *super().faults(),
            self._store_killed,
            self._store_paused,
            self._disk_full,
            self._store_connections_cut,
            self._store_connections_half_open,
        ]

    async def _store_killed(self) -> None:
        self._store.kill()
        await asyncio.sleep(self._rng.uniform(0.0, 1.0))
        await self._store_up()

    async def _store_paused(self) -> None:
        await self._paused(self._store.pid, seconds=3.0)

    async def _disk_full(self) -> None:
        """The store's files may not grow; with `appendfsync always` it ends rather than forget."""
        pid = self._store.pid
        size = max(path.stat().st_size for path in self._store.files())
        resource.prlimit(pid, resource.RLIMIT_FSIZE, (size + 512, resource.RLIM_INFINITY))
        await until(self._store.ended, "the store to end", WAIT_SECONDS)
        await self._store_up()

    async def _store_connections_cut(self) -> None:
        self._some_gateway().to_store.cut()

    async def _store_connections_half_open(self) -> None:
        proxy = self._some_gateway().to_store
        await self._while(proxy.hold, proxy.flow, seconds=3.0)

    async def _store_up(self) -> None:
        self._store.kill()
        await asyncio.to_thread(lambda: self._store.start(appendfsync="always"))


class ClusterStorm(Calm):
    """On a cluster, whose nodes gateways find without a proxy.

    Args:
        folder: see `Calm`.
        cluster: with a replica of each primary.
        seed: see `Calm`.
    """

    def __init__(self, folder: Path, cluster: ValkeyCluster, seed: int) -> None:
        super().__init__(folder, seed)
        self._cluster = cluster
        self.settings = {"store_replicas": 1}

    def store_port(self) -> int:
        return self._cluster.nodes[0].port

    def store_url(self, port: int) -> str:
        return self._cluster.url

    def log_url(self) -> str:
        return f"redis://{self._cluster.owner(RUN).address}/0"

    def faults(self) -> list[Fault]:
        return [*super().faults(), self._primary_killed, self._primary_paused]

    async def _primary_killed(self) -> None:
        """Its replica takes over, and it comes back as a replica of that one."""
        await self._fail_over(lambda node: node.kill(), lambda node: node.start())

    async def _primary_paused(self) -> None:
        """The same, and what comes back believes that it still has the run."""
        await self._fail_over(lambda node: node.signal(signal.SIGSTOP), lambda node: node.signal(signal.SIGCONT))

    async def _fail_over(self, begin: Callable[[Node], None], end: Callable[[Node], None]) -> None:
        clock, place = asyncio.get_running_loop().time, len(self.fail_overs)
        # What the primary has by now, its replica has before anything happens to it; and in the end nobody is left who
        # would take a decision as the old primary.
        began = clock()
        self.fail_overs.append((began, math.inf))
        await asyncio.to_thread(self._take_over, begin, end)
        self.fail_overs[place] = (began, clock())

    def _take_over(self, begin: Callable[[Node], None], end: Callable[[Node], None]) -> None:
        primary = self._cluster.owner(RUN)
        heir = self._cluster.replica_of(primary)
        written = int(primary.info("INFO", "replication")["master_repl_offset"])
        until_in_thread(
            lambda: int(heir.info("INFO", "replication")["slave_repl_offset"]) >= written, "the replica to catch up"
        )
        begin(primary)
        until_in_thread(lambda: heir.info("INFO", "replication").get("role") == "master", "the replica to take over")
        end(primary)
        until_in_thread(
            lambda: primary.info("INFO", "replication").get("master_link_status") == "up", "the other to follow it"
        )

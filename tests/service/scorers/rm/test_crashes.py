"""A text that ends worker processes ends two of an RM at most, and its neighbours keep their rewards."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

import pytest

from service.scorers.protocol import WorkerError, WorkerInputError, WorkerUnavailableError
from service.scorers.rm.client import ArmConfig, VllmArm
from service.scorers.rm.render import PlainTemplate, TemplateRendering
from service.scorers.transport.breaker import BreakerPolicy
from service.scorers.transport.culprits import REMEMBERED_INPUTS, REMEMBERED_SECONDS, Culprits
from tests.service.scorers.worker_servers import read_request, reply, soon

KILLER = "KILLER"
TEMPLATE = TemplateRendering(PlainTemplate())


class Mortal:
    """A worker that ends when it reads a text with `KILLER`: its port closes and all its connections break."""

    def __init__(self) -> None:
        self.lives = 0
        self.asked: list[list[str]] = []
        self.hold: asyncio.Event | None = None
        """Answers wait for it; an order to die does not."""
        self._port = 0
        self._server: asyncio.Server | None = None
        self._writers: set[asyncio.StreamWriter] = set()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._port}"

    @property
    def alive(self) -> bool:
        return self._server is not None

    async def start(self) -> None:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", self._port)
        self._port = self._server.sockets[0].getsockname()[1]
        self.lives += 1

    def end(self) -> None:
        if self._server is not None:
            self._server.close()
            self._server = None
        for writer in self._writers:
            writer.transport.abort()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._writers.add(writer)
        try:
            while True:
                _, body = await read_request(reader)
                texts = json.loads(body)["input"]
                self.asked.append(texts)
                if any(KILLER in text for text in texts):
                    self.end()
                    return
                if self.hold is not None:
                    await self.hold.wait()
                content = json.dumps(reply([float(len(text)) for text in texts])).encode()
                writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%b" % (len(content), content))
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            self._writers.discard(writer)
            writer.close()


@asynccontextmanager
async def pool(count: int, **options: Any) -> AsyncIterator[tuple[VllmArm, list[Mortal]]]:
    workers = [Mortal() for _ in range(count)]
    async with AsyncExitStack() as stack:
        for worker in workers:
            await worker.start()
            stack.callback(worker.end)
        # No trial: a worker that has ended is asked again when the test says that it is back.
        breaker = BreakerPolicy(backoff_seconds=30)
        urls = tuple(worker.url for worker in workers)
        arm = VllmArm(ArmConfig(**{"name": "rm", "urls": urls, "rendering": TEMPLATE, "breaker": breaker, **options}))
        stack.push_async_callback(arm.close)
        yield arm, workers


async def back(arm: VllmArm, *workers: Mortal) -> None:
    """Start those that ended, as their supervisor would, and let them be asked again."""
    for worker in workers:
        if not worker.alive:
            await worker.start()
    for replica in arm.replicas:
        replica.report_check(None)


def text(number: int, killer: int | None) -> list[tuple[str, str]]:
    return [("p", f"{KILLER} {number}" if number == killer else "x" * (number + 1))]


async def test_a_killer_alone_ends_two_workers_and_then_no_more() -> None:
    async with pool(3) as (arm, workers):
        for _ in range(3):
            with pytest.raises(WorkerInputError, match="dropped"):
                await arm.score([("p", KILLER)], deadline=soon())
            assert sum(worker.alive for worker in workers) == 1
            assert len(await arm.score([("p", "fine")], deadline=soon())) == 1


@pytest.mark.parametrize("killer", [0, 17, 39])
async def test_a_killer_in_a_batch_takes_no_reward_from_its_neighbours(killer: int) -> None:
    async with pool(3) as (arm, workers):
        for _ in range(2):
            outcomes = await arm.score_groups([text(number, killer) for number in range(40)], deadline=soon(20))
            failed = {number for number, one in enumerate(outcomes) if isinstance(one, WorkerError)}
            assert failed == {killer}
            assert isinstance(outcomes[killer], WorkerInputError)
            assert sum(worker.alive for worker in workers) == 1


async def test_requests_beside_a_killer_are_answered_elsewhere() -> None:
    async with pool(3) as (arm, workers):
        hold = asyncio.Event()
        for worker in workers:
            worker.hold = hold
        beside = [asyncio.create_task(arm.score([("p", f"fine {n}")], deadline=soon(20))) for n in range(12)]
        while sum(len(worker.asked) for worker in workers) < 12:  # noqa: ASYNC110 - the workers have no events
            await asyncio.sleep(0.002)
        killing = asyncio.create_task(arm.score([("p", KILLER)], deadline=soon(20)))
        while all(worker.alive for worker in workers):  # noqa: ASYNC110 - as above
            await asyncio.sleep(0.002)
        hold.set()
        assert all(len(rewards) == 1 for rewards in await asyncio.gather(*beside))
        with pytest.raises(WorkerInputError):
            await killing
        assert sum(worker.alive for worker in workers) == 1


async def test_a_killer_of_the_only_worker_ends_it_twice_and_not_again() -> None:
    async with pool(1) as (arm, [worker]):
        with pytest.raises(WorkerUnavailableError):
            await arm.score([("p", KILLER)], deadline=soon())
        await back(arm, worker)
        for _ in range(3):
            with pytest.raises(WorkerInputError):
                await arm.score([("p", KILLER)], deadline=soon())
            await back(arm, worker)
        assert worker.lives == 3


async def test_a_killer_in_batches_for_the_only_worker_is_found_when_it_is_back() -> None:
    async with pool(1) as (arm, [worker]):
        groups = [text(number, 5) for number in range(20)]
        outcomes = await arm.score_groups(groups, deadline=soon())
        assert all(isinstance(one, WorkerUnavailableError) for one in outcomes)
        for _ in range(3):
            await back(arm, worker)
            outcomes = await arm.score_groups(groups, deadline=soon(20))
        assert [number for number, one in enumerate(outcomes) if isinstance(one, WorkerError)] == [5]
        assert isinstance(outcomes[5], WorkerInputError)
        # The start, one after the batch, one after the killer alone.
        assert worker.lives == 3


async def test_a_worker_that_ends_by_itself_costs_nobody_the_reward() -> None:
    async with pool(2) as (arm, workers):
        workers[0].hold = workers[1].hold = hold = asyncio.Event()
        beside = [asyncio.create_task(arm.score([("p", f"fine {n}")], deadline=soon(20))) for n in range(10)]
        while sum(len(worker.asked) for worker in workers) < 10:  # noqa: ASYNC110 - the workers have no events
            await asyncio.sleep(0.002)
        workers[0].end()
        hold.set()
        assert all(len(rewards) == 1 for rewards in await asyncio.gather(*beside))
        await back(arm, workers[0])
        for number in range(10):
            assert len(await arm.score([("p", f"fine {number}")], deadline=soon())) == 1


def test_culprits_are_forgotten_after_a_while_and_bounded() -> None:
    now = 0.0
    culprits = Culprits(lambda: now)
    culprits.convict(b"old", "500")
    culprits.doubt(b"doubted")
    culprits.doubt(b"old")
    assert (culprits.sentence(b"old"), culprits.doubted(b"old")) == ("500", False)
    assert (culprits.sentence(b"doubted"), culprits.doubted(b"doubted")) == (None, True)
    culprits.clear(b"doubted")
    assert not culprits.doubted(b"doubted")
    now = REMEMBERED_SECONDS
    assert culprits.sentence(b"old") is None
    assert not culprits
    for number in range(REMEMBERED_INPUTS + 1):
        culprits.convict(b"%d" % number, "500")
    assert culprits.sentence(b"0") is None
    assert culprits.sentence(b"1") == "500"

"""A text that ends worker processes ends two of an RM at most, and its neighbours keep their rewards."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

import pytest

from service.scorers.protocol import WorkerError, WorkerInputError, WorkerUnavailableError
from service.scorers.rm.client import ArmConfig, VllmArm
from service.scorers.rm.render import PlainTemplate, TemplateRendering
from service.scorers.transport.breaker import BreakerPolicy
from service.scorers.transport.culprits import REMEMBERED_INPUTS, REMEMBERED_SECONDS, Culprits
from tests.service.scorers.worker_servers import Json, Mortal, reply, soon, until
from tests.support.arms import score_groups, score_items

KILLER = "KILLER"
TEMPLATE = TemplateRendering(PlainTemplate())


def score(request: Json) -> Json:
    return reply([float(len(text)) for text in request["input"]])


@asynccontextmanager
async def pool(count: int, **options: Any) -> AsyncIterator[tuple[VllmArm, list[Mortal]]]:
    workers = [Mortal(KILLER, score) for _ in range(count)]
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
                await score_items(arm, [("p", KILLER)], deadline=soon())
            assert sum(worker.alive for worker in workers) == 1
            assert len(await score_items(arm, [("p", "fine")], deadline=soon())) == 1


@pytest.mark.parametrize("killer", [0, 17, 39])
async def test_a_killer_in_a_batch_takes_no_reward_from_its_neighbours(killer: int) -> None:
    async with pool(3) as (arm, workers):
        for _ in range(2):
            outcomes = await score_groups(arm, [text(number, killer) for number in range(40)], deadline=soon(20))
            failed = {number for number, one in enumerate(outcomes) if isinstance(one, WorkerError)}
            assert failed == {killer}
            assert isinstance(outcomes[killer], WorkerInputError)
            assert sum(worker.alive for worker in workers) == 1


async def test_requests_beside_a_killer_are_answered_elsewhere() -> None:
    async with pool(3) as (arm, workers):
        hold = asyncio.Event()
        for worker in workers:
            worker.hold = hold
        beside = [asyncio.create_task(score_items(arm, [("p", f"fine {n}")], deadline=soon(20))) for n in range(12)]
        await until(lambda: sum(len(worker.asked) for worker in workers) >= 12)
        killing = asyncio.create_task(score_items(arm, [("p", KILLER)], deadline=soon(20)))
        await until(lambda: not all(worker.alive for worker in workers))
        hold.set()
        assert all(len(rewards) == 1 for rewards in await asyncio.gather(*beside))
        with pytest.raises(WorkerInputError):
            await killing
        assert sum(worker.alive for worker in workers) == 1


async def test_a_killer_of_the_only_worker_ends_it_twice_and_not_again() -> None:
    async with pool(1) as (arm, [worker]):
        with pytest.raises(WorkerUnavailableError):
            await score_items(arm, [("p", KILLER)], deadline=soon())
        await back(arm, worker)
        for _ in range(3):
            with pytest.raises(WorkerInputError):
                await score_items(arm, [("p", KILLER)], deadline=soon())
            await back(arm, worker)
        assert worker.lives == 3


async def test_a_killer_in_batches_for_the_only_worker_is_found_when_it_is_back() -> None:
    async with pool(1) as (arm, [worker]):
        groups = [text(number, 5) for number in range(20)]
        outcomes = await score_groups(arm, groups, deadline=soon())
        assert all(isinstance(one, WorkerUnavailableError) for one in outcomes)
        for _ in range(3):
            await back(arm, worker)
            outcomes = await score_groups(arm, groups, deadline=soon(20))
        assert [number for number, one in enumerate(outcomes) if isinstance(one, WorkerError)] == [5]
        assert isinstance(outcomes[5], WorkerInputError)
        # The start, one after the batch, one after the killer alone.
        assert worker.lives == 3


async def test_a_worker_that_ends_by_itself_costs_nobody_the_reward() -> None:
    async with pool(2) as (arm, workers):
        workers[0].hold = workers[1].hold = hold = asyncio.Event()
        beside = [asyncio.create_task(score_items(arm, [("p", f"fine {n}")], deadline=soon(20))) for n in range(10)]
        await until(lambda: sum(len(worker.asked) for worker in workers) >= 10)
        workers[0].end()
        hold.set()
        assert all(len(rewards) == 1 for rewards in await asyncio.gather(*beside))
        await back(arm, workers[0])
        for number in range(10):
            assert len(await score_items(arm, [("p", f"fine {number}")], deadline=soon())) == 1


async def test_an_input_that_was_answered_since_is_no_culprit() -> None:
    async with pool(1) as (arm, [worker]):
        for _ in range(3):
            # The worker ends by itself each time, with the same text in its hands.
            worker.hold = asyncio.Event()
            before = len(worker.asked)
            asking = asyncio.create_task(score_items(arm, [("p", "fine")], deadline=soon(20)))
            await until(lambda: len(worker.asked) > before)  # noqa: B023 - read at once
            worker.end()
            worker.hold = None
            with pytest.raises(WorkerUnavailableError):
                await asking
            await back(arm, worker)
            assert len(await score_items(arm, [("p", "fine")], deadline=soon())) == 1


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

"""The batcher of encode and draw: where a pass runs, who shares it, and who is told when it fails."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest

from router_core.errors import EncoderError
from router_core.policies import make_policy
from router_core.posterior import start
from router_core.prior import no_prior
from router_core.records import Instance
from service.telemetry import Telemetry
from service.usecases.choose import Chooser, PassTimes
from service.usecases.runs import Current, Run, RunTemplate

POLICY = make_policy("random", ("a", "b", "c"))
PAIR = Instance("prompt", ("one", "two"))
LONG = Instance("prompt", ("one", "two" * 1000))


class RecordingEncoder:
    """Unit vectors; remembers in which thread and how many instances each pass was."""

    d = 4
    spec = "recording"

    def __init__(self, before: Callable[[], None] = lambda: None) -> None:
        self.before = before
        self.passes: list[tuple[bool, int]] = []

    def encode(self, instances: Sequence[Instance]) -> np.ndarray:
        """(B, 4) float32."""
        self.before()
        self.passes.append((threading.current_thread() is threading.main_thread(), len(instances)))
        return np.tile(np.eye(1, 4, dtype=np.float32), (len(instances), 1))


def run_with(encoder: RecordingEncoder) -> Run:
    """What the chooser reads of a run."""
    prior = no_prior(3, 4)

    async def readable(instances: Sequence[Instance]) -> np.ndarray | None:
        # Arm a reads one response of an instance that is long.
        return None if LONG not in instances else np.array([[1 if one is LONG else 2, 2, 2] for one in instances])

    template = SimpleNamespace(encoder=encoder, barred=lambda instances: None, readable=readable)
    state = SimpleNamespace(
        template=template,
        current=Current(start(prior), cast(RunTemplate, template)),
        rng=np.random.default_rng(0),
        multiplier=lambda policy: None,
    )
    return cast(Run, state)


@asynccontextmanager
async def chooser(**options: Any) -> AsyncIterator[Chooser]:
    """A chooser with one thread of its own."""
    with ThreadPoolExecutor(1) as executor:
        yield Chooser(executor, Telemetry(), **options)


async def test_a_size_never_seen_goes_to_the_thread_and_a_short_one_then_runs_on_the_loop() -> None:
    encoder = RecordingEncoder()
    run = run_with(encoder)
    async with chooser(inline_seconds=60.0) as subject:
        for _ in range(2):
            await subject.choose(run, POLICY, [PAIR])
    assert encoder.passes == [(False, 1), (True, 1)]


async def test_no_pass_runs_on_the_loop_when_none_is_short_enough() -> None:
    encoder = RecordingEncoder()
    run = run_with(encoder)
    async with chooser(inline_seconds=0.0) as subject:
        for _ in range(5):
            await subject.choose(run, POLICY, [PAIR])
    assert encoder.passes == [(False, 1)] * 5


async def test_requests_of_one_turn_share_a_pass_and_each_gets_its_own_rows() -> None:
    encoder = RecordingEncoder()
    run = run_with(encoder)
    async with chooser() as subject:
        chosen = await asyncio.gather(*(subject.choose(run, POLICY, [PAIR] * size) for size in (1, 3, 2)))
    assert [size for _, size in encoder.passes] == [6]
    assert [len(one.x) for one in chosen] == [1, 3, 2]
    assert [one.choices.ranking.shape for one in chosen] == [(1, 3), (3, 3), (2, 3)]


async def test_requests_that_come_while_a_pass_is_under_way_share_the_next() -> None:
    release = threading.Event()
    encoder = RecordingEncoder(before=lambda: cast(None, release.wait(10)))
    run = run_with(encoder)
    async with chooser() as subject:
        first = asyncio.create_task(subject.choose(run, POLICY, [PAIR]))
        for _ in range(3):
            await asyncio.sleep(0)
        later = [asyncio.create_task(subject.choose(run, POLICY, [PAIR])) for _ in range(3)]
        await asyncio.sleep(0)
        release.set()
        await asyncio.gather(first, *later)
    assert [size for _, size in encoder.passes] == [1, 3]


@pytest.mark.parametrize(("policy", "shares"), [("random", [0.0, 0.5, 0.5]), ("majority", [1 / 3] * 3)])
async def test_who_reads_less_is_not_drawn(policy: str, shares: list[float]) -> None:
    run = run_with(RecordingEncoder())
    several = make_policy(policy, ("a", "b", "c"))
    async with chooser() as subject:
        short, long = await asyncio.gather(
            subject.choose(run, several, [PAIR]), subject.choose(run, several, [PAIR, LONG])
        )
    assert short.choices.propensities == pytest.approx(np.full((1, 3), 1 / 3), abs=1e-3)
    assert long.choices.propensities == pytest.approx(np.array([[1 / 3] * 3, shares]), abs=1e-3)


@pytest.mark.parametrize("inline_seconds", [0.0, 60.0])
async def test_a_pass_that_fails_is_told_to_all_who_waited_and_the_next_one_works(inline_seconds: float) -> None:
    encoder = RecordingEncoder()
    run = run_with(encoder)

    def fail() -> None:
        raise EncoderError("no")

    async with chooser(inline_seconds=inline_seconds) as subject:
        await subject.choose(run, POLICY, [PAIR] * 2)
        encoder.before = fail
        told = await asyncio.gather(*(subject.choose(run, POLICY, [PAIR]) for _ in range(2)), return_exceptions=True)
        assert [type(error) for error in told] == [EncoderError, EncoderError]
        encoder.before = lambda: None
        assert len((await subject.choose(run, POLICY, [PAIR])).x) == 1


def test_a_pass_of_unknown_size_is_expected_to_take_for_ever() -> None:
    times = PassTimes()
    times.observe(3, 0.001, alone=True)
    assert times.expected(2) == times.expected(3) == 0.001
    assert times.expected(4) == float("inf")


def test_a_long_time_in_the_thread_hardly_counts_and_a_short_one_does() -> None:
    times = PassTimes()
    times.observe(1, 1.0, alone=False)
    times.observe(1, 2.0, alone=False)
    assert times.expected(1) == pytest.approx(1.02)
    times.observe(1, 0.52, alone=False)
    assert times.expected(1) == pytest.approx(0.92)
    times.observe(1, 1.92, alone=True)
    assert times.expected(1) == pytest.approx(1.12)

"""Inputs on which a worker fails are found and charged to themselves; a worker that fails is taken out."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest

from service.scorers.protocol import (
    WorkerError,
    WorkerInputError,
    WorkerProtocolError,
    WorkerTimeoutError,
    WorkerUnavailableError,
)
from service.scorers.rm.client import ArmConfig, VllmArm
from service.scorers.rm.render import MessagesRendering, PlainTemplate, Rendering, TemplateRendering
from service.scorers.transport.breaker import BreakerPolicy, BreakerState
from service.scorers.wire import says_too_long
from tests.service.scorers.worker_servers import (
    Json,
    RawServer,
    ScriptedWorker,
    Serve,
    error,
    read_request,
    reply,
    soon,
    texts_of,
    until,
)
from tests.support.arms import score_groups, score_items

TEMPLATE = TemplateRendering(PlainTemplate())
BAD = "POISON"
Answer = tuple[int, Any]
Group = list[tuple[str, str]]


def arm_for(*urls: str, **options: Any) -> VllmArm:
    return VllmArm(ArmConfig(**{"name": "rm", "urls": urls, "rendering": TEMPLATE, **options}))


def has_bad(request: Json) -> bool:
    return any(BAD in text for text in texts_of(request))


def a_status(status: int) -> Callable[[list[str]], Answer]:
    return lambda texts: (status, error("EngineCore encountered an issue", status))


def a_reward(word: str) -> Callable[[list[str]], Answer]:
    """An answer in which the rewards of the bad items are this word."""

    def answer(texts: list[str]) -> Answer:
        rows = [
            f'{{"index":{index},"probs":[{word if BAD in text else 1.0}],"num_classes":1}}'
            for index, text in enumerate(texts)
        ]
        return 200, f'{{"data":[{",".join(rows)}]}}'.encode()

    return answer


FAULTS = {
    "500": a_status(500),
    "503": a_status(503),
    "null": a_reward("null"),
    "NaN": a_reward("NaN"),
    "infinite": a_reward("1e999"),
    "absurd": a_reward("1e300"),
    "html": lambda texts: (200, b"<html>oops</html>"),
}
"""What workers do about a bad text."""


def poisoned(fault: Callable[[list[str]], Answer]) -> ScriptedWorker:
    worker = ScriptedWorker()
    worker.answer = lambda request: fault(texts_of(request)) if has_bad(request) else worker.lengths(request)
    return worker


def groups_of(count: int, bad: frozenset[int]) -> list[Group]:
    return [
        [("p", "x" * number), ("q", f"{BAD} {number}" if number in bad else "y" * number)] for number in range(count)
    ]


@pytest.mark.parametrize("rendering", [TEMPLATE, MessagesRendering()])
@pytest.mark.parametrize("fault", FAULTS.values(), ids=FAULTS)
@pytest.mark.parametrize("replicas", [1, 2])
async def test_only_the_culprits_of_a_batch_lose_their_rewards_and_no_breaker_counts(
    serve: Serve, fault: Callable[[list[str]], Answer], replicas: int, rendering: Rendering
) -> None:
    workers = [poisoned(fault) for _ in range(replicas)]
    arm = arm_for(*map(serve, workers), rendering=rendering, breaker=BreakerPolicy(failures_to_open=1))
    bad = frozenset({3, 17, 18})
    outcomes = await score_groups(arm, groups_of(40, bad), deadline=soon())
    assert {n for n, outcome in enumerate(outcomes) if isinstance(outcome, WorkerError)} == bad
    assert all(isinstance(outcomes[n], WorkerInputError) for n in bad)
    assert all(one.state is BreakerState.CLOSED and one.failures == 0 for one in arm.snapshots())
    await arm.close()


async def test_finding_one_culprit_takes_a_bounded_number_of_requests(serve: Serve) -> None:
    worker = poisoned(FAULTS["500"])
    arm = arm_for(serve(worker))
    await score_groups(arm, groups_of(32, frozenset({5})), deadline=soon())
    # The whole, two halves on each of five levels, and the culprit once more.
    assert len(worker.questions) == 1 + 2 * 5 + 1
    await arm.close()


async def test_a_batch_of_nothing_but_culprits_ends_within_its_bound(serve: Serve) -> None:
    worker = poisoned(FAULTS["NaN"])
    arm = arm_for(serve(worker), parallel_requests=2)
    outcomes = await score_groups(arm, groups_of(32, frozenset(range(32))), deadline=soon(20))
    assert all(isinstance(outcome, WorkerInputError) for outcome in outcomes)
    assert len(worker.questions) == 2 * 32 - 1 + 32
    # The slots hold for what is divided, too; the probe has a connection of its own.
    assert worker.most_in_flight <= 3
    await arm.close()


async def test_a_single_that_fails_on_two_replicas_is_its_own_error_and_its_neighbours_are_answered(
    serve: Serve,
) -> None:
    workers = [poisoned(FAULTS["500"]) for _ in range(3)]
    arm = arm_for(*map(serve, workers), breaker=BreakerPolicy(failures_to_open=1, backoff_seconds=30))
    for number in range(10):
        bad, fine = await asyncio.gather(
            score_items(arm, [("p", f"{BAD} {number}")], deadline=soon()),
            score_items(arm, [("p", "fine")], deadline=soon()),
            return_exceptions=True,
        )
        assert isinstance(bad, WorkerInputError)
        assert isinstance(fine, list)
    asked = [sum(map(has_bad, worker.questions)) for worker in workers]
    assert sum(asked) == 20
    assert max(asked) <= 10
    await arm.close()


async def test_an_input_that_fails_at_one_replica_only_has_its_reward_from_another(serve: Serve) -> None:
    arm = arm_for(serve(poisoned(FAULTS["500"])), serve(ScriptedWorker()))
    for _ in range(4):
        assert len(await score_items(arm, [("p", BAD)], deadline=soon())) == 1
    await arm.close()


@pytest.mark.parametrize("fault", FAULTS.values(), ids=FAULTS)
async def test_a_worker_that_fails_on_everything_is_taken_out_at_once_and_not_asked_in_halves(
    serve: Serve, fault: Callable[[list[str]], Answer]
) -> None:
    worker = ScriptedWorker()
    worker.answer = lambda request: fault([BAD for _ in texts_of(request)])
    arm = arm_for(serve(worker), breaker=BreakerPolicy(failures_to_open=3, backoff_seconds=30))
    for _ in range(3):
        assert arm.available
        outcomes = await score_groups(arm, groups_of(8, frozenset()), deadline=soon())
        assert all(isinstance(one, WorkerUnavailableError | WorkerProtocolError) for one in outcomes)
    assert not arm.available
    assert len(worker.questions) == 3
    await arm.close()


async def test_failures_that_come_together_share_one_probe(serve: Serve) -> None:
    worker = ScriptedWorker()
    worker.delay = 0.05
    worker.answer = lambda request: (500, error("EngineCore", 500))
    arm = arm_for(serve(worker), breaker=BreakerPolicy(failures_to_open=8, backoff_seconds=30))
    await asyncio.gather(*(score_items(arm, [("p", "r")], deadline=soon()) for _ in range(8)), return_exceptions=True)
    assert not arm.available
    assert len(worker.questions) == 8
    assert len(worker.requests) - 8 < 8
    await arm.close()


async def test_a_culprit_as_the_trial_of_a_breaker_lets_the_worker_back_in(serve: Serve) -> None:
    now = 0.0
    worker = ScriptedWorker()
    worker.answer = a_worker_that_is_down = lambda request: (503, error("down", 503))
    config = ArmConfig(
        name="rm",
        urls=(serve(worker),),
        rendering=TEMPLATE,
        breaker=BreakerPolicy(failures_to_open=1, backoff_seconds=10),
    )
    arm = VllmArm(config, clock=lambda: now)
    with pytest.raises(WorkerUnavailableError):
        await score_items(arm, [("p", "r")], deadline=soon())
    assert not arm.available
    now = 10.0
    worker.answer = lambda request: a_worker_that_is_down(request) if has_bad(request) else worker.lengths(request)
    with pytest.raises(WorkerInputError):
        await score_items(arm, [("p", BAD)], deadline=soon())
    assert arm.available
    await arm.close()


async def test_a_dropped_connection_is_the_inputs_fault_where_the_worker_goes_on(raw_server: RawServer) -> None:
    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while True:
            _, body = await read_request(reader)
            if BAD.encode() in body:
                return
            content = b'{"data":[{"index":0,"probs":[0.5],"num_classes":1}]}'
            writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%b" % (len(content), content))

    async with raw_server(answer) as url:
        arm = arm_for(url, rendering=MessagesRendering(), breaker=BreakerPolicy(failures_to_open=1))
        groups = [[("p", "fine")], [("p", BAD)], [("p", "also fine")]]
        outcomes = await score_groups(arm, groups, deadline=soon())
        assert outcomes[::2] == [[0.5], [0.5]]
        assert isinstance(outcomes[1], WorkerInputError)
        assert arm.available
        await arm.close()


@pytest.mark.parametrize("answers", [True, False])
async def test_a_timeout_counts_only_against_a_worker_that_answers_nothing_meanwhile(
    raw_server: RawServer, answers: bool
) -> None:
    asked = asyncio.Event()

    async def serve_fine(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while True:
            _, body = await read_request(reader)
            if BAD.encode() in body:
                asked.set()
                continue
            content = b'{"data":[{"index":0,"probs":[0.5],"num_classes":1}]}'
            writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%b" % (len(content), content))

    async with raw_server(serve_fine) as url:
        policy = BreakerPolicy(failures_to_open=1, backoff_seconds=30)
        arm = arm_for(url, attempt_timeout_seconds=1.0, breaker=policy)
        # Over a connection that stands, all of an attempt's time is the worker's.
        await score_items(arm, [("p", "fine")], deadline=soon(20))
        slow = asyncio.create_task(score_items(arm, [("p", BAD)], deadline=soon(1.0)))
        await asked.wait()
        if answers:
            # What the answer to a later request reports; a real one might come after the slow one's time.
            (replica,) = arm.replicas
            replica.accept(replica.breaker.acquire() or 0, replica.begin())
        with pytest.raises(WorkerTimeoutError):
            await slow
        assert arm.available == answers
        await arm.close()


async def test_dividing_keeps_to_the_deadline_and_leaves_the_breaker_alone(serve: Serve) -> None:
    worker = poisoned(FAULTS["500"])
    # Seven questions one after the other lead to the culprit: never in less than 1.4 s.
    worker.delay = 0.2
    arm = arm_for(serve(worker), breaker=BreakerPolicy(failures_to_open=1))
    outcomes = await score_groups(arm, groups_of(32, frozenset({5})), deadline=soon(0.7))
    assert isinstance(outcomes[5], WorkerTimeoutError)
    await arm.close()
    assert arm.snapshots()[0].failures == 0


async def test_a_cancelled_call_leaves_the_examination_to_the_breaker(raw_server: RawServer) -> None:
    probed, answer_now = asyncio.Event(), asyncio.Event()

    async def fail(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        _, body = await read_request(reader)
        if b"pong" in body:
            probed.set()
            await answer_now.wait()
        writer.write(b"HTTP/1.1 500 -\r\nContent-Length: 0\r\n\r\n")

    async with raw_server(fail) as url:
        arm = arm_for(url, breaker=BreakerPolicy(failures_to_open=1, backoff_seconds=30))
        call = asyncio.create_task(score_items(arm, [("p", "r")], deadline=soon()))
        await probed.wait()
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call
        assert arm.available
        answer_now.set()
        await until(lambda: not arm.available)
        await arm.close()


async def test_equal_responses_are_asked_once_and_have_one_reward(serve: Serve) -> None:
    worker = ScriptedWorker()
    rewards = iter(range(1000))
    worker.answer = lambda request: (200, reply([float(next(rewards)) for _ in texts_of(request)]))
    arm = arm_for(serve(worker))
    first, second, third = await score_items(arm, [("p", "a"), ("p", "b"), ("p", "a")], deadline=soon())
    assert first == third != second
    (one, other) = await score_groups(arm, [[("p", "a")] * 3, [("p", "a"), ("p", "c"), ("p", "c")]], deadline=soon())
    assert isinstance(one, list)
    assert isinstance(other, list)
    assert (len(set(one)), len(one)) == (1, 3)
    assert (other[1] == other[2], len(other)) == (True, 3)
    assert sum(len(texts_of(request)) for request in worker.questions) == 2 + 1 + 2
    await arm.close()


async def test_no_error_of_an_rm_shows_an_address_to_callers(serve: Serve, refused_url: str) -> None:
    answers = [(500, error("EngineCore", 500)), (400, error("no", 400)), (200, b"x"), (200, reply([1.0]))]
    for answer in answers:
        worker = ScriptedWorker()
        worker.answer = lambda request, answer=answer: answer
        arm = arm_for(serve(worker), refused_url)
        (outcome,) = await score_groups(arm, [[("p", "a"), ("p", "b")]], deadline=soon())
        assert isinstance(outcome, WorkerError)
        assert "127.0.0.1" not in outcome.message + str(outcome.details)
        await arm.close()


async def test_a_reward_beyond_what_the_rm_has_given_is_that_attempts_failure(serve: Serve) -> None:
    worker = ScriptedWorker()
    arm = arm_for(serve(worker))
    await score_groups(arm, [[("p", "x" * n)] for n in range(70)], deadline=soon())
    worker.answer = lambda request: ((200, reply([1e5 if BAD in text else 1.0 for text in texts_of(request)])))
    outcomes = await score_groups(arm, [[("p", "fine")], [("p", BAD)]], deadline=soon())
    assert outcomes[0] == [1.0]
    assert isinstance(outcomes[1], WorkerInputError)
    assert "reward_limit" in outcomes[1].message
    await arm.close()


async def test_the_learned_bound_holds_within_the_first_answer(serve: Serve) -> None:
    worker = ScriptedWorker()
    worker.answer = lambda request: (200, reply([1e5 if BAD in text else 1.0 for text in texts_of(request)]))
    arm = arm_for(serve(worker))
    fine, bad = await score_groups(arm, [[("p", "fine")], [("p", BAD)]], deadline=soon())
    assert fine == [1.0]
    assert isinstance(bad, WorkerInputError)
    assert "reward_limit" in bad.message
    await arm.close()


async def test_a_set_bound_holds_from_the_first_reward(serve: Serve) -> None:
    worker = poisoned(a_reward("51.0"))
    arm = arm_for(serve(worker), reward_limit=50.0)
    with pytest.raises(WorkerInputError, match="beyond the bound of 50"):
        await score_items(arm, [("p", BAD)], deadline=soon())
    await arm.close()


@pytest.mark.parametrize(
    ("status", "body"),
    [
        (413, b"<html>Request Entity Too Large</html>"),
        (400, b'{"object":"error","message":"This model\'s maximum context length is 512 tokens","code":400}'),
        (400, b'{"error":{"message":"The prompt is longer than the maximum model length of 512","code":400}}'),
        (400, b'{"error":{"message":"no","code":"context_length_exceeded"}}'),
        (422, b'{"error":"Input validation error: `inputs` must have less than 512 tokens. Given: 600"}'),
        (422, b'{"detail":[{"msg":"Input is too long"}]}'),
    ],
)
def test_an_over_long_input_is_recognised_in_other_words(status: int, body: bytes) -> None:
    assert says_too_long(status, body)


@pytest.mark.parametrize(
    ("status", "body"),
    [
        (400, b'{"error":{"message":"no chat template","code":400}}'),
        (404, b'{"message":"maximum context length"}'),
        (400, b"null"),
    ],
)
def test_other_refusals_are_not_taken_for_over_long(status: int, body: bytes) -> None:
    assert not says_too_long(status, body)

"""`VllmArm` against real servers: batches, checks of the answer, retries elsewhere, breakers, deadlines."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable
from typing import Any

import pytest

from service.errors import ConfigurationError
from service.scorers.protocol import (
    Scored,
    WorkerError,
    WorkerProtocolError,
    WorkerRejectedError,
    WorkerTimeoutError,
    WorkerUnavailableError,
)
from service.scorers.rm.client import ArmConfig, VllmArm
from service.scorers.rm.render import (
    ChatTemplate,
    MessagesRendering,
    PlainTemplate,
    Rendering,
    TemplateRendering,
    plain,
)
from service.scorers.transport.breaker import BreakerPolicy, BreakerState
from tests.service.scorers.worker_servers import (
    Json,
    RawServer,
    ScriptedWorker,
    Serve,
    error,
    read_request,
    reply,
    soon,
    until,
)
from tests.support.arms import score_groups, score_items

TEMPLATE = TemplateRendering(PlainTemplate())
PAIR = [("p", "a"), ("p", "bb")]


def arm_for(*urls: str, **options: Any) -> VllmArm:
    return VllmArm(ArmConfig(name="rm", urls=urls, **options))


def expected(items: list[tuple[str, str]]) -> list[float]:
    return [float(len(plain([("user", prompt), ("assistant", response)]))) for prompt, response in items]


async def test_messages_mode_sends_one_conversation_per_item(serve: Serve) -> None:
    worker = ScriptedWorker()
    arm = arm_for(serve(worker))
    assert await score_items(arm, [("p", "four"), ("p", ""), ("p", "a")], deadline=soon()) == [4.0, 0.0, 1.0]
    assert sorted(len(request["messages"][1]["content"]) for request in worker.requests) == [0, 1, 4]
    assert all(request["use_activation"] is False for request in worker.requests)
    await arm.close()  # type: ignore[attr-defined]


async def test_template_mode_sends_all_items_in_one_request(serve: Serve) -> None:
    worker = ScriptedWorker()
    arm = arm_for(serve(worker), rendering=TEMPLATE, model="served")
    assert await score_items(arm, PAIR, deadline=soon()) == expected(PAIR)
    (request,) = worker.requests
    assert request["model"] == "served"
    await arm.close()


async def test_a_large_batch_is_cut_into_bounded_requests_and_kept_in_order(serve: Serve) -> None:
    worker = ScriptedWorker()
    worker.delay = 0.005
    arm = arm_for(serve(worker), rendering=TEMPLATE, items_per_request=10, parallel_requests=3)
    items = [("p", "x" * number) for number in range(95)]
    assert await score_items(arm, items, deadline=soon()) == expected(items)
    assert sorted(len(request["input"]) for request in worker.requests) == [5, *[10] * 9]
    assert worker.most_in_flight == 3
    await arm.close()


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (reply([1.0]), "1 answers to 2 items"),
        (reply([1.0, 2.0, 3.0]), "3 answers to 2 items"),
        (reply([1.0, 2.0], classes=2), "2 classes"),
        (b'{"data":[{"index":0,"probs":[NaN],"num_classes":1},{"index":1,"probs":[1],"num_classes":1}]}', "not a"),
        (b'{"data":[{"index":0,"probs":[null],"num_classes":1},{"index":1,"probs":[1],"num_classes":1}]}', "not a"),
        (b'{"data":[{"index":0,"probs":[1e999],"num_classes":1},{"index":1,"probs":[1],"num_classes":1}]}', ""),
        ({"data": [reply([1.0])["data"][0]] * 2}, "index 0 is out of range or repeated"),
        ({"data": [*reply([1.0])["data"], {"index": 2, "probs": [1.0], "num_classes": 1}]}, "index 2"),
        (b"<html>hello</html>", "not a /classify reply"),
        (b"", "not a /classify reply"),
    ],
)
async def test_an_answer_that_breaks_the_promise_is_a_protocol_error(serve: Serve, answer: Any, words: str) -> None:
    worker = ScriptedWorker()
    worker.answer = lambda request: (200, answer)
    arm = arm_for(serve(worker), rendering=TEMPLATE)
    with pytest.raises(WorkerProtocolError) as caught:
        await score_items(arm, PAIR, deadline=soon())
    assert words in caught.value.message
    assert len(worker.questions) == 1
    assert arm.snapshots()[0].failures == 1
    await arm.close()


async def test_a_replica_that_keeps_answering_nonsense_is_taken_out_and_the_other_answers(serve: Serve) -> None:
    mad, good = ScriptedWorker(), ScriptedWorker()
    mad.answer = lambda request: (200, reply([1.0]))
    policy = BreakerPolicy(failures_to_open=2, backoff_seconds=30)
    arm = arm_for(serve(mad), serve(good), rendering=TEMPLATE, breaker=policy)
    for _ in range(10):
        assert await score_items(arm, PAIR, deadline=soon()) == expected(PAIR)
    assert arm.snapshots()[0].state is BreakerState.OPEN
    assert len(mad.requests) == 2
    await arm.close()


async def test_answers_in_another_order_go_to_their_items(serve: Serve) -> None:
    worker = ScriptedWorker()
    worker.answer = lambda request: (200, {"data": reply([1.0, 2.0])["data"][::-1]})
    arm = arm_for(serve(worker), rendering=TEMPLATE)
    assert await score_items(arm, PAIR, deadline=soon()) == [1.0, 2.0]
    await arm.close()


@pytest.mark.parametrize("status", [400, 401, 404, 413, 422, 501])
async def test_a_refusal_quotes_the_worker_and_is_not_retried(serve: Serve, status: int) -> None:
    first, second = ScriptedWorker(), ScriptedWorker()
    first.answer = second.answer = lambda request: (status, error("maximum context length is 9 tokens", status))
    arm = arm_for(serve(first), serve(second), rendering=TEMPLATE)
    with pytest.raises(WorkerRejectedError, match="maximum context length is 9 tokens") as caught:
        await score_items(arm, PAIR, deadline=soon())
    assert caught.value.details["worker_status"] == status
    # What is too long is looked for among the items.
    assert len(first.requests) + len(second.requests) == (3 if status in (400, 413, 422) else 1)
    assert all(snapshot.failures == 0 for snapshot in arm.snapshots())
    await arm.close()


async def test_a_template_that_refuses_is_a_refusal(refused_url: str) -> None:
    arm = arm_for(refused_url, rendering=TemplateRendering(ChatTemplate("{{ raise_exception('no system turn') }}")))
    with pytest.raises(WorkerRejectedError, match="no system turn"):
        await score_items(arm, PAIR, deadline=soon())
    await arm.close()


@pytest.mark.parametrize("status", [429, 500, 502, 503])
async def test_a_failing_replica_is_left_for_another(serve: Serve, status: int) -> None:
    bad, good = ScriptedWorker(), ScriptedWorker()
    bad.answer = lambda request: (status, error("EngineCore encountered an issue", status))
    arm = arm_for(serve(bad), serve(good), rendering=TEMPLATE)
    for _ in range(8):
        assert await score_items(arm, PAIR, deadline=soon()) == expected(PAIR)
    assert bad.requests
    await arm.close()


async def test_with_no_replica_left_the_arm_is_unavailable_and_says_why(serve: Serve) -> None:
    bad = ScriptedWorker()
    bad.answer = lambda request: (500, error("EngineCore encountered an issue", 500))
    arm = arm_for(serve(bad), rendering=TEMPLATE, breaker=BreakerPolicy(failures_to_open=2, backoff_seconds=30))
    for _ in range(2):
        assert arm.available
        with pytest.raises(WorkerUnavailableError, match="EngineCore encountered an issue"):
            await score_items(arm, PAIR, deadline=soon())
    assert not arm.available
    with pytest.raises(WorkerUnavailableError):
        await score_items(arm, PAIR, deadline=soon())
    assert len(bad.questions) == 2
    await arm.close()


async def test_a_refused_connection_opens_the_breaker_and_the_next_replica_answers(
    serve: Serve, refused_url: str
) -> None:
    arm = arm_for(refused_url, serve(ScriptedWorker()), rendering=TEMPLATE)
    for _ in range(4):
        assert await score_items(arm, PAIR, deadline=soon()) == expected(PAIR)
    gone, alive = arm.snapshots()
    assert (gone.state, gone.requests) == (BreakerState.OPEN, 1)
    assert (alive.state, alive.requests) == (BreakerState.CLOSED, 4)
    await arm.close()


async def test_the_breaker_lets_one_trial_through_after_its_back_off(serve: Serve) -> None:
    now = 0.0
    worker = ScriptedWorker()
    worker.answer = lambda request: (503, error("down", 503))
    config = ArmConfig(
        name="rm",
        urls=(serve(worker),),
        rendering=TEMPLATE,
        breaker=BreakerPolicy(failures_to_open=1, backoff_seconds=10),
    )
    arm = VllmArm(config, clock=lambda: now)
    with pytest.raises(WorkerUnavailableError):
        await score_items(arm, PAIR, deadline=soon())
    assert not arm.available
    now = 10.0
    worker.answer, worker.delay = worker.lengths, 0.05
    trial = asyncio.create_task(score_items(arm, PAIR, deadline=soon()))
    await until(lambda: len(worker.questions) == 2)
    assert not arm.available
    assert await trial == expected(PAIR)
    assert arm.available
    await arm.close()


async def test_work_in_flight_on_a_replica_that_stops_accepting_is_resent_elsewhere(
    serve: Serve,
) -> None:
    good = ScriptedWorker()
    taken = asyncio.Event()

    async def hang(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await read_request(reader)
        taken.set()
        try:
            await reader.read()
        except ConnectionError:
            pass
        finally:
            writer.close()

    server = await asyncio.start_server(hang, "127.0.0.1", 0)
    dying = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    arm = arm_for(dying, serve(good), rendering=TEMPLATE, attempt_timeout_seconds=60)
    stuck = asyncio.create_task(score_items(arm, PAIR, deadline=soon(60)))
    await taken.wait()
    server.close()
    others = [asyncio.create_task(score_items(arm, PAIR, deadline=soon(60))) for _ in range(4)]
    async with asyncio.timeout(5):
        assert await asyncio.gather(stuck, *others) == [expected(PAIR)] * 5
    assert arm.snapshots()[0].state is BreakerState.OPEN
    await arm.close()
    await asyncio.sleep(0.01)


async def test_a_slow_replica_is_left_for_another_before_the_deadline(serve: Serve) -> None:
    slow, good = ScriptedWorker(), ScriptedWorker()
    slow.delay = 30
    arm = arm_for(serve(slow), serve(good), rendering=TEMPLATE, attempt_timeout_seconds=0.05)
    for _ in range(2):
        assert await score_items(arm, PAIR, deadline=soon()) == expected(PAIR)
    assert slow.requests
    await arm.close()


async def test_one_attempt_leaves_time_for_another_even_with_a_long_attempt_timeout(serve: Serve) -> None:
    slow, good = ScriptedWorker(), ScriptedWorker()
    slow.delay = 30
    arm = arm_for(serve(slow), serve(good), rendering=TEMPLATE, attempt_timeout_seconds=60)
    for _ in range(2):
        assert await score_items(arm, PAIR, deadline=soon(2.0)) == expected(PAIR)
    assert slow.requests
    await arm.close()


def deadlines_of(arm: VllmArm, monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The deadlines of the arm's attempts from now on, as they are made."""
    deadlines: list[float] = []
    for replica in arm.replicas:

        async def send(*args: Any, real: Any = replica.send, items: int, deadline: float) -> Any:
            deadlines.append(deadline)
            return await real(*args, items=items, deadline=deadline)

        monkeypatch.setattr(replica, "send", send)
    return deadlines


async def test_the_only_replica_left_gets_all_the_time(
    serve: Serve, refused_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    arm = arm_for(refused_url, serve(ScriptedWorker()), rendering=TEMPLATE, breaker=BreakerPolicy(backoff_seconds=30))
    for _ in range(2):
        assert await score_items(arm, PAIR, deadline=soon()) == expected(PAIR)
    deadlines = deadlines_of(arm, monkeypatch)
    deadline = soon()
    await score_items(arm, PAIR, deadline=deadline)
    assert deadlines == pytest.approx([deadline], abs=1e-6)
    await arm.close()


async def test_the_last_attempt_gets_all_the_time(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    bad = [ScriptedWorker() for _ in range(3)]
    for worker in bad:
        worker.answer = lambda request: (500, error("EngineCore", 500))
    arm = arm_for(*map(serve, bad), rendering=TEMPLATE, max_attempts=2)
    deadlines = deadlines_of(arm, monkeypatch)
    deadline = soon()
    with pytest.raises(WorkerUnavailableError):
        await score_items(arm, PAIR, deadline=deadline)
    first, last = deadlines
    assert first < deadline - 1
    assert last == pytest.approx(deadline, abs=1e-6)
    await arm.close()


async def test_short_deadlines_of_callers_take_no_replica_out(serve: Serve) -> None:
    worker = ScriptedWorker()
    worker.delay = 30
    policy = BreakerPolicy(failures_to_open=1, backoff_seconds=30)
    arm = arm_for(serve(worker), rendering=TEMPLATE, breaker=policy)
    for _ in range(3):
        with pytest.raises(WorkerTimeoutError):
            await score_items(arm, PAIR, deadline=soon(0.05))
    (snapshot,) = arm.snapshots()
    assert (snapshot.state, snapshot.failures) == (BreakerState.CLOSED, 0)
    worker.delay = 0
    assert await score_items(arm, PAIR, deadline=soon()) == expected(PAIR)
    await arm.close()


async def test_a_replica_that_does_not_answer_in_its_time_is_taken_out(serve: Serve) -> None:
    """Also under a caller's deadline equal to the attempt's, of which the first of two attempts has its share."""
    slow, good = ScriptedWorker(), ScriptedWorker()
    slow.delay = 30
    policy = BreakerPolicy(failures_to_open=1, backoff_seconds=30)
    arm = arm_for(serve(slow), serve(good), rendering=TEMPLATE, breaker=policy, attempt_timeout_seconds=4.0)
    for _ in range(2):
        assert await score_items(arm, PAIR, deadline=soon(4.0)) == expected(PAIR)
    assert [snapshot.state for snapshot in arm.snapshots()] == [BreakerState.OPEN, BreakerState.CLOSED]
    await arm.close()


@pytest.mark.parametrize("size", [2, 100])
async def test_the_deadline_of_the_call_is_a_timeout_error(serve: Serve, size: int) -> None:
    slow = ScriptedWorker()
    slow.delay = 30
    arm = arm_for(serve(slow), rendering=TEMPLATE, items_per_request=10)
    with pytest.raises(WorkerTimeoutError, match="no answer before the deadline"):
        await score_items(arm, PAIR * (size // 2), deadline=soon(0.05))
    assert arm.snapshots()[0].in_flight == 0
    await arm.close()


async def test_dropped_keep_alive_connections_are_invisible_to_callers(raw_server: RawServer) -> None:
    async def once(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await read_request(reader)
        body = b'{"data":[{"index":0,"probs":[0.5],"num_classes":1}]}'
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body))
        await read_request(reader)

    async with raw_server(once) as url:
        arm = arm_for(url)
        for _ in range(5):
            assert await score_items(arm, [("p", "r")], deadline=soon()) == [0.5]
        assert arm.snapshots()[0].failures == 0
        await arm.close()


async def test_bytes_that_are_not_http_are_a_worker_protocol_error(raw_server: RawServer) -> None:
    async def garble(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await read_request(reader)
        writer.write(b"\x00\x01 nonsense\r\n\r\n")

    async with raw_server(garble) as url:
        arm = arm_for(url)
        with pytest.raises(WorkerProtocolError, match="HTTP"):
            await score_items(arm, [("p", "r")], deadline=soon())
        await arm.close()


async def test_the_request_goes_to_the_replica_with_the_fewest_outstanding(serve: Serve) -> None:
    busy, idle = ScriptedWorker(), ScriptedWorker()
    busy.delay = idle.delay = 0.3
    arm = arm_for(serve(busy), serve(idle), rendering=TEMPLATE)
    await asyncio.gather(*(score_items(arm, PAIR, deadline=soon()) for _ in range(10)))
    assert (len(busy.requests), len(idle.requests)) == (5, 5)
    assert all(snapshot.in_flight == 0 and snapshot.latency_seconds for snapshot in arm.snapshots())
    await arm.close()


async def test_an_arm_over_its_limit_in_flight_is_unavailable_until_answers_come(serve: Serve) -> None:
    worker = ScriptedWorker()
    worker.delay = 0.1
    arm = arm_for(serve(worker), rendering=TEMPLATE, max_in_flight=3)
    outcomes = await asyncio.gather(
        *(score_items(arm, PAIR, deadline=soon()) for _ in range(10)), return_exceptions=True
    )
    assert [outcome for outcome in outcomes if isinstance(outcome, list)] == [expected(PAIR)] * 3
    assert [type(outcome) for outcome in outcomes[3:]] == [WorkerUnavailableError] * 7
    assert arm.available
    assert worker.most_in_flight == 3
    await arm.close()


async def test_a_cancelled_call_frees_its_place_and_blames_nobody(serve: Serve) -> None:
    worker = ScriptedWorker()
    worker.delay = 30
    arm = arm_for(serve(worker), rendering=TEMPLATE, items_per_request=2)
    task = asyncio.create_task(score_items(arm, [("p", "x" * n) for n in range(8)], deadline=soon(60)))
    await until(lambda: len(worker.requests) == 4)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    (snapshot,) = arm.snapshots()
    assert (snapshot.in_flight, snapshot.failures) == (0, 0)
    await arm.close()


@pytest.mark.parametrize("rendering", [TEMPLATE, MessagesRendering()])
async def test_an_item_too_long_leaves_the_others_their_rewards(serve: Serve, rendering: Rendering) -> None:
    worker = ScriptedWorker()
    worker.answer = picky(worker)
    arm = arm_for(serve(worker), rendering=rendering, items_per_request=4)
    items = [*PAIR, ("p", "ccc"), ("p", "bad"), ("p", "a"), ("p", "eeeee")]
    whole = [*PAIR, ("p", "ccc"), ("p", "dddd"), ("p", "eeeee")]
    (found,), (fine,) = [await arm.score_groups([group], deadline=soon()) for group in (items, whole)]
    assert isinstance(found, Scored)
    assert isinstance(fine, Scored)
    told = dict(zip(whole, fine.rewards, strict=True))
    assert [found.rewards[at] for at in (0, 1, 2, 4, 5)] == [told[items[at]] for at in (0, 1, 2, 4, 5)]
    assert math.isnan(found.rewards[3])
    assert found.failures == ["", "", "", "too_long", "", ""]
    assert all(snapshot.failures == 0 for snapshot in arm.snapshots())
    await arm.close()


async def test_an_item_refused_otherwise_ends_its_instance(serve: Serve) -> None:
    worker = ScriptedWorker()
    worker.answer = picky(worker, words="out of vocabulary")
    arm = arm_for(serve(worker), rendering=TEMPLATE, items_per_request=2)
    with pytest.raises(WorkerRejectedError, match="out of vocabulary"):
        await score_items(arm, [*PAIR * 3, ("p", "bad")], deadline=soon())
    await arm.close()


def picky(
    worker: ScriptedWorker, status: int = 400, word: str = "bad", words: str = ""
) -> Callable[[Json], tuple[int, Any]]:
    """Refuses requests that hold the word; for their length, or in words of its own."""

    def answer(request: Json) -> tuple[int, Any]:
        texts = request["input"] if "input" in request else [request["messages"][-1]["content"]]
        if any(word in text for text in texts):
            return status, error(words, status) if words else error("item is too long", status, param="input_tokens")
        return worker.lengths(request)

    return answer


def groups_of(count: int, bad: frozenset[int] = frozenset()) -> list[list[tuple[str, str]]]:
    """Groups of one to three items; the last item of the bad ones holds "bad"."""
    groups = [[("p", "x" * (number + item)) for item in range(1 + number % 3)] for number in range(count)]
    for number in bad:
        groups[number][-1] = ("p", "bad")
    return groups


@pytest.mark.parametrize("size", [1, 2, 7, 64])
async def test_groups_come_back_in_order_and_share_requests_without_being_split(serve: Serve, size: int) -> None:
    worker = ScriptedWorker()
    arm = arm_for(serve(worker), rendering=TEMPLATE, items_per_request=size)
    groups = groups_of(20)
    assert await score_groups(arm, groups, deadline=soon()) == [expected(group) for group in groups]
    assert max(len(request["input"]) for request in worker.requests) <= size
    if size >= 3:
        asked = {tuple(request["input"]) for request in worker.requests}
        for group in groups:
            texts = [plain([("user", prompt), ("assistant", response)]) for prompt, response in group]
            assert any(set(texts) <= set(request) for request in asked)
    await arm.close()  # type: ignore[attr-defined]


@pytest.mark.parametrize("rendering", [TEMPLATE, MessagesRendering()])
@pytest.mark.parametrize("bad", [{0}, {19}, {4, 5}, set(range(20))])
async def test_only_the_refused_groups_are_without_rewards(serve: Serve, rendering: Rendering, bad: set[int]) -> None:
    worker = ScriptedWorker()
    worker.answer = picky(worker)
    arm = arm_for(serve(worker), rendering=rendering, items_per_request=16)
    groups = groups_of(20, frozenset(bad))
    found = await arm.score_groups(groups, deadline=soon())
    outcomes = [one if isinstance(one, WorkerError) else one.rewards for one in found]
    for number in bad:
        # The bad item is the last one of its group.
        if len(groups[number]) == 1:
            assert isinstance(outcomes[number], WorkerRejectedError)
        else:
            assert [reward == reward for reward in outcomes[number]] == [True] * (len(groups[number]) - 1) + [False]
    for number in set(range(20)) - bad:
        wanted = [float(len(response)) for _, response in groups[number]]
        assert outcomes[number] == (expected(groups[number]) if rendering is TEMPLATE else wanted)
    await arm.close()


async def test_one_refused_group_halves_its_own_request_alone(serve: Serve) -> None:
    worker = ScriptedWorker()
    worker.answer = picky(worker)
    arm = arm_for(serve(worker), rendering=TEMPLATE, items_per_request=16)
    groups: list[list[tuple[str, str]]] = [[("p", "a"), ("p", "bb")] for _ in range(16)]
    groups[3] = [("p", "a"), ("p", "bad")]
    await score_groups(arm, groups, deadline=soon())
    clean = [request for request in worker.requests if len(request["input"]) == 16 and not has_bad(request)]
    assert len(clean) == 1
    assert len(worker.requests) == 1 + (1 + 2 * 3) + 2
    await arm.close()


def has_bad(request: Json) -> bool:
    return any("bad" in text for text in request["input"])


async def test_a_refusal_of_the_caller_is_not_asked_again_in_halves(serve: Serve) -> None:
    worker = ScriptedWorker()
    worker.answer = lambda request: (401, error("Unauthorized", 401))
    arm = arm_for(serve(worker), rendering=TEMPLATE)
    outcomes = await score_groups(arm, groups_of(8), deadline=soon())
    assert [type(outcome) for outcome in outcomes] == [WorkerRejectedError] * 8
    assert len(worker.requests) == 1
    await arm.close()


async def test_the_deadline_of_a_batch_leaves_the_rewards_that_have_come(serve: Serve) -> None:
    worker = ScriptedWorker()

    def answer_once(request: Json) -> tuple[int, Any]:
        worker.delay = 30
        return worker.lengths(request)

    worker.answer = answer_once
    arm = arm_for(serve(worker), rendering=TEMPLATE, items_per_request=2, parallel_requests=1)
    groups = [PAIR] * 5
    outcomes = await score_groups(arm, groups, deadline=soon(1.0))
    assert outcomes[0] == expected(PAIR)
    assert [type(outcome) for outcome in outcomes[1:]] == [WorkerTimeoutError] * 4
    assert len(worker.requests) == 2
    await arm.close()


async def test_a_batch_has_no_more_requests_in_flight_than_one_call_may_have(serve: Serve) -> None:
    worker = ScriptedWorker()
    worker.delay = 0.01
    arm = arm_for(serve(worker), parallel_requests=3)
    groups = groups_of(12)
    wanted = [[float(len(response)) for _, response in group] for group in groups]
    assert await score_groups(arm, groups, deadline=soon()) == wanted
    assert worker.most_in_flight == 3
    await arm.close()


async def test_an_arm_that_is_out_answers_a_batch_with_its_error(refused_url: str) -> None:
    arm = arm_for(refused_url, breaker=BreakerPolicy(backoff_seconds=30))
    for _ in range(2):
        outcomes = await score_groups(arm, [PAIR, PAIR], deadline=soon())
        assert [type(outcome) for outcome in outcomes] == [WorkerUnavailableError] * 2
    await arm.close()


async def test_a_cancelled_batch_frees_its_places(serve: Serve) -> None:
    worker = ScriptedWorker()
    worker.delay = 30
    arm = arm_for(serve(worker), rendering=TEMPLATE, items_per_request=2)
    task = asyncio.create_task(score_groups(arm, [PAIR] * 4, deadline=soon(60)))
    await until(lambda: len(worker.requests) == 4)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    (snapshot,) = arm.snapshots()
    assert (snapshot.in_flight, snapshot.failures) == (0, 0)
    await arm.close()


@pytest.mark.parametrize("groups", [[], [PAIR, []]])
async def test_an_empty_batch_or_group_is_a_mistake_of_the_caller(refused_url: str, groups: Any) -> None:
    arm = arm_for(refused_url)
    with pytest.raises(ValueError, match="at least one"):
        await score_groups(arm, groups, deadline=soon())
    await arm.close()


async def test_no_items_is_a_mistake_of_the_caller(refused_url: str) -> None:
    arm = arm_for(refused_url)
    with pytest.raises(ValueError, match="at least one item"):
        await score_items(arm, [], deadline=soon())
    await arm.close()


@pytest.mark.parametrize(
    "make",
    [
        lambda: ArmConfig(name="rm", urls=()),
        lambda: ArmConfig(name="rm", urls=("http://a", "http://a")),
        lambda: ArmConfig(name="rm", urls=("http://a",), max_in_flight=0),
        lambda: ArmConfig(name="rm", urls=("http://a",), attempt_timeout_seconds=float("nan")),
        lambda: VllmArm(ArmConfig(name="rm", urls=("a:80",))),
    ],
)
def test_a_senseless_configuration_is_refused_at_start_up(make: Callable[[], object]) -> None:
    with pytest.raises(ConfigurationError, match="rm"):
        make()


def test_the_key_does_not_show_in_the_configuration() -> None:
    assert "hunter2" not in repr(ArmConfig(name="rm", urls=("http://a",), api_key="hunter2"))

"""What every store must do with audits: queue them with their decision, hand each to one, finish it once."""

from __future__ import annotations

import asyncio

import pytest

from service.errors import NotReadyError
from service.stores.protocol import (
    AuditedDecision,
    AuditProgress,
    AuditTask,
    AuditVerdict,
    DecisionRecord,
    FeedbackRecord,
    FeedbackStatus,
    RunIdentity,
    Store,
)
from tests.contract.test_store_contract import AWKWARD, apply_one, by_id, decision, payload, whole_log
from tests.support.clock import Clock

LEASE = 60.0
PAYLOAD = payload(2, b"audited")


async def queued(store: Store, run: str, count: int, *, seconds: float = 3600.0) -> list[AuditTask]:
    """Save so many decisions, all of them chosen."""
    records = [decision() for _ in range(count)]
    tasks = [AuditTask(record.decision_id, AWKWARD + record.decision_id.encode()) for record in records]
    await store.save_audited(run, records, tasks, counted=count, seconds=seconds)
    return tasks


async def claim(store: Store, run: str, count: int = 10, *, keep: int = 100, budget: float | None = None) -> list[str]:
    found = await store.claim_audits(run, count=count, lease_seconds=LEASE, keep=keep, budget=budget)
    return [task.decision_id for task in found.tasks]


async def finish(
    store: Store, run: str, identity: RunIdentity, *names: str, value: bytes = b"v", keep: int = 10, price: float = 1.0
) -> list[FeedbackStatus]:
    verdicts = [AuditVerdict(name, price, PAYLOAD, value, b"texts") for name in names]
    return [result.status for result in await store.finish_audits(run, verdicts, identity=identity, keep=keep)]


async def test_decisions_are_saved_counted_and_queued_with_their_tasks(store: Store, run: str) -> None:
    records = [decision(), decision()]
    task = AuditTask(records[1].decision_id, AWKWARD)
    assert await store.save_audited(run, records, [task], counted=2, seconds=60) == AuditProgress(2)
    assert await store.save_audited(run, [decision()], [], counted=1, seconds=60) == AuditProgress(3)
    found = await store.claim_audits(run, count=10, lease_seconds=LEASE, keep=100)
    assert (found.tasks, found.waiting, found.dropped) == ([task], 1, 0)
    assert (await apply_one(store, run, by_id(records[0]))).status is FeedbackStatus.APPLIED
    assert (await apply_one(store, run, by_id(records[1]))).status is FeedbackStatus.APPLIED


async def test_of_many_who_claim_each_decision_goes_to_one(store: Store, run: str) -> None:
    tasks = await queued(store, run, 30)
    parts = await asyncio.gather(*(claim(store, run, 7) for _ in range(8)))
    assert sorted(name for part in parts for name in part) == sorted(task.decision_id for task in tasks)


async def test_a_lease_that_ends_gives_the_decision_to_the_next(store: Store, run: str) -> None:
    (task,) = await queued(store, run, 1)
    found = await store.claim_audits(run, count=1, lease_seconds=0.0, keep=10)
    assert [it.decision_id for it in found.tasks] == [task.decision_id]
    assert await claim(store, run) == [task.decision_id], "the lease of 0 s is over"
    assert (await claim(store, run), await store.audits_waiting(run)) == ([], 1)


async def test_a_task_that_expires_drops_its_decision(store: Store, clock: Clock, run: str) -> None:
    await queued(store, run, 1, seconds=60.0)
    clock.advance(61, run)
    found = await store.claim_audits(run, count=1, lease_seconds=LEASE, keep=10)
    assert (found.tasks, found.waiting, found.dropped) == ([], 0, 1)


async def test_an_audit_is_finished_once_with_one_event(store: Store, run: str) -> None:
    identity = await store.open_run(run, b"f")
    (task,) = await queued(store, run, 1)
    await claim(store, run)
    statuses = await asyncio.gather(*(finish(store, run, identity, task.decision_id) for _ in range(10)))
    assert sorted(status for (status,) in statuses) == [FeedbackStatus.APPLIED, *[FeedbackStatus.DUPLICATE] * 9]
    (entry,) = await whole_log(store, run)
    assert (entry.decision_id, entry.payload, entry.value) == (task.decision_id, PAYLOAD, b"v")
    assert (await store.audits_waiting(run), await claim(store, run)) == (0, [])


async def test_an_audit_without_verdict_leaves_no_event(store: Store, run: str) -> None:
    identity = await store.open_run(run, b"f")
    (task,) = await queued(store, run, 1)
    await claim(store, run)
    assert await finish(store, run, identity, task.decision_id, value=b"") == [FeedbackStatus.APPLIED]
    assert (await whole_log(store, run), await store.newest_audits(run, 10)) == ([], [])
    assert await store.audits_waiting(run) == 0


async def test_feedback_and_an_audit_of_one_decision_are_both_kept(store: Store, run: str) -> None:
    identity, record = await store.open_run(run, b"f"), decision()
    await store.save_audited(run, [record], [AuditTask(record.decision_id, b"t")], counted=1, seconds=60)
    await claim(store, run)
    await apply_one(store, run, by_id(record, b"gold"))
    await finish(store, run, identity, record.decision_id)
    log = await whole_log(store, run)
    assert [(entry.decision_id, entry.payload, entry.value) for entry in log] == [
        (record.decision_id, record.payload, b"gold"),
        (record.decision_id, PAYLOAD, b"v\ngold"),
    ]


async def test_feedback_after_an_audit_carries_what_the_referee_said(store: Store, run: str) -> None:
    identity, record = await store.open_run(run, b"f"), decision(3, content_key="content")
    await store.save_audited(run, [record], [AuditTask(record.decision_id, b"t")], counted=1, seconds=60)
    await finish(store, run, identity, record.decision_id)
    feedback = FeedbackRecord(b"gold", content_key="content", preferred=1)
    assert (await apply_one(store, run, feedback)).status is FeedbackStatus.APPLIED
    assert [(entry.payload, entry.value) for entry in await whole_log(store, run)] == [
        (PAYLOAD, b"v"),
        (PAYLOAD, b"gold"),
    ]


async def test_a_schedule_begins_anew_for_everybody(store: Store, run: str) -> None:
    assert await store.audit_progress(run) == AuditProgress(0)
    await queued(store, run, 5)
    await store.restart_audits(run, 5)
    await store.restart_audits(run, 3)
    await queued(store, run, 2)
    assert await store.audit_progress(run) == AuditProgress(7, 5)


async def test_more_than_may_wait_are_dropped_oldest_first(store: Store, run: str) -> None:
    names = sorted(task.decision_id for task in await queued(store, run, 10))
    found = await store.claim_audits(run, count=10, lease_seconds=LEASE, keep=6)
    assert ([task.decision_id for task in found.tasks], found.waiting, found.dropped) == (names[4:], 6, 4)


async def test_a_spent_budget_lets_nothing_be_claimed(store: Store, run: str) -> None:
    identity = await store.open_run(run, b"f")
    await queued(store, run, 3)
    (first,) = await claim(store, run, 1, budget=2.5)
    await finish(store, run, identity, first, price=2.0)
    (second,) = await claim(store, run, 1, budget=2.5)
    await finish(store, run, identity, second, price=2.0)
    assert await claim(store, run, 1, budget=2.5) == []
    assert len(await claim(store, run, 1, budget=4.5)) == 1


async def test_a_run_that_was_lost_takes_no_audit(store: Store, run: str) -> None:
    identity = await store.open_run(run, b"f")
    (task,) = await queued(store, run, 1)
    other = RunIdentity("another", identity.fingerprint)
    with pytest.raises(NotReadyError, match="lost"):
        await finish(store, run, other, task.decision_id)
    with pytest.raises(NotReadyError, match="lost"):
        await store.judge_audit(run, DecisionRecord(task.decision_id, PAYLOAD), b"v", identity=other)
    assert await whole_log(store, run) == []


async def test_the_newest_audits_are_kept_with_their_texts(store: Store, run: str) -> None:
    identity = await store.open_run(run, b"f")
    names = sorted(task.decision_id for task in await queued(store, run, 4))
    for name in names:
        await finish(store, run, identity, name, keep=3)
        await asyncio.sleep(0.002)  # their order is that of the server's clock
    kept = [AuditedDecision(name, PAYLOAD, b"texts") for name in names[:0:-1]]
    assert await store.newest_audits(run, 10) == kept
    assert await store.newest_audits(run, 1) == kept[:1]
    assert (await store.audited(run, names[0]), await store.audited(run, names[1])) == (None, kept[-1])


async def test_what_a_person_says_is_appended_once(store: Store, run: str) -> None:
    identity = await store.open_run(run, b"f")
    (task,) = await queued(store, run, 1)
    name = task.decision_id
    await finish(store, run, identity, name)
    record = DecisionRecord(name, payload(2, b"judged"))
    first = await store.judge_audit(run, record, b"left", identity=identity)
    again = await store.judge_audit(run, record, b"left", identity=identity)
    other = await store.judge_audit(run, record, b"right", identity=identity)
    assert [one.status for one in (first, again, other)] == ["applied", "duplicate", "conflict"]
    assert (again.event_id, other.event_id, other.standing_value) == (first.event_id, first.event_id, b"left")
    (kept,) = await store.newest_audits(run, 10)
    assert kept.judged == b"left"
    await apply_one(store, run, FeedbackRecord(b"gold", decision_id=name))
    assert [(entry.payload, entry.value) for entry in await whole_log(store, run)] == [
        (PAYLOAD, b"v"),
        (record.payload, b"left"),
        (record.payload, b"gold"),
    ]


async def test_a_person_who_comes_after_the_feedback_is_told_with_it(store: Store, run: str) -> None:
    identity = await store.open_run(run, b"f")
    (task,) = await queued(store, run, 1)
    await finish(store, run, identity, task.decision_id)
    await apply_one(store, run, FeedbackRecord(b"gold", decision_id=task.decision_id))
    await store.judge_audit(run, DecisionRecord(task.decision_id, PAYLOAD), b"left", identity=identity)
    assert [entry.value for entry in await whole_log(store, run)] == [b"v", b"gold", b"left\ngold"]


def part(name: str, task: bytes) -> AuditTask:
    return AuditTask(name, task, collect_seconds=600.0, parts=3)


async def collect(store: Store, run: str, *parts: AuditTask) -> None:
    for each in parts:
        await store.save_audited(run, [decision()], [each], counted=0, seconds=3600.0)


async def test_parts_are_claimed_together_once_their_time_has_come(store: Store, run: str, clock: Clock) -> None:
    identity = await store.open_run(run, b"f")
    await collect(store, run, part("g", b"one"), part("h", b"other"), part("g", b"two"))
    assert (await claim(store, run), await store.audits_waiting(run)) == ([], 2)
    clock.advance(601, run)
    found = await store.claim_audits(run, count=10, lease_seconds=LEASE, keep=100)
    assert {task.decision_id: task.task for task in found.tasks} == {"g": b"onetwo", "h": b"other"}
    assert await finish(store, run, identity, "g") == [FeedbackStatus.APPLIED]
    assert await finish(store, run, identity, "g") == [FeedbackStatus.DUPLICATE]
    await collect(store, run, part("g", b"late"))
    assert await store.audits_waiting(run) == 1, "a late part does not begin it again"


async def test_parts_beyond_the_bound_are_left_out(store: Store, run: str, clock: Clock) -> None:
    await asyncio.gather(*(collect(store, run, part("g", b"p")) for _ in range(8)))
    clock.advance(601, run)
    found = await store.claim_audits(run, count=10, lease_seconds=LEASE, keep=100)
    assert [task.task for task in found.tasks] == [b"ppp"]

"""The learner on a real store: after any restart, trim or lag it holds the fold of the log, bit for bit, or refuses."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from itertools import count
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import redis

from router_core.attempts import Attempt, Outcome
from router_core.posterior import FoldSettings, Posterior
from router_core.prior import NONE_HYPERPARAMETERS, Prior, no_prior
from router_core.records import Event, Feedback, Signal, credit
from service.errors import NotReadyError
from service.stores.ids import new_decision_id
from service.stores.protocol import DecisionRecord, FeedbackRecord, LogEntry, RunIdentity
from service.stores.redis import RedisStore
from service.telemetry import Telemetry
from service.usecases import follow
from service.usecases.decisions import StoredDecision, encode_decision, encode_feedback
from service.usecases.follow import Learner
from service.usecases.runs import Run, RunTemplate
from tests.support.arms import ScriptedArm
from tests.support.gateway import DIM, fold_from_scratch, fresh_run, read_events, small_encoder, until

if TYPE_CHECKING:
    from tests.conftest import ValkeyProcess

K = 3
FOLD = FoldSettings(block_size=4, refresh_events=16)
KEEP_ALL = 1_000_000
_IDS = count(1)


class PausableStore(RedisStore):
    """A store whose log can be made unreadable for a while, as for a replica that is paused."""

    def __init__(self, url: str) -> None:
        super().__init__(url, window_seconds=3600)
        self.readable = asyncio.Event()
        self.readable.set()

    async def read_log(self, run: str, after: str, *, count: int, block_ms: int) -> list[LogEntry]:
        """Read once it is readable, and without waiting on the server."""
        await self.readable.wait()
        entries = await super().read_log(run, after, count=count, block_ms=0)
        if not entries:
            await asyncio.sleep(0.002)
        return entries if self.readable.is_set() else []


@dataclass(slots=True)
class Stage:
    """One run's log on a real server, and replicas that learn from it."""

    url: str
    run: str
    store: RedisStore
    executor: ThreadPoolExecutor
    rng: np.random.Generator
    signal: Signal = Signal.PREFERENCE
    gamma: float = 1.0
    appended: list[Event] = field(default_factory=list)

    @property
    def prior(self) -> Prior:
        """Nothing known."""
        return no_prior(K, DIM, replace(NONE_HYPERPARAMETERS, gamma=self.gamma))

    def template(self, **changes: Any) -> RunTemplate:
        """What the replicas share."""
        given: dict[str, Any] = {
            "arms": [ScriptedArm(f"rm-{k}") for k in range(K)],
            "encoder": small_encoder(),
            "priors": lambda _: self.prior,
            "form": self.prior.form,
            "fold_settings": FOLD,
            "signal": self.signal,
            "policy": "bayesian",
            "origin": "test",
            "seed": 0,
        }
        return RunTemplate(**{**given, **changes})

    def answer(self, arm: int) -> Attempt:
        """An RM's answer with any verdict."""
        return Attempt(arm, 0, Outcome.ANSWERED, rewards=self.rng.integers(2, size=2).astype(float).tolist())

    async def append(self, number: int) -> None:
        """So many events at the end of the log."""
        decisions, feedback = [], []
        for _ in range(number):
            x = self.rng.standard_normal(DIM).astype("<f4")
            arm = int(self.rng.integers(-1, K))
            attempts = [self.answer(k) for k in (range(K) if arm < 0 else [arm])]
            stored = StoredDecision(
                n=2, x=(x / np.linalg.norm(x)).tobytes(), offsets=self.rng.random(K).tolist(), means=[], sds=[],
                propensities=[], policy="bayesian", version=0, time_ms=1, attempts=attempts,
                arm=None if arm < 0 else arm, rewards=[], verdict=attempts[0].verdict, propensity=1.0,
            )  # fmt: skip
            if self.signal is Signal.PREFERENCE and self.rng.random() < 0.5:
                stored.shadows = [self.answer(k) for k in range(K) if 0 <= arm != k and self.rng.random() < 0.7]
            decision_id = new_decision_id(next(_IDS), self.rng.bytes(10))
            value = float(self.rng.integers(2)) if self.signal is Signal.PREFERENCE else float(self.rng.gamma(2.0))
            decisions.append(DecisionRecord(decision_id, encode_decision(stored)))
            given = Feedback(self.signal, value)
            feedback.append(FeedbackRecord(encode_feedback(given), decision_id=decision_id))
            compared = self.signal is Signal.PREFERENCE
            heard = {it.arm: credit(it.rewards, int(value)) for it in stored.heard} if compared else {}
            told = [(it, stored.offsets[it], heard[it]) for it in heard if it != arm]
            self.appended.append(
                Event(
                    arm,
                    stored.x,
                    0.0 if arm < 0 else stored.offsets[arm],
                    heard.get(arm),
                    given,
                    decision_id,
                    tuple(told),
                )
            )
        await self.store.save_decisions(self.run, decisions)
        await self.store.apply_feedback(self.run, feedback)

    @asynccontextmanager
    async def replica(
        self,
        *,
        keep_events: int = KEEP_ALL,
        store: RedisStore | None = None,
        template: RunTemplate | None = None,
        identity: RunIdentity | None = None,
        telemetry: Telemetry | None = None,
    ) -> AsyncIterator[Run]:
        """A learner that follows the log, until the end of the block."""
        template = template or self.template()
        identity = identity or await self.store.open_run(self.run, template.fingerprint(template.terms()).encode())
        run = Run(self.run, template, identity)
        learner = Learner(run, store or self.store, self.executor, telemetry or Telemetry(), keep_events=keep_events)
        task = asyncio.create_task(learner.run_forever())
        try:
            yield run
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    async def caught_up(self, run: Run, version: int) -> Posterior:
        """The replica's posterior once it is ready and has learned from so many events."""
        await until(
            lambda: (run.ready.is_set() and run.posterior.count >= version) or run.failure, f"version {version}"
        )
        assert run.failure is None
        return run.posterior

    def events(self) -> list[Event]:
        """The log, read without the store's code."""
        return read_events(self.url, self.run)

    def folded(self, events: Sequence[Event] | None = None) -> str:
        """Digest of the fold from scratch of all that was ever appended, or of the given events."""
        return fold_from_scratch(self.appended if events is None else events, self.prior, FOLD).digest()

    async def snapshot_at(self, position: int) -> None:
        """Wait until the snapshot of so many events is saved; 0: make sure that there is none."""
        wanted = str(position).encode() if position else None
        await until(lambda: self.server().hget(self.key("snap"), "position") == wanted, f"snapshot at {position}")

    def server(self) -> Any:
        """The server itself, for what only accidents and operators do."""
        return redis.Redis.from_url(self.url)

    def key(self, name: str) -> str:
        """A key of the run."""
        return f"rr:{{{self.run}}}:{name}"


Open = Callable[..., Stage]


@pytest.fixture
async def open_stage(valkey_server: ValkeyProcess) -> AsyncIterator[Open]:
    """Makes stages on the session's server."""
    stores: list[RedisStore] = []
    with ThreadPoolExecutor(1) as executor:

        def make(**given: Any) -> Stage:
            stores.append(PausableStore(valkey_server.url))
            return Stage(valkey_server.url, fresh_run(), stores[-1], executor, np.random.default_rng(5), **given)

        yield make
        for store in stores:
            await store.close()


@pytest.fixture
def stage(open_stage: Open) -> Stage:
    return open_stage()


@pytest.mark.parametrize("number", [0, 1, 3, 4, 15, 16, 17, 32, 75])
@pytest.mark.parametrize(("signal", "gamma"), [(Signal.PREFERENCE, 1.0), (Signal.PREFERENCE, 0.9), (Signal.LOSS, 1.0)])
async def test_snapshot_and_tail_equal_the_fold_from_scratch(
    open_stage: Open, number: int, signal: Signal, gamma: float
) -> None:
    stage = open_stage(signal=signal, gamma=gamma)
    async with stage.replica() as run:
        for _ in range(number):
            await stage.append(1)
        lived = await stage.caught_up(run, number)
        await stage.snapshot_at(number - number % 16)
    async with stage.replica() as run:
        restarted = await stage.caught_up(run, number)
    assert stage.events() == stage.appended
    assert lived.count == restarted.count == number
    assert lived.digest() == restarted.digest() == stage.folded()


async def test_restarts_at_any_moment_change_nothing(stage: Stage) -> None:
    total = 0
    for number in (5, 11, 1, 30, 2, 16, 40):
        async with stage.replica(keep_events=KEEP_ALL) as run:
            await stage.append(number)
            total += number
            posterior = await stage.caught_up(run, total)
            assert posterior.digest() == stage.folded()


async def test_two_replicas_that_read_in_other_pieces_agree(stage: Stage, open_stage: Open) -> None:
    other = open_stage().store
    async with stage.replica() as one, stage.replica(store=other) as two:
        for number in (1, 1, 7, 33, 2, 1, 20):
            await stage.append(number)
            await asyncio.sleep(0.003)
        first, second = await stage.caught_up(one, 65), await stage.caught_up(two, 65)
    assert first.digest() == second.digest() == stage.folded()


@pytest.mark.parametrize(("keep", "at_most"), [(0, 16), (20, 52), (KEEP_ALL, 100)])
async def test_the_log_is_trimmed_behind_snapshots_and_a_restart_is_exact(
    stage: Stage, keep: int, at_most: int
) -> None:
    async with stage.replica(keep_events=keep) as run:
        for _ in range(10):
            await stage.append(10)
            await stage.caught_up(run, run.posterior.count)
        lived = await stage.caught_up(run, 100)
        await stage.snapshot_at(96)
        await until(lambda: stage.server().xlen(stage.key("log")) <= at_most, "trimmed")
    kept = stage.server().xlen(stage.key("log"))
    assert min(keep, 100) <= kept <= at_most
    assert (await stage.store.log_status(stage.run)).appended == 100
    async with stage.replica(keep_events=keep) as run:
        restarted = await stage.caught_up(run, 100)
        assert restarted.digest() == lived.digest() == stage.folded()
        await stage.append(30)
        assert (await stage.caught_up(run, 130)).digest() == stage.folded()


async def test_a_trimmed_log_without_its_snapshot_is_refused_and_nothing_is_saved(stage: Stage) -> None:
    async with stage.replica(keep_events=40) as run:
        await stage.append(100)
        await stage.caught_up(run, 100)
        await stage.snapshot_at(96)
    server = stage.server()
    assert server.xlen(stage.key("log")) >= 16, "enough events are left for a false snapshot"
    server.delete(stage.key("snap"))
    async with stage.replica(keep_events=40) as run:
        await until(lambda: run.failure, "refused")
        assert run.failure is not None
        assert "snapshot" in run.failure
        assert "100" in run.failure
        assert not run.ready.is_set()
        assert run.posterior.count == 0
    assert not server.exists(stage.key("snap"))


async def test_a_snapshot_without_its_log_is_refused(stage: Stage) -> None:
    async with stage.replica() as run:
        await stage.append(20)
        await stage.caught_up(run, 20)
        await stage.snapshot_at(16)
    stage.server().delete(stage.key("log"))
    async with stage.replica() as run:
        await until(lambda: run.failure, "refused")
        assert "lost events" in (run.failure or "")
        assert not run.ready.is_set()


@pytest.mark.parametrize("keep", [0, 10])
async def test_a_replica_that_missed_trimmed_events_starts_again_from_the_snapshot(
    stage: Stage, open_stage: Open, keep: int
) -> None:
    paused = open_stage().store
    assert isinstance(paused, PausableStore)
    async with stage.replica(keep_events=keep) as one, stage.replica(keep_events=keep, store=paused) as two:
        await stage.append(10)
        await stage.caught_up(one, 10)
        await stage.caught_up(two, 10)
        paused.readable.clear()
        for _ in range(9):
            await stage.append(10)
            await stage.caught_up(one, one.posterior.count)
        lived = await stage.caught_up(one, 100)
        assert stage.server().xlen(stage.key("log")) < 90, "events that the paused replica has not seen are gone"
        paused.readable.set()
        behind = await stage.caught_up(two, 100)
        assert behind.digest() == lived.digest() == stage.folded()
        await stage.append(25)
        first, second = await stage.caught_up(one, 125), await stage.caught_up(two, 125)
        assert first.digest() == second.digest() == stage.folded()
        await stage.snapshot_at(112)
    async with stage.replica(keep_events=keep) as run:
        assert (await stage.caught_up(run, 125)).digest() == stage.folded()


async def test_a_replica_that_missed_events_never_saves_a_snapshot_without_them(stage: Stage, open_stage: Open) -> None:
    paused = open_stage().store
    assert isinstance(paused, PausableStore)
    async with stage.replica(store=paused) as two:
        await stage.append(10)
        await stage.caught_up(two, 10)
        paused.readable.clear()
        async with stage.replica(keep_events=0) as one:
            await stage.append(90)
            await stage.caught_up(one, 100)
        await stage.append(150)
        paused.readable.set()
        assert (await stage.caught_up(two, 250)).digest() == stage.folded()
        await stage.snapshot_at(240)
    async with stage.replica() as run:
        assert (await stage.caught_up(run, 250)).digest() == stage.folded()


async def test_a_run_that_lost_an_event_fails_and_goes_on_once_the_store_holds_it_again(stage: Stage) -> None:
    async with stage.replica() as run:
        await stage.append(12)
        await stage.caught_up(run, 12)
        entries = stage.server().xrange(stage.key("log"))
        with stage.server().pipeline(transaction=True) as restored:
            restored.delete(stage.key("log"))
            for event_id, words in entries[:11]:
                restored.xadd(stage.key("log"), words, id=event_id)
            restored.execute()
        await until(lambda: run.failure, "the loss noticed")
        assert "restore the store from a backup" in (run.failure or "")
        event_id, words = entries[11]
        stage.server().xadd(stage.key("log"), words, id=event_id)
        await until(lambda: run.failure is None, "healed")
        assert (await stage.caught_up(run, 12)).digest() == stage.folded()


@pytest.mark.parametrize("folded", [5, 20])
async def test_a_run_that_lost_an_event_before_it_was_read_fails(stage: Stage, open_stage: Open, folded: int) -> None:
    paused = open_stage().store
    assert isinstance(paused, PausableStore)
    async with stage.replica(store=paused) as run:
        await stage.append(folded)
        await stage.caught_up(run, folded)
        await stage.snapshot_at(folded - folded % 16)
        paused.readable.clear()
        await stage.append(5)
        deleted = stage.server().xrange(stage.key("log"))[folded + 2][0]
        stage.server().xdel(stage.key("log"), deleted)
        paused.readable.set()
        await until(lambda: run.failure, "the loss noticed")
        assert "restore the store from a backup" in (run.failure or "")


async def test_a_replica_may_fall_behind_many_times_in_its_life(stage: Stage, open_stage: Open) -> None:
    paused = open_stage().store
    assert isinstance(paused, PausableStore)
    async with stage.replica(keep_events=0) as one, stage.replica(keep_events=0, store=paused) as two:
        for turn in range(1, follow.MAX_RELOADS + 3):
            paused.readable.clear()
            await stage.append(33)
            await stage.caught_up(one, 33 * turn)
            await until(lambda: stage.server().xlen(stage.key("log")) < 33, "trimmed")
            paused.readable.set()
            await stage.caught_up(two, 33 * turn)
        assert two.posterior.digest() == stage.folded()


async def test_a_young_run_that_the_store_lost_fails_and_takes_no_feedback(stage: Stage) -> None:
    async with stage.replica() as run:
        await stage.append(3)
        await stage.caught_up(run, 3)
        stage.server().delete(stage.key("log"), stage.key("meta"))
        await until(lambda: run.failure, "the loss noticed")
        assert (run.failure or "").startswith(f"the store has lost run {stage.run!r}: restore the store from a backup")
        with pytest.raises(NotReadyError, match="has lost run"):
            await stage.store.apply_feedback(
                stage.run, [FeedbackRecord(b"preference:1.0", decision_id="d")], identity=run.identity
            )


async def test_a_reader_that_the_server_unblocks_with_an_error_goes_on(own_valkey_server: ValkeyProcess) -> None:
    store = RedisStore(own_valkey_server.url, window_seconds=3600, timeout_seconds=5)
    with ThreadPoolExecutor(1) as executor:
        stage = Stage(own_valkey_server.url, fresh_run(), store, executor, np.random.default_rng(5))
        async with stage.replica() as run:
            await stage.append(2)
            await stage.caught_up(run, 2)

            def unblocked() -> bool:
                clients = stage.server().client_list()
                return any(
                    stage.server().execute_command("CLIENT", "UNBLOCK", client["id"], "ERROR")
                    for client in clients
                    if client["cmd"] == "xread"
                )

            await until(unblocked, "a blocked reader")
            await stage.append(2)
            assert (await stage.caught_up(run, 4)).digest() == stage.folded()
        await store.close()


async def test_a_snapshot_that_cannot_be_read_is_refused_by_name(stage: Stage) -> None:
    await stage.store.save_snapshot(stage.run, 16, b"not a snapshot")
    async with stage.replica() as run:
        await until(lambda: run.failure, "refused")
        assert (run.failure or "").startswith("SnapshotError")
        assert "delete it" in (run.failure or "")


async def test_an_event_of_another_shape_stops_the_learner_at_the_events_before_it(stage: Stage) -> None:
    async with stage.replica() as run:
        await stage.append(3)
        before = (await stage.caught_up(run, 3)).digest()
        stage.server().xadd(stage.key("log"), {"d": "d", "p": b"garbage", "s": b"preference:1.0"})
        await until(lambda: run.failure, "stopped")
        assert "cannot be read" in (run.failure or "")
        assert run.posterior.digest() == before


async def test_the_learner_waits_for_a_store_that_is_away(own_valkey_server: ValkeyProcess) -> None:
    store = RedisStore(own_valkey_server.url, window_seconds=3600, timeout_seconds=0.5)
    with ThreadPoolExecutor(1) as executor:
        stage = Stage(own_valkey_server.url, fresh_run(), store, executor, np.random.default_rng(5))
        await stage.append(20)
        template = stage.template()
        identity = await store.open_run(stage.run, template.fingerprint(template.terms()).encode())
        own_valkey_server.kill()
        async with stage.replica(identity=identity) as run:
            await asyncio.sleep(0.1)
            assert not run.ready.is_set()
            assert run.failure is None
            own_valkey_server.start()
            assert (await stage.caught_up(run, 20)).digest() == stage.folded()
            own_valkey_server.kill()
            own_valkey_server.start()

            async def appended() -> bool:
                try:
                    await store.ping()
                except Exception:  # noqa: BLE001 - whatever it says, it is not back
                    return False
                return True

            await until(appended, "the store is back")
            await stage.append(20)
            assert (await stage.caught_up(run, 40)).digest() == stage.folded()
        await store.close()


async def test_a_waiting_learner_counts_logs_and_pauses_longer_each_time(
    own_valkey_server: ValkeyProcess, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(follow, "RETRY_FIRST_SECONDS", 0.01)
    monkeypatch.setattr(follow, "RETRY_LAST_SECONDS", 0.05)
    telemetry = Telemetry()
    store = RedisStore(own_valkey_server.url, window_seconds=3600, timeout_seconds=0.5)

    def told() -> list[dict[str, Any]]:
        return [record.fields for record in caplog.records if "learner waits" in record.message]  # type: ignore[attr-defined]

    with ThreadPoolExecutor(1) as executor:
        stage = Stage(own_valkey_server.url, fresh_run(), store, executor, np.random.default_rng(5))
        async with stage.replica(telemetry=telemetry) as run:
            await stage.append(1)
            await stage.caught_up(run, 1)
            own_valkey_server.kill()
            await until(lambda: run.stalled, "readiness told")
            assert [one["seconds"] for one in told()[:4]] == [0.01, 0.02, 0.04, 0.05]
            counted = telemetry.registry.get_sample_value("reward_router_store_errors_total", {"operation": "read_log"})
            assert (counted or 0) >= follow.STALLED_AFTER
            assert run.failure is None, "what may heal ends no learner"
            own_valkey_server.start()
            await until(lambda: run.stalled is None, "readiness told of the end")
            caplog.clear()
            own_valkey_server.kill()
            await until(told, "the next failure")
            assert told()[0]["seconds"] == 0.01, "pauses begin short again"
            own_valkey_server.start()
            await stage.append(1)
            await stage.caught_up(run, 2)
        await store.close()

"""Watch: what a run does now, as a stream of snapshots for the console.

One snapshot is made for all who watch a run, every `INTERVAL_SECONDS` and only while somebody does; viewers are
bounded. A point for the charts is kept of the default run and of watched ones, so that a page that opens shows the
past. Decisions and points are those of all gateways of the run, who tell them to the store (`history`), and so are the
log, audits and the report; the workers' health is as this gateway sees it.

Called by `handlers.console`.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import math
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from concurrent.futures import Executor
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from router_core.feedback import SignalStatistics
from router_core.policies.bayesian import posterior_moments
from router_core.posterior import Posterior
from router_core.records import TIE, Signal
from service.errors import NotFoundError, OverCapacityError, ServiceError
from service.keys.access import Access
from service.schemas import AttemptReply
from service.stores.acts import is_archived
from service.stores.protocol import Store
from service.usecases.audit_choice import is_audited, is_audited_run
from service.usecases.history import Decided
from service.usecases.reply import told_attempts
from service.usecases.report import Reporter
from service.usecases.runs import Current, Run, RunRegistry
from service.usecases.status import StatusService

logger = logging.getLogger(__name__)

INTERVAL_SECONDS = 2.0
"""Pause between two snapshots of a run that is watched."""

POINT_SECONDS = 10.0
"""Time between two points of the charts. The first gateway that comes to it makes the point of all."""

POINTS = 360
"""Points that are kept of a run: an hour."""

REPORT_SECONDS = 15.0
"""Pause between two reports on audits, which take a second where there are thousands."""

NAMES_SECONDS = 15.0
"""Pause between two looks at which runs the store has."""

_ENCODER = msgspec.json.Encoder()
_PACKER = msgspec.msgpack.Encoder()


class Point(msgspec.Struct):
    """One run at one time; lists by arm, in the pool's order.

    Attributes:
        time_ms: Unix time in milliseconds.
        decisions: since the point before.
        price: mean price of these; None where there were none.
        asked: share of these that each arm was asked about; None where there were none.
        means: what each arm is expected to be worth on recent instances; None before the first one.
        sds: how unsure that is, the root mean square over these instances.
        lag: events of the log that the posterior has not learned from yet; None while the store is away.
    """

    time_ms: int
    decisions: int
    price: float | None
    asked: list[float] | None
    means: list[float] | None
    sds: list[float] | None
    lag: int | None


class Sample(msgspec.Struct):
    """What a point is made of, as it is stored: `Point`, with the run's totals at that time."""

    time_ms: int
    decisions: int
    price: float
    asked: list[int]
    means: list[float] | None
    sds: list[float] | None
    lag: int | None


_NOTHING = Sample(0, 0, 0.0, [], None, None, None)


class ArmState(msgspec.Struct):
    """What is known of one arm: `ArmLearned`, the means of `Point`, and how often it was asked."""

    model: str
    price: float
    retired: bool
    on_probation: bool
    asked: int
    feedbacks: int
    mean_reward: float | None
    alarms: int
    mean: float | None
    sd: float | None


class Budget(msgspec.Struct):
    """What keeps a policy to its budget, in units of the cheapest scorer."""

    policy: str
    budget: float
    multiplier: float


class DecisionState(msgspec.Struct):
    """One of the newest decisions; lists by arm, in the pool's order, null for arms that the policy never asks.

    Attributes:
        means: believed when it was made; `now_means` are the posterior's at this time.
        draws: None where an earlier draw of its prompt was followed.
        prompt: only where texts may be shown, as `responses`.
    """

    decision_id: str
    time_ms: int
    policy: str
    version: int
    model: str
    preferred: int | None
    rewards: list[float | None]
    p_right: float | None
    propensity: float
    means: list[float | None]
    sds: list[float]
    draws: list[float | None] | None
    propensities: list[float]
    now_means: list[float]
    now_sds: list[float]
    attempts: list[AttemptReply]
    audited: bool
    recorded: bool
    prompt: str | None = None
    responses: list[str] | None = None


class RunState(msgspec.Struct):
    """The event `state`."""

    run: str
    time_ms: int
    policy: str
    signal: str
    prior: str
    version: int
    ready: bool
    problem: str | None
    lag: int | None
    decisions: int
    price: float | None
    budgets: list[Budget]
    audits: bool
    audits_waiting: int | None
    texts: bool
    arms: list[ArmState]
    workers: list[dict[str, Any]]
    encoder: list[dict[str, Any]]
    store_problems: list[str]
    newest: list[DecisionState]
    point: Point | None


class _Channel:
    """One run that is watched, or whose past is kept."""

    def __init__(self) -> None:
        self.viewers = 0
        self.samples: deque[Sample] = deque(maxlen=POINTS)
        self.past_read = False
        self.slot = 0
        self.state = b""
        self.report = b""
        self.reported_version = -1
        self.reported_at = -math.inf
        self.changed = asyncio.Event()

    @property
    def points(self) -> list[Point]:
        """The points of the charts, oldest first; the first one is of all that was before it."""
        whole = self.samples if len(self.samples) == POINTS else [_NOTHING, *self.samples]
        return [_point(before, now) for before, now in itertools.pairwise(whole)]

    def publish(self) -> None:
        """Wake everybody who waits for something new."""
        changed, self.changed = self.changed, asyncio.Event()
        changed.set()


class Watcher:
    """The use case behind `/events`.

    Args:
        runs: the registry.
        status: workers, encoder and store.
        reporter: reports on audits.
        store: logs and audits.
        texts: True if the console may show texts beside decisions.
        viewers: how many may watch at once.
        executor: where beliefs are computed.
        interval_seconds: pause between two snapshots.
        point_seconds: time between two points.
    """

    def __init__(
        self,
        runs: RunRegistry,
        status: StatusService,
        reporter: Reporter,
        store: Store,
        *,
        texts: bool,
        viewers: int,
        executor: Executor,
        interval_seconds: float = INTERVAL_SECONDS,
        point_seconds: float = POINT_SECONDS,
    ) -> None:
        self._runs = runs
        self._status = status
        self._reporter = reporter
        self._store = store
        self._texts = texts
        self._viewers = viewers
        self._executor = executor
        self._interval = interval_seconds
        self._point_seconds = point_seconds
        self._channels: dict[str, _Channel] = {}
        self._asked_for = asyncio.Event()
        self._names: list[str] = []
        self._named_at = -math.inf

    def forget(self, run: str) -> None:
        """Forget the past of a run that was closed; those who watch it are told that it is not open."""
        channel = self._channels.get(run)
        if channel is not None:
            channel.samples.clear()
            channel.past_read = False
            channel.publish()

    async def frames(self, name: str | None, access: Callable[[], Access]) -> AsyncIterator[bytes]:
        """Yield server-sent events of a run without end: `history`, then `runs`, `report` and `state` as they change.

        Args:
            name: of the run; None: the default one.
            access: what the viewer may see now, asked before every event; raises where its key has ended.

        Raises:
            ServiceError: the key has ended, or may not see the run.
            NotFoundError: no such run is open here, or it was closed.
            OverCapacityError: enough people watch.
        """
        name = (await self._runs.loaded(name, access())).name
        with self._seat(name) as channel:
            await self._read_past(name, channel)
            yield _event("history", _ENCODER.encode(channel.points))
            state = report = runs = b""
            while True:
                changed = channel.changed
                seen = access()
                seen.check_run(name)
                self._check_open(name)
                # The only word of other runs, and so the only one that viewers do not share.
                names = sorted(seen.seen({*self._names, *self._runs.runs}))
                others = _event("runs", _ENCODER.encode(names))
                if others != runs:
                    runs = others
                    yield runs
                if channel.report and channel.report is not report:
                    report = channel.report
                    yield report
                if channel.state and channel.state is not state:
                    state = channel.state
                    yield state
                await changed.wait()

    def _check_open(self, name: str) -> None:
        if name not in self._runs.runs:
            raise NotFoundError(f"run {name!r} is not open here any more: watch it again", details={"run": name})

    @contextlib.contextmanager
    def _seat(self, name: str) -> Iterator[_Channel]:
        if sum(channel.viewers for channel in self._channels.values()) >= self._viewers:
            raise OverCapacityError(
                f"{self._viewers} console pages are open (console_viewers): close one, or raise the setting",
                retry_after_seconds=10,
            )
        channel = self._channels.setdefault(name, _Channel())
        channel.viewers += 1
        self._asked_for.set()
        try:
            yield channel
        finally:
            channel.viewers -= 1
            if not channel.viewers:
                channel.state = b""
            if not channel.viewers and name != self._runs.default:
                self._channels.pop(name, None)

    async def tell(self) -> None:
        """Tell the store what this gateway has decided since the last time. What it cannot take now is told later.

        Runs do not wait for each other: a store that is away costs one timeout, however many runs are open.
        """

        async def of_run(name: str, run: Run) -> None:
            with contextlib.suppress(ServiceError):
                await run.history.tell(self._store, name)

        await asyncio.gather(*(of_run(name, run) for name, run in self._runs.runs.items()))

    async def run_forever(self) -> None:
        """Tell, and make snapshots and points, until cancelled."""
        self._channels.setdefault(self._runs.default, _Channel())
        while True:
            self._asked_for.clear()
            await self.tell()
            watched = any(channel.viewers for channel in self._channels.values())
            if watched:
                await self._renew_names()
            for name, channel in list(self._channels.items()):
                run = self._runs.runs.get(name)
                due = self._slot() != channel.slot
                if run is not None and (due or channel.viewers):
                    try:
                        await self._renew(run, channel, due)
                    except ServiceError as error:
                        logger.warning("console", extra={"fields": {"run": name, "error": error.message}})
            if watched:
                await asyncio.sleep(self._interval)
            else:
                # A first viewer need not wait.
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self._asked_for.wait(), self._interval)

    async def _renew_names(self) -> None:
        """Read the names of the runs that are not archived, at most once in `NAMES_SECONDS`."""
        now = asyncio.get_running_loop().time()
        if now - self._named_at < NAMES_SECONDS:
            return
        self._named_at = now
        with contextlib.suppress(ServiceError):
            names = await self._store.list_runs()
            self._names = [name for name in names if not is_archived(await self._store.acts(name))]

    def _slot(self) -> int:
        """Number of the present point: all gateways count alike."""
        return int(time.time() / self._point_seconds)

    async def _read_past(self, name: str, channel: _Channel) -> None:
        """Read the points that were made before this gateway watched the run."""
        if channel.past_read:
            return
        slot = self._slot()
        try:
            kept = await self._store.points(name, range(slot - POINTS + 1, slot + 1))
        except ServiceError:
            return
        if not channel.past_read:
            channel.past_read = True
            channel.samples.extend(_samples(kept))

    async def _renew(self, run: Run, channel: _Channel, due: bool) -> None:
        appended, waiting = await self._log_of(run)
        newest = await run.history.read(self._store, run.name, newest=bool(channel.viewers))
        # Read once: the pool may change while beliefs are computed.
        current = run.current
        lag = None if appended is None else max(appended - current.posterior.count, 0)
        # An arm may have come to the pool that this gateway has not folded yet.
        newest = [one for one in newest if len(one.stored.offsets) <= len(current.template.pool)]
        beliefs = await asyncio.get_running_loop().run_in_executor(
            self._executor, _believed, current.posterior, [*run.recent], newest
        )
        if due:
            await self._read_past(run.name, channel)
            await self._take_sample(run, channel, _sample(run, len(current.template.pool), beliefs, lag))
        if channel.viewers:
            state = self._state(run, current, channel, newest, beliefs, lag, waiting)
            channel.state = _event("state", _ENCODER.encode(state))
            await self._renew_report(run, channel)
            channel.publish()

    async def _take_sample(self, run: Run, channel: _Channel, made: Sample) -> None:
        """Add the present point: the one that some gateway has made of it, else this one's."""
        channel.slot = self._slot()
        try:
            kept = await self._store.keep_point(
                run.name, channel.slot, _PACKER.encode(made), seconds=POINTS * self._point_seconds
            )
        except ServiceError:
            found = [made]
        else:
            found = _samples([kept]) or [made]
        if not channel.samples or found[0].time_ms > channel.samples[-1].time_ms:
            channel.samples.extend(found)

    async def _log_of(self, run: Run) -> tuple[int | None, int | None]:
        """Return how long the log is and how many audits wait; None for what cannot be had."""
        try:
            appended = (await self._store.log_status(run.name)).appended
            return appended, await self._store.audits_waiting(run.name) if is_audited_run(run) else None
        except ServiceError:
            return None, None

    async def _renew_report(self, run: Run, channel: _Channel) -> None:
        now = asyncio.get_running_loop().time()
        # Without new events the report is the same.
        if run.posterior.count == channel.reported_version or now - channel.reported_at < REPORT_SECONDS:
            return
        channel.reported_version, channel.reported_at = run.posterior.count, now
        try:
            found = await self._reporter.report(run.name)
        except ServiceError:
            return
        channel.report = _event("report", found.model_dump_json().encode())

    def _state(
        self,
        run: Run,
        current: Current,
        channel: _Channel,
        newest: list[Decided],
        beliefs: _Beliefs,
        lag: int | None,
        waiting: int | None,
    ) -> RunState:
        (posterior, template), totals = current, run.history.totals
        statistics, waiting_arms = posterior.statistics, posterior.on_probation
        rewards = mean_rewards(statistics, run.signal)
        arms = [
            ArmState(
                model=model,
                price=template.prices[k],
                retired=template.retired[k],
                on_probation=waiting_arms is not None and bool(waiting_arms[k]),
                asked=totals.asked.get(k, 0),
                feedbacks=int(statistics.count[k]),
                mean_reward=rewards[k],
                alarms=int(posterior.watches[k].alarms),
                mean=None if beliefs.means is None else beliefs.means[k],
                sd=None if beliefs.sds is None else beliefs.sds[k],
            )
            for k, model in enumerate(template.pool)
        ]
        audits = template.audits
        workers = [
            *(template.arms[k].status() for k in template.asked),
            *(one.status().model_copy(update={"referee": True}) for one in (audits.apart if audits else ())),
        ]
        return RunState(
            run=run.name,
            time_ms=int(time.time() * 1000),
            policy=template.default_policy.name,
            signal=run.signal.value,
            prior=run.prior.form.value,
            version=posterior.count,
            ready=run.ready.is_set(),
            problem=run.failure or run.stalled,
            lag=lag,
            decisions=totals.decisions,
            price=totals.price / totals.decisions if totals.decisions else None,
            budgets=[Budget(name, pacer.budget, pacer.multiplier) for name, pacer in run.budgets.items()],
            audits=is_audited_run(run),
            audits_waiting=waiting,
            texts=self._texts,
            arms=arms,
            workers=[one.model_dump(mode="json") for one in workers],
            encoder=[{"url": one.url, "up": one.up, "problem": one.problem} for one in self._status.encoder_servers()],
            store_problems=[*self._status.store_findings()],
            newest=[
                _decision(decided, template.pool, beliefs.now_means[i], beliefs.now_sds[i], texts=self._texts)
                for i, decided in enumerate(newest)
            ][::-1],
            point=_newest_point(channel.samples),
        )


class _Beliefs(msgspec.Struct):
    """What the posterior says: on the mean over recent instances, by arm, and per newest decision and arm."""

    means: list[float] | None
    sds: list[float] | None
    now_means: list[list[float]]
    now_sds: list[list[float]]


def _believed(posterior: Posterior, recent: list[NDArray[np.float32]], newest: list[Decided]) -> _Beliefs:
    """Return what a posterior says of recent instances and the newest decisions; one pass over all these contexts."""
    contexts = [*recent, *[np.frombuffer(one.stored.x, "<f4") for one in newest]]
    if not contexts:
        return _Beliefs(None, None, [], [])
    x = np.stack(contexts)
    means, sds = posterior_moments(x, posterior.prior.offsets(x), posterior)
    n = len(recent)
    return _Beliefs(
        means[:n].mean(axis=0).tolist() if n else None,
        np.sqrt(np.square(sds[:n]).mean(axis=0)).tolist() if n else None,
        means[n:].tolist(),
        sds[n:].tolist(),
    )


def _sample(run: Run, arms: int, beliefs: _Beliefs, lag: int | None) -> Sample:
    """Return what the run's point is made of now."""
    totals = run.history.totals
    return Sample(
        time_ms=int(time.time() * 1000),
        decisions=totals.decisions,
        price=totals.price,
        asked=[totals.asked.get(k, 0) for k in range(arms)],
        means=beliefs.means,
        sds=beliefs.sds,
        lag=lag,
    )


def _samples(kept: Sequence[bytes]) -> list[Sample]:
    """Read samples that some gateway has made; those of another version of it are left out."""
    found = []
    for one in kept:
        with contextlib.suppress(msgspec.DecodeError):
            found.append(_UNPACKER.decode(one))
    return found


def _newest_point(samples: Sequence[Sample]) -> Point | None:
    return _point(samples[-2] if len(samples) > 1 else _NOTHING, samples[-1]) if samples else None


def _point(before: Sample, now: Sample) -> Point:
    """Return the point between two samples."""
    count = max(now.decisions - before.decisions, 0)
    # An arm that came to the pool was asked about nothing before.
    then = [*before.asked, *[0] * max(len(now.asked) - len(before.asked), 0)]
    return Point(
        time_ms=now.time_ms,
        decisions=count,
        price=(now.price - before.price) / count if count else None,
        asked=[(one - other) / count for one, other in zip(now.asked, then, strict=False)] if count else None,
        means=now.means,
        sds=now.sds,
        lag=now.lag,
    )


def _decision(
    decided: Decided, pool: tuple[str, ...], now_means: list[float], now_sds: list[float], *, texts: bool
) -> DecisionState:
    # Another gateway may tell texts that this one may not show.
    stored, shown = decided.stored, decided.texts if texts else None
    return DecisionState(
        decision_id=decided.decision_id,
        time_ms=stored.time_ms,
        policy=stored.policy,
        version=stored.version,
        model=stored.policy if stored.arm is None else pool[stored.arm],
        preferred=None if stored.verdict == TIE else stored.verdict,
        rewards=[_number(reward) for reward in stored.rewards],
        p_right=stored.p_right,
        propensity=stored.propensity,
        means=[_number(mean) for mean in stored.means],
        sds=stored.sds,
        draws=None if decided.draws is None else [_number(draw) for draw in decided.draws],
        propensities=stored.propensities,
        now_means=now_means,
        now_sds=now_sds,
        attempts=told_attempts(stored.attempts, pool),
        audited=is_audited(decided.decision_id, stored),
        recorded=decided.recorded,
        prompt=None if shown is None else shown.prompt,
        responses=None if shown is None else shown.responses,
    )


def mean_rewards(statistics: SignalStatistics, signal: Signal) -> list[float | None]:
    """Return what is shown of each arm's mean reward (K,); None for an arm without any."""
    means = statistics.mean_reward()
    # A referee that errs has its errors taken out of preferences, which may lead beyond either end.
    return [_number(float(mean)) for mean in (np.clip(means, 0.0, 1.0) if signal is Signal.PREFERENCE else means)]


def _number(value: float) -> float | None:
    """Return None for NaN and infinities, which JSON does not have."""
    return value if np.isfinite(value) else None


def _event(kind: str, data: bytes) -> bytes:
    return b"event: " + kind.encode() + b"\ndata: " + data + b"\n\n"


_UNPACKER = msgspec.msgpack.Decoder(Sample)

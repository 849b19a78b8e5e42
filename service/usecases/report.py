"""Report: what the audits of a run say of who is right, read from its log.

Each gateway reads the log for itself, on from where it was: rows stay in memory, texts are not needed. Called by
`handlers.audits` and, for the metrics, by `status`. The numbers come from `router_core.audits.summary`.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, Field

from router_core.attempts import ASKED
from router_core.audits import summary
from router_core.audits.referee import Standing
from router_core.audits.signs import SIGNS
from router_core.audits.summary import Audited
from router_core.records import TIE, Source, credit
from service.keys.access import EVERYTHING, Access
from service.stores.acts import is_act
from service.stores.ids import event_order
from service.stores.protocol import LogEntry, Store
from service.telemetry import Telemetry
from service.usecases.decisions import StoredDecision, decode_decision, told_by
from service.usecases.runs import Run, RunRegistry

MAX_ROWS = 5_000
"""Newest audits of a run that a report is made of: it takes about a second, and 20 MB at d = 576."""

FRESH_SECONDS = 30.0
"""How old the report may be that the metrics are made of, where there are new events."""

READ_COUNT = 4096
"""Events of the log per read."""

ALL = "all"
"""In the place of a kind of text: every text."""

LENGTH = "words"
"""The sign of a response's length."""


class Estimate(BaseModel):
    """A mean with bounds that hold however often one looks (95 %)."""

    value: float
    low: float
    high: float
    audits: int = Field(description="Audits that it comes from.")


class Following(BaseModel):
    """What a scorer's rewards have to do with a sign of the responses, inside each decision."""

    partial: Estimate | None = Field(description="Partial correlation of reward and sign, given the referee's reward.")
    more: Estimate | None = Field(description="Its correlation with the sign, less the referee's.")


class Liked(BaseModel):
    """Whether a scorer is right about what it likes best, before and after the middle of the time."""

    reward_change: float = Field(description="Change of its best rewards, in their standard deviations.")
    before: float
    after: float
    gamed: bool = Field(description="Its rewards have risen, and it is less often right about what it likes best.")


class Course(BaseModel):
    """One scorer on one kind of text in equal parts of the audits, oldest first; null in a part without any."""

    asked: list[float | None]
    accuracy: list[float | None]


class ScorerRecord(BaseModel):
    """How often one scorer is asked, and how often it is right."""

    model: str
    asked: float | None = Field(
        description="Share of all decisions before whose reply it was asked, estimated; null without audits, and of "
        "the router."
    )
    asked_by_kind: dict[str, float] = Field(description="The same by kind of text.")
    accuracy: Estimate | None = Field(description="Against the referee; null without audits.")
    against_gold: Estimate | None
    over_time: list[float | None] = Field(description="Accuracy in equal parts of the audits, oldest first.")
    fall: float = Field(description="Evidence that its accuracy has fallen: 1 is an alarm.")
    kinds: dict[str, Estimate] = Field(description="By kind of text.")
    course: dict[str, Course] = Field(description="By kind of text, and `all`.")
    follows: dict[str, Following] = Field(description="By sign: words, list items, refusal, repetition.")
    liked: Liked | None = Field(description="Null with fewer than 40 audits.")


class RefereeRecord(BaseModel):
    """How a referee fares against gold."""

    referee: str
    audits: int
    ties: int = Field(description="Of its verdicts.")
    trust: float = Field(description="How often it was expected to be right.")
    judged: int = Field(description="Audits for which there is gold.")
    accuracy: Estimate | None = Field(description="Against gold; null without.")
    scorers: float | None = Field(description="Mean accuracy of the scorers on the same decisions.")
    teaches: bool = Field(
        description="False where gold says that it is no better than the scorers: it teaches nothing."
    )


class KindRecord(BaseModel):
    """One kind of text."""

    kind: str = Field(description="Typical words of its prompts.")
    audits: int
    share: float = Field(description="Of all decisions, estimated.")


class RunReport(BaseModel):
    """What the audits of a run say."""

    run: str
    audits: int = Field(description="That the report is made of, the newest ones.")
    first_ms: int | None = Field(description="When the oldest of them was decided, Unix time in milliseconds.")
    last_ms: int | None
    parts_ms: list[int] = Field(description="Middle of each of the equal parts, Unix time in milliseconds.")
    waiting: int = Field(description="Decisions that are chosen and not refereed.")
    router: ScorerRecord = Field(description="Of what callers got.")
    scorers: list[ScorerRecord]
    referees: list[RefereeRecord]
    kinds: list[KindRecord]


@dataclass(slots=True)
class _Rows:
    """What was read of one run's log."""

    born: str
    position: str = "0-0"
    by_decision: dict[str, Audited] = field(default_factory=dict)
    told_position: str = ""
    told_at: float = -math.inf
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)


class Reporter:
    """The use case behind `/report`.

    Args:
        runs: where runs are opened.
        store: its logs.
        telemetry: gauges.
    """

    def __init__(self, runs: RunRegistry, store: Store, telemetry: Telemetry) -> None:
        self._runs = runs
        self._store = store
        self._telemetry = telemetry
        self._rows: dict[str, _Rows] = {}

    def forget(self, run: str) -> None:
        """Forget a run that was closed."""
        self._rows.pop(run, None)

    async def report(self, name: str | None, access: Access = EVERYTHING) -> RunReport:
        """Return what the run's audits say now.

        Raises:
            NotFoundError: there is no such run.
            StoreUnavailableError: the log cannot be read.
        """
        run = await self._runs.loaded(name, access)
        name = run.name
        rows = await self._read(run)
        waiting = await self._store.audits_waiting(name)
        audited = [_of_arms(row, len(run.template.pool)) for row in rows.by_decision.values()]
        found = await asyncio.to_thread(report_of, name, run.template.pool, audited, run.posterior.referees)
        found.waiting = waiting
        return found

    async def tell(self, run: Run) -> None:
        """Set the gauges of a run from its report; those of a run without audits stay away.

        Raises:
            StoreUnavailableError: the log cannot be read.
        """
        rows, now = await self._read(run), asyncio.get_running_loop().time()
        if rows.told_position == rows.position or now - rows.told_at < FRESH_SECONDS:
            return
        rows.told_position, rows.told_at = rows.position, now
        found, telemetry = await self.report(run.name), self._telemetry
        telemetry.audits_waiting.labels(run.name).set(found.waiting)
        for record in found.scorers:
            if record.accuracy is None:
                continue
            telemetry.audited_accuracy.labels(run.name, record.model).set(record.accuracy.value)
            telemetry.accuracy_fall.labels(run.name, record.model).set(record.fall)
            length = record.follows[LENGTH].more
            if length is not None:
                telemetry.length_excess.labels(run.name, record.model).set(length.low)
        for referee in found.referees:
            if referee.accuracy is not None:
                telemetry.referee_accuracy.labels(run.name, referee.referee).set(referee.accuracy.value)
                telemetry.referee_shortfall.labels(run.name, referee.referee).set(referee.trust - referee.accuracy.high)

    async def _read(self, run: Run) -> _Rows:
        """Read the log on from where it was."""
        rows = self._rows.get(run.name)
        if rows is None or rows.born != run.identity.born:
            rows = self._rows[run.name] = _Rows(run.identity.born)
        async with rows.lock:
            while True:
                found = await self._store.read_log(run.name, rows.position, count=READ_COUNT, block_ms=0)
                # No farther than the learner, which knows the pool there.
                end, pool = event_order(run.last_event_id), len(run.template.pool)
                entries = [entry for entry in found if event_order(entry.event_id) <= end]
                if not entries:
                    return rows
                await asyncio.to_thread(_take, rows.by_decision, entries, pool)
                rows.position = entries[-1].event_id


def _take(rows: dict[str, Audited], entries: Sequence[LogEntry], n_arms: int) -> None:
    """Add what entries of the log say to the rows by decision; the oldest beyond `MAX_ROWS` go."""
    for entry in entries:
        if is_act(entry):
            continue
        decision = decode_decision(entry.payload)
        if decision.audit is None:
            continue
        told = told_by(decision, entry.value)
        row = rows.get(entry.decision_id) or row_of(decision, max(n_arms, len(decision.offsets)))
        gold = int(told.feedback.value)
        if (told.source is not Source.AUDIT or told.after_gold) and gold != TIE and row.gold is None:
            row = replace(row, gold=gold, gold_credits=_credits(decision, gold, len(row.credits)))
        rows[entry.decision_id] = row
    for name in list(rows)[: max(len(rows) - MAX_ROWS, 0)]:
        del rows[name]


def _of_arms(row: Audited, n_arms: int) -> Audited:
    """The row with arms that came to the pool after it: they said nothing."""
    missing = n_arms - len(row.credits)
    if missing <= 0:
        return row
    gold = row.gold_credits
    return replace(
        row,
        rewards=np.pad(row.rewards, ((0, missing), (0, 0)), constant_values=np.nan),
        credits=np.pad(row.credits, (0, missing), constant_values=np.nan),
        gold_credits=None if gold is None else np.pad(gold, (0, n_arms - len(gold)), constant_values=np.nan),
    )


def row_of(decision: StoredDecision, n_arms: int) -> Audited:
    """Return what the statistics take of an audited decision."""
    audit = decision.audit
    assert audit is not None
    rewards = np.full((n_arms, decision.n), np.nan)
    for answer in decision.heard:
        rewards[answer.arm] = answer.rewards
    served = None if audit.verdict == TIE else credit(decision.rewards, audit.verdict)
    return Audited(
        time_ms=decision.time_ms,
        probability=1.0 if decision.inclusion is None else decision.inclusion,
        x=np.frombuffer(decision.x, "<f4"),
        rewards=rewards,
        credits=_credits(decision, audit.verdict, n_arms),
        referee=audit.referee,
        verdict=audit.verdict,
        referee_rewards=np.array(audit.rewards, dtype=np.float64),
        signs=np.array([audit.signs[name] for name in SIGNS]).T,
        words=audit.words,
        served=math.nan if served is None else served,
        trust=audit.trust,
        asked=tuple(attempt.arm for attempt in decision.attempts if attempt.outcome in ASKED),
    )


def _credits(decision: StoredDecision, preferred: int, n_arms: int) -> NDArray[np.float64]:
    out = np.full(n_arms, np.nan)
    if preferred != TIE:
        for answer in decision.heard:
            earned = credit(answer.rewards, preferred)
            out[answer.arm] = math.nan if earned is None else earned
    return out


def report_of(
    run: str, pool: Sequence[str], rows: Sequence[Audited], standings: Mapping[str, Standing] | None = None
) -> RunReport:
    """Return the report on audits.

    Args:
        run: whose.
        pool: names of its scorers.
        rows: audited decisions.
        standings: what the posterior knows of each referee.
    """
    rows = sorted(rows, key=lambda row: row.time_ms)
    weights = np.array([1.0 / row.probability for row in rows])
    earned = np.array([row.credits for row in rows]).reshape(len(rows), len(pool))
    golds = np.array([row.gold_credits if row.gold_credits is not None else row.credits * np.nan for row in rows])
    golds = golds.reshape(len(rows), len(pool))
    contexts = np.array([row.x for row in rows], dtype=np.float64)
    kind, names = summary.kinds_of(contexts, [row.words for row in rows]) if rows else (np.zeros(0, np.int64), [])
    served = np.array([row.served for row in rows])
    asked = np.array([[float(k in row.asked) for k in range(len(pool))] for row in rows]).reshape(len(rows), len(pool))
    router = _record("router", served, served * np.nan, None, weights, kind, names)
    scorers = []
    for k, model in enumerate(pool):
        record = _record(model, earned[:, k], golds[:, k], asked[:, k], weights, kind, names)
        own = [row.rewards[k] for row in rows]
        record.follows = {
            sign: Following(partial=_estimate(partial), more=_estimate(more))
            for s, sign in enumerate(SIGNS)
            for partial, more in [
                summary.following(own, [row.referee_rewards for row in rows], [row.signs[:, s] for row in rows])
            ]
        }
        record.liked = _liked(own, earned[:, k])
        scorers.append(record)
    total = weights.sum()
    return RunReport(
        run=run,
        audits=len(rows),
        first_ms=rows[0].time_ms if rows else None,
        last_ms=rows[-1].time_ms if rows else None,
        parts_ms=[int(np.mean([row.time_ms for row in rows[part]])) for part in summary.periods_of(len(rows)) if rows],
        waiting=0,
        router=router,
        scorers=scorers,
        referees=_referees(rows, standings or {}),
        kinds=[
            KindRecord(kind=name, audits=int((kind == j).sum()), share=float(weights[kind == j].sum() / total))
            for j, name in enumerate(names)
        ],
    )


def _record(
    model: str,
    earned: NDArray[np.float64],
    golds: NDArray[np.float64],
    asked: NDArray[np.float64] | None,
    weights: NDArray[np.float64],
    kind: NDArray[np.int64],
    names: Sequence[str],
) -> ScorerRecord:
    kinds = {
        name: _estimate(summary.mean_interval(earned[kind == j], weights[kind == j])) for j, name in enumerate(names)
    }
    parts = summary.periods_of(len(earned)) if len(earned) else []
    told = np.full(len(earned), np.nan) if asked is None else asked
    groups = {ALL: np.ones(len(earned), dtype=np.bool_), **{name: kind == j for j, name in enumerate(names)}}
    return ScorerRecord(
        model=model,
        asked=_share(told, weights),
        asked_by_kind={
            name: share
            for j, name in enumerate(names)
            if (share := _share(told[kind == j], weights[kind == j])) is not None
        },
        accuracy=_estimate(summary.mean_interval(earned, weights)),
        against_gold=_estimate(summary.mean_interval(golds, weights)),
        over_time=[_mean(earned[part]) for part in parts],
        fall=summary.fall_evidence(earned),
        kinds={name: estimate for name, estimate in kinds.items() if estimate is not None},
        course={
            name: Course(
                asked=[_share(told[part][group[part]], weights[part][group[part]]) for part in parts],
                accuracy=[_mean(earned[part][group[part]]) for part in parts],
            )
            for name, group in groups.items()
        },
        follows={},
        liked=None,
    )


def _mean(values: NDArray[np.float64]) -> float | None:
    there = values[~np.isnan(values)]
    return float(there.mean()) if len(there) else None


def _share(asked: NDArray[np.float64], weights: NDArray[np.float64]) -> float | None:
    """Return the weighted mean; None for nothing, and for NaN."""
    if not len(asked) or np.isnan(asked).any():
        return None
    return float((asked * weights).sum() / weights.sum())


def _referees(rows: Sequence[Audited], standings: Mapping[str, Standing]) -> list[RefereeRecord]:
    out = []
    for name in sorted({row.referee for row in rows}):
        mine = [row for row in rows if row.referee == name]
        judged = [row for row in mine if row.gold is not None]
        right = np.array([0.5 if row.verdict == TIE else float(row.verdict == row.gold) for row in judged])
        weights = np.array([1.0 / row.probability for row in judged])
        scorers = np.array([row.gold_credits for row in judged if row.gold_credits is not None])
        out.append(
            RefereeRecord(
                referee=name,
                audits=len(mine),
                ties=sum(row.verdict == TIE for row in mine),
                trust=mine[-1].trust,
                judged=len(judged),
                accuracy=_estimate(summary.mean_interval(right, weights)),
                scorers=None if np.isnan(scorers).all() else float(np.nanmean(scorers)),
                teaches=standings.get(name, Standing()).teaches(),
            )
        )
    return out


def _liked(rewards: Sequence[NDArray[np.float64]], earned: NDArray[np.float64]) -> Liked | None:
    found = summary.liked(rewards, earned)
    if found is None:
        return None
    change, before, after = found
    return Liked(reward_change=change, before=before, after=after, gamed=change > 0.5 and before - after > 0.1)


def _estimate(interval: summary.Interval | None) -> Estimate | None:
    if interval is None:
        return None
    return Estimate(value=interval.value, low=interval.low, high=interval.high, audits=interval.count)

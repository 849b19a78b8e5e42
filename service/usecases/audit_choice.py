"""Choose for audits: with which probability each decision is audited, when it is made.

Single responses are chosen by group: when a prompt's draw is made that its singles share, the group gets an id and a
probability, which travel with the draw, and its members are collected in the store (`audit_groups`).

The number of decisions stands in the store, so that gateways that share a run are on one schedule; each learns it with
its next save. The schedule begins anew when an arm has changed or texts are new. Called by `score`; asks no scorer.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple, Protocol

import msgspec
import numpy as np
from numpy.typing import NDArray

from router_core.audits.schedule import Progress, is_chosen
from router_core.posterior import Posterior
from router_core.records import Instance, Signal
from service.errors import StoreUnavailableError
from service.stores.protocol import AuditTask, DecisionRecord, Store
from service.usecases.audit_groups import GRACE_SECONDS, MAX_PARTS, Part
from service.usecases.decisions import StoredDecision
from service.usecases.runs import Run

TASK_SECONDS = 7 * 86_400.0
"""How long a chosen decision and its texts wait for a referee; then they are dropped."""

_ENCODER = msgspec.msgpack.Encoder()
_DECODER = msgspec.msgpack.Decoder(tuple[StoredDecision, Instance])
_LENGTH = struct.Struct(">I")


def encode_task(decision: StoredDecision, instance: Instance) -> bytes:
    """Return the bytes that wait for a referee; those of several parts may be joined."""
    part = _ENCODER.encode((decision, instance))
    return _LENGTH.pack(len(part)) + part


def decode_task(task: bytes) -> list[Part]:
    """Read `encode_task`'s bytes back, part by part.

    Raises:
        msgspec.ValidationError: they are not.
    """
    parts, at = [], 0
    while at < len(task):
        try:
            (length,) = _LENGTH.unpack_from(task, at)
        except struct.error as error:
            raise msgspec.ValidationError(f"a task ends after {len(task)} bytes") from error
        at += _LENGTH.size + length
        parts.append(_DECODER.decode(task[at - length : at]))
    return parts


@dataclass(slots=True)
class _Standing:
    """Where one run stands on its schedule, as this gateway knows it."""

    count: int
    start: int
    progress: Progress
    posterior: Posterior | None = None
    alarms: float = 0.0
    restarted_at: int | None = None
    groups: int = 0
    """Groups of singles that the store has not counted yet."""


class Decided(Protocol):
    """One decision before it is saved."""

    @property
    def run(self) -> Run:
        """Whose."""

    @property
    def decision_id(self) -> str:
        """Its name."""

    @property
    def stored(self) -> StoredDecision:
        """What is stored; its inclusion probability is set here."""

    @property
    def instance(self) -> Instance:
        """Its texts."""


class ChosenAudits(NamedTuple):
    """What was chosen of one run's decisions: their tasks, and how many decisions and groups the schedule counts."""

    tasks: list[AuditTask]
    decisions: int
    groups: int


class AuditChooser:
    """Gives decisions their inclusion probability.

    Args:
        store: where the runs' progress stands.
        sticky_seconds: how long singles of a prompt share a draw.
    """

    def __init__(self, store: Store, *, sticky_seconds: float) -> None:
        self._store = store
        self._collect_seconds = sticky_seconds + GRACE_SECONDS
        self._standings: dict[str, _Standing] = {}

    async def choose(self, decided: Sequence[Decided]) -> dict[str, ChosenAudits]:
        """Set the inclusion probability of every decision between several responses; return the chosen ones, by run.

        Runs that `is_audited_run` excludes are left out. Chosen singles are among them, each as a part of its group's
        audit; `offer` has set their probability.

        A decision of a run whose progress cannot be had, because the store is away, is left as it is.
        """
        by_run: dict[str, list[Decided]] = {}
        for one in decided:
            if (one.stored.n > 1 or one.stored.group) and is_audited_run(one.run):
                by_run.setdefault(one.run.name, []).append(one)
        out = {}
        for name, group in by_run.items():
            try:
                standing = self._standings.get(name) or await self._open(group[0].run)
            except StoreUnavailableError:
                continue
            several = [one for one in group if not one.stored.group]
            probabilities = self._probabilities(standing, group[0].run, [one.stored.x for one in several])
            for one, probability in zip(several, probabilities, strict=True):
                one.stored.inclusion = probability
            tasks = [self._task(one) for one in group if is_audited(one.decision_id, one.stored)]
            out[name] = ChosenAudits(tasks, len(several), standing.groups)
            standing.groups = 0
        return out

    def _task(self, one: Decided) -> AuditTask:
        task = encode_task(one.stored, one.instance)
        if one.stored.group:
            return AuditTask(one.stored.group, task, self._collect_seconds, MAX_PARTS)
        return AuditTask(one.decision_id, task)

    async def offer(self, run: Run, contexts: Sequence[NDArray[np.float32]]) -> list[float] | None:
        """Return the inclusion probabilities of the groups that these singles would begin; `met` counts those that do.

        None where the store is away.

        Args:
            run: of all.
            contexts: of each single, (d,).
        """
        try:
            standing = self._standings.get(run.name) or await self._open(run)
        except StoreUnavailableError:
            return None
        return self._advance(standing, run, contexts)[1]

    def met(self, run: Run, contexts: Sequence[NDArray[np.float32]]) -> None:
        """Count groups of singles that have begun.

        Args:
            run: of all.
            contexts: of the single that began each.
        """
        standing = self._standings.get(run.name)
        if standing is not None and contexts:
            self._probabilities(standing, run, [x.tobytes() for x in contexts])
            standing.groups += len(contexts)

    async def _open(self, run: Run) -> _Standing:
        """Learn how far the run has come."""
        progress = await self._store.audit_progress(run.name)
        alarms = _alarms(run.posterior)
        road = Progress(progress.count - progress.start, alarms=alarms)
        fresh = _Standing(progress.count, progress.start, road, run.posterior, alarms)
        return self._standings.setdefault(run.name, fresh)

    def _advance(
        self, standing: _Standing, run: Run, contexts: Sequence[NDArray[np.float32]]
    ) -> tuple[Progress, list[float]]:
        """Return the progress after a run's next decisions, and the probability of each."""
        if standing.posterior is not run.posterior:
            standing.posterior, standing.alarms = run.posterior, _alarms(run.posterior)
        landmarks = run.prior.landmarks if run.prior.watches_novelty else None
        audits = run.template.audits
        if audits is None:
            return standing.progress, [0.0] * len(contexts)
        novel = [None if landmarks is None else landmarks.is_novel(x) for x in contexts]
        return audits.schedule.advance(standing.progress, novel, standing.alarms)

    def _probabilities(self, standing: _Standing, run: Run, contexts: Sequence[bytes]) -> list[float]:
        """Count a run's next decisions; return the probability of each."""
        before = standing.progress.restarts
        standing.progress, found = self._advance(standing, run, [np.frombuffer(x, "<f4") for x in contexts])
        standing.count += len(contexts)
        if standing.progress.restarts > before:
            standing.start = standing.restarted_at = standing.count - standing.progress.t
        return found

    async def save(self, run: str, records: Sequence[DecisionRecord], chosen: ChosenAudits) -> None:
        """Save decisions with the tasks of those that were chosen.

        Args:
            run: whose.
            records: the decisions.
            chosen: what `choose` said of them.

        Raises:
            StoreUnavailableError: the store does not answer.
        """
        standing, counted = self._standings.get(run), chosen.decisions + chosen.groups
        try:
            progress = await self._store.save_audited(run, records, chosen.tasks, counted=counted, seconds=TASK_SECONDS)
        except StoreUnavailableError:
            if standing is not None:
                # Their draws stand, and members will come; the decisions are not there.
                standing.groups += chosen.groups
                standing.count -= chosen.decisions
                standing.progress = replace(standing.progress, t=standing.count - standing.start)
            raise
        if standing is None:
            return
        if standing.restarted_at is not None:
            start, standing.restarted_at = standing.restarted_at, None
            await self._store.restart_audits(run, start)
        # What other gateways have counted.
        standing.count = max(standing.count, progress.count)
        standing.start = max(standing.start, progress.start)
        standing.progress = replace(standing.progress, t=standing.count - standing.start)

    def forget(self, run: str) -> None:
        """Forget a run that was closed."""
        self._standings.pop(run, None)


def is_audited_run(run: Run) -> bool:
    """Return True if decisions of a run are audited now: its pool says how, and its signal is not losses.

    Losses compare RMs with each other, referees say how often each is right.
    """
    return run.template.audits is not None and run.signal is not Signal.LOSS


def is_audited(decision_id: str, decision: StoredDecision) -> bool:
    """Return True if the decision was chosen for an audit, alone or in its group."""
    return decision.inclusion is not None and is_chosen(decision.group or decision_id, decision.inclusion)


def _alarms(posterior: Posterior) -> float:
    return float(sum([watch.alarms for watch in posterior.watches]))

"""Choose for audits: with which probability each decision is audited, when it is made.

The number of decisions stands in the store, so that gateways that share a run are on one schedule; each learns it with
its next save. The schedule begins anew when an arm has changed or texts are new. Called by `score`; asks no scorer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import msgspec
import numpy as np

from router_core.audits.schedule import Progress, Schedule, is_chosen
from router_core.posterior import Posterior
from router_core.records import Instance, Signal
from service.errors import StoreUnavailableError
from service.stores.protocol import AuditTask, DecisionRecord, Store
from service.usecases.decisions import StoredDecision
from service.usecases.runs import Run

TASK_SECONDS = 7 * 86_400.0
"""How long a chosen decision and its texts wait for a referee; then they are dropped."""

_ENCODER = msgspec.msgpack.Encoder()
_DECODER = msgspec.msgpack.Decoder(tuple[StoredDecision, Instance])


def encode_task(decision: StoredDecision, instance: Instance) -> bytes:
    """Return the bytes that wait for a referee."""
    return _ENCODER.encode((decision, instance))


def decode_task(task: bytes) -> tuple[StoredDecision, Instance]:
    """Read `encode_task`'s bytes back.

    Raises:
        msgspec.ValidationError: they are not.
    """
    return _DECODER.decode(task)


@dataclass(slots=True)
class _Standing:
    """Where one run stands on its schedule, as this gateway knows it."""

    count: int
    start: int
    changes: Progress
    posterior: Posterior | None = None
    alarms: float = 0.0
    restarted_at: int | None = None


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
    """What was chosen of one run's decisions: their tasks, and how many decisions the schedule counts."""

    tasks: list[AuditTask]
    counted: int


class AuditChooser:
    """Gives decisions their inclusion probability.

    Args:
        store: where the run's progress stands.
        schedule: probability by number of the decision.
    """

    def __init__(self, store: Store, schedule: Schedule) -> None:
        self._store = store
        self._schedule = schedule
        self._standings: dict[str, _Standing] = {}

    async def choose(self, decided: Sequence[Decided]) -> dict[str, ChosenAudits]:
        """Set the inclusion probability of every decision between several responses; return the chosen ones, by run.

        Runs of another signal than preferences, which is what a referee's verdicts are, are not audited.
        A decision of a run whose progress cannot be had, because the store is away, is left as it is.
        """
        by_run: dict[str, list[Decided]] = {}
        for one in decided:
            if one.stored.n > 1 and one.run.signal is Signal.PREFERENCE:
                by_run.setdefault(one.run.name, []).append(one)
        out = {}
        for name, group in by_run.items():
            try:
                standing = self._standings.get(name) or await self._open(group[0].run)
            except StoreUnavailableError:
                continue
            probabilities = self._probabilities(standing, group)
            tasks = []
            for one, probability in zip(group, probabilities, strict=True):
                one.stored.inclusion = probability
                if is_chosen(one.decision_id, probability):
                    tasks.append(AuditTask(one.decision_id, encode_task(one.stored, one.instance)))
            out[name] = ChosenAudits(tasks, len(group))
        return out

    async def _open(self, run: Run) -> _Standing:
        """Learn how far the run has come."""
        progress = await self._store.audit_progress(run.name)
        alarms = _alarms(run.posterior)
        fresh = _Standing(progress.count, progress.start, Progress(alarms=alarms), run.posterior, alarms)
        return self._standings.setdefault(run.name, fresh)

    def _probabilities(self, standing: _Standing, group: Sequence[Decided]) -> list[float]:
        """Return the probability of each of a run's next decisions."""
        run = group[0].run
        if standing.posterior is not run.posterior:
            standing.posterior, standing.alarms = run.posterior, _alarms(run.posterior)
        landmarks = run.prior.landmarks if run.prior.watches_novelty else None
        numbers = []
        for one in group:
            novel = None if landmarks is None else landmarks.is_novel(np.frombuffer(one.stored.x, "<f4"))
            before = standing.changes.restarts
            standing.changes = standing.changes.next(novel, standing.alarms)
            if standing.changes.restarts > before:
                standing.start = standing.restarted_at = standing.count
            standing.count += 1
            numbers.append(float(max(standing.count - standing.start, 1)))
        found: list[float] = self._schedule.probabilities(np.array(numbers)).tolist()
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
        progress = await self._store.save_audited(
            run, records, chosen.tasks, counted=chosen.counted, seconds=TASK_SECONDS
        )
        standing = self._standings.get(run)
        if standing is None:
            return
        if standing.restarted_at is not None:
            start, standing.restarted_at = standing.restarted_at, None
            await self._store.restart_audits(run, start)
        # What other gateways have counted.
        standing.count = max(standing.count, progress.count)
        standing.start = max(standing.start, progress.start)

    def forget(self, run: str) -> None:
        """Forget a run that was closed."""
        self._standings.pop(run, None)


def is_audited(decision_id: str, decision: StoredDecision) -> bool:
    """Return True if the decision was chosen for an audit."""
    return decision.inclusion is not None and is_chosen(decision_id, decision.inclusion)


def _alarms(posterior: Posterior) -> float:
    return float(sum([watch.alarms for watch in posterior.watches]))

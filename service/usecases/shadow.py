"""Shadow: for some instances, ask every other RM too, after the reply, so that the run learns from full information.

The verdicts are added to the stored decision while it waits for its feedback; so they reach the log with it, and every
replica folds the same. That an instance was shadowed is noted even where nobody answered: off-policy evaluation divides
by how often that happens. Feedback that comes first finds the decision without: then all is dropped and counted.
Called by `score`; drained by `service.wiring` at shutdown. Knows no policy: what was drawn is done.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import msgspec
import numpy as np
from numpy.typing import NDArray

from router_core.records import Instance, Shadow, verdict_of
from service.errors import StoreUnavailableError
from service.stores.protocol import DecisionRecord, Store
from service.telemetry import Telemetry
from service.usecases.ask import PATIENT_INSTANCES
from service.usecases.decisions import StoredDecision, encode_decision
from service.usecases.runs import Run
from service.workers.protocol import Arm, WorkerError

logger = logging.getLogger(__name__)

MAX_SHADOWED = 256
"""Instances being shadowed at once; more are skipped and counted, so that slow RMs cannot pile up work."""


class Shadowable(NamedTuple):
    """One answered instance: its run, its decision as it was stored, its texts, and o_k(x) of every arm (K,)."""

    run: Run
    decision_id: str
    stored: StoredDecision
    instance: Instance
    offsets: NDArray[np.float64]


@dataclass(slots=True)
class _Asking:
    """One instance on its way, the verdicts that came back, and the arms that could not be asked."""

    item: Shadowable
    found: list[Shadow]
    unasked: list[int]


def is_shadowed(decision_id: str, rate: float) -> bool:
    """Whether the decision is among the fraction: by a hash of its id, so that it depends on nothing that was drawn.

    >>> is_shadowed("d", 0.0), is_shadowed("d", 1.0)
    (False, True)
    """
    digest = hashlib.blake2b(decision_id.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") < rate * 2.0**64


class Shadower:
    """Asks in the background; one per process.

    Args:
        store: where decisions wait for feedback.
        telemetry: counters.
        rate: fraction of the instances, 0 to 1.
        timeout_seconds: deadline of asking one RM about up to `PATIENT_INSTANCES` instances.
        max_instances: how many may be under way at once.
    """

    def __init__(
        self,
        store: Store,
        telemetry: Telemetry,
        *,
        rate: float,
        timeout_seconds: float,
        max_instances: int = MAX_SHADOWED,
    ) -> None:
        self.rate = rate
        self._store = store
        self._telemetry = telemetry
        self._timeout_seconds = timeout_seconds
        self._max_instances = max_instances
        self._in_flight = 0
        self._tasks: set[asyncio.Task[None]] = set()
        telemetry.shadows_in_flight.set_function(lambda: self._in_flight)

    def offer(self, answered: Iterable[Shadowable]) -> None:
        """Shadow those that the rate selects and for which there is room; returns at once.

        A single response has no verdict to learn from and is never shadowed.
        """
        chosen = [item for item in answered if item.stored.n > 1 and is_shadowed(item.decision_id, self.rate)]
        room = max(self._max_instances - self._in_flight, 0)
        for item in chosen[room:]:
            self._count(item, "skipped")
        if not chosen[:room]:
            return
        asking = [_Asking(item, [], []) for item in chosen[:room]]
        self._in_flight += len(asking)
        task = asyncio.get_running_loop().create_task(self._shadow(asking))
        self._tasks.add(task)
        task.add_done_callback(lambda done: self._ended(done, asking))

    async def drain(self) -> None:
        """Wait for what is under way; nothing may be offered any more. Deadlines bound how long it takes."""
        while self._tasks:
            await asyncio.wait(self._tasks)

    def _ended(self, task: asyncio.Task[None], asking: Sequence[_Asking]) -> None:
        self._tasks.discard(task)
        self._in_flight -= len(asking)
        if not task.cancelled() and task.exception() is not None:
            for one in asking:
                self._count(one.item, "failed")
            logger.error("shadowing failed", exc_info=task.exception())

    async def _shadow(self, asking: Sequence[_Asking]) -> None:
        """Ask every other RM, one call per RM, and add what came back to the decisions, one write per run."""
        arms = asking[0].item.run.template.arms
        await asyncio.gather(*(self._ask(arm, worker, asking) for arm, worker in enumerate(arms)))
        by_run: dict[str, list[_Asking]] = {}
        for one in asking:
            by_run.setdefault(one.item.run.name, []).append(one)
        await asyncio.gather(*(self._record(run, found) for run, found in by_run.items()))

    async def _ask(self, arm: int, worker: Arm, asking: Sequence[_Asking]) -> None:
        """Ask one RM about all instances that it was not asked about, and had not failed for, when they were scored."""
        mine = [one for one in asking if arm != one.item.stored.arm and arm not in one.item.stored.gone]
        if not mine:
            return
        if not worker.available:
            # It may be busy, or have left since the choice: that says nothing about these texts.
            for one in mine:
                one.unasked.append(arm)
            return
        groups = [[(one.item.instance.prompt, text) for text in one.item.instance.responses] for one in mine]
        patience = self._timeout_seconds * -(-len(mine) // PATIENT_INSTANCES)
        outcomes = await worker.score_groups(groups, deadline=asyncio.get_running_loop().time() + patience)
        for one, outcome in zip(mine, outcomes, strict=True):
            if isinstance(outcome, WorkerError):
                self._telemetry.shadow_calls.labels(worker.name, outcome.code).inc()
            else:
                self._telemetry.shadow_calls.labels(worker.name, "ok").inc()
                one.found.append(Shadow(arm, float(one.item.offsets[arm]), verdict_of(outcome)))

    async def _record(self, run: str, found: Sequence[_Asking]) -> None:
        records = []
        for one in found:
            shadows = [tuple(shadow) for shadow in sorted(one.found)]
            stored = msgspec.structs.replace(
                one.item.stored, shadows=shadows, shadowed=True, unasked=sorted(one.unasked)
            )
            records.append(DecisionRecord(one.item.decision_id, encode_decision(stored)))
        try:
            pending = await self._store.update_decisions(run, records)
        except StoreUnavailableError:
            self._telemetry.store_errors.labels("update_decisions").inc()
            pending = None
        for index, one in enumerate(found):
            if pending is None or not one.found:
                self._count(one.item, "failed")
            else:
                self._count(one.item, "recorded" if pending[index] else "late")

    def _count(self, item: Shadowable, outcome: str) -> None:
        self._telemetry.shadows.labels(item.run.name, outcome).inc()

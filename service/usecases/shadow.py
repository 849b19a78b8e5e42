"""Shadow: for some instances, ask every other RM too, after the reply, so that the run learns from full information.

The answers are added to the stored decision while it waits for its feedback; so they reach the log with it, and every
replica folds the same. That an instance was shadowed is noted even where nobody answered: off-policy evaluation divides
by how often that happens. Feedback that comes first finds the decision without: then all is dropped and counted.
Called by `score`; drained by `service.gateway` at shutdown. Knows no policy: what was drawn is done.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import msgspec

from router_core.attempts import answers
from router_core.policies import AskRest
from router_core.records import Instance
from service.errors import StoreUnavailableError
from service.stores.protocol import DecisionRecord, Store
from service.telemetry import Telemetry
from service.usecases.ask import PATIENT_INSTANCES, Asker, Inquiry, Tickets
from service.usecases.audit_choice import is_audited
from service.usecases.decisions import StoredDecision, encode_decision
from service.usecases.runs import Run, RunTemplate

logger = logging.getLogger(__name__)

MAX_SHADOWED = 256
"""Instances being shadowed at once; more are skipped and counted, so that slow RMs cannot pile up work."""


class Shadowable(NamedTuple):
    """One answered instance: its run, its decision's id, its decision as it was stored, and its texts."""

    run: Run
    decision_id: str
    stored: StoredDecision
    instance: Instance


def is_shadowed(decision_id: str, rate: float) -> bool:
    """Return True if the decision is among the fraction: by a hash of its id, which depends on nothing that was drawn.

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
        self._asker = Asker(telemetry.shadow_calls.labels, timeout_seconds=timeout_seconds)
        self._in_flight = 0
        self._tasks: set[asyncio.Task[None]] = set()
        telemetry.watch(telemetry.shadows_in_flight, lambda: self._in_flight)

    def offer(self, answered: Iterable[Shadowable]) -> None:
        """Shadow those that the rate selects and for which there is room; returns at once.

        A single response has no verdict to learn from and is never shadowed, nor is what a policy asks every RM about.
        An audit adds to the decision itself.
        """
        chosen = [
            item
            for item in answered
            if item.stored.n > 1
            and (item.stored.arm is not None or item.stored.multiplier)
            and is_shadowed(item.decision_id, self.rate)
            and not is_audited(item.decision_id, item.stored)
        ]
        room = max(self._max_instances - self._in_flight, 0)
        for item in chosen[room:]:
            self._count(item, "skipped")
        taken = chosen[:room]
        if not taken:
            return
        self._in_flight += len(taken)
        task = asyncio.get_running_loop().create_task(self._shadow(taken))
        self._tasks.add(task)
        task.add_done_callback(lambda done: self._ended(done, taken))

    async def drain(self) -> None:
        """Wait for what is under way; nothing may be offered any more. Deadlines bound how long it takes."""
        while self._tasks:
            await asyncio.wait(self._tasks)

    def _ended(self, task: asyncio.Task[None], taken: Sequence[Shadowable]) -> None:
        self._tasks.discard(task)
        self._in_flight -= len(taken)
        if not task.cancelled() and task.exception() is not None:
            for item in taken:
                self._count(item, "failed")
            logger.error("shadowing failed", exc_info=task.exception())

    async def _shadow(self, taken: Sequence[Shadowable]) -> None:
        """Ask every other RM, one call per RM and pool, and add what came back to the decisions, one write per run."""
        pools: dict[RunTemplate, list[Shadowable]] = {}
        for item in taken:
            pools.setdefault(item.run.template, []).append(item)
        await asyncio.gather(*(self._shadow_pool(template, items) for template, items in pools.items()))

    async def _shadow_pool(self, template: RunTemplate, taken: list[Shadowable]) -> None:
        inquiries = [
            Inquiry(AskRest(item.stored.attempts), item.instance, item.stored.known_of(template.asked))
            for item in taken
        ]
        patience = self._timeout_seconds * -(-len(taken) // PATIENT_INSTANCES)
        tickets = Tickets(template.arms, template.prices)
        await self._asker.ask(inquiries, tickets, asyncio.get_running_loop().time() + patience)
        by_run: dict[str, list[tuple[Shadowable, Inquiry]]] = {}
        for item, inquiry in zip(taken, inquiries, strict=True):
            by_run.setdefault(item.run.name, []).append((item, inquiry))
        await asyncio.gather(*(self._record(run, found) for run, found in by_run.items()))

    async def _record(self, run: str, found: Sequence[tuple[Shadowable, Inquiry]]) -> None:
        records = [
            DecisionRecord(
                item.decision_id,
                encode_decision(msgspec.structs.replace(item.stored, shadows=[*inquiry.attempts])),
            )
            for item, inquiry in found
        ]
        try:
            pending = await self._store.update_decisions(run, records)
        except StoreUnavailableError:
            self._telemetry.store_errors.labels("update_decisions").inc()
            pending = None
        for index, (item, inquiry) in enumerate(found):
            if pending is None or (inquiry.attempts and not answers(inquiry.attempts)):
                self._count(item, "failed")
            else:
                self._count(item, "recorded" if pending[index] else "late")

    def _count(self, item: Shadowable, outcome: str) -> None:
        self._telemetry.shadows.labels(item.run.name, outcome).inc()

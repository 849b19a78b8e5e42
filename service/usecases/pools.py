"""Pools: what a run's pool is, what a pool file would change, and the change itself, as one event of the run's log.

A change that was acknowledged is in the log; every gateway folds it at its position (`follow`), builds what the new
pool needs and asks by it from then on (docs/pools-live.md). Called by `handlers.admin`.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Sequence
from typing import Any, Protocol

import msgspec
import pydantic
from pydantic import BaseModel, Field

from service.errors import (
    ConfigurationError,
    ForbiddenError,
    NotReadyError,
    PoolConflictError,
    ServiceError,
    ValidationError,
)
from service.keys.access import EVERYTHING, Access
from service.pool import PoolFile
from service.schemas import PoolRequest
from service.specification import Change, Specification, decode, encode, entry_fields, reach, read_entry
from service.stores.acts import POOL
from service.stores.ids import event_order
from service.stores.protocol import LogEntry, Store
from service.usecases.runs import Run, RunRegistry, RunTemplate, failure_of

APPLIED_SECONDS = 10.0
"""How long a change waits to be folded here before it is answered all the same: it is in the log by then."""

POLL_SECONDS = 0.01


class ArmShown(BaseModel):
    """One arm of a run."""

    arm: int = Field(description="Its index in decisions and exports, which never changes.")
    name: str
    retired: bool
    price: float = Field(description="Of one call, in units of the cheapest scorer that is asked.")
    source: str = Field(description="What it started from: checkpoint, kinds or nothing.")
    since: int = Field(description="Version of the pool that added it.")
    events: float = Field(description="How many events of it the posterior holds.")
    on_probation: bool = Field(description="It is asked of a bounded share of the instances until more is known of it.")


class PoolShown(BaseModel):
    """A run's pool as this gateway asks by it."""

    run: str
    version: int = Field(description="Changes so far.")
    posterior_version: int
    arms: list[ArmShown]
    pool: dict[str, Any] = Field(description="The pool file that says the same, without keys.")
    policy: str
    v: float = Field(description="Exploration scale that holds.")
    gamma: float = Field(description="Discount that holds.")
    max_calls: int
    proposal: list[Change] = Field(description="What this gateway's own pool file would change; empty for nothing.")


class PoolReply(BaseModel):
    """What was changed, or would be."""

    run: str
    version: int = Field(description="Of the pool after the change.")
    changes: list[Change]
    applied: bool
    event_id: str | None = Field(description="The change's place in the log; null where nothing was changed.")
    away: list[str] = Field(
        default=[], description="New scorers that this gateway cannot ask now, each with the reason it was given."
    )


class Assembler(Protocol):
    """What the use case asks of `service.assembly.Assembly`."""

    pool: PoolFile

    def changed(
        self, standing: Specification, pool: PoolFile, given: dict[str, Any], now_ms: int, *, servers: bool = True
    ) -> tuple[Specification, list[Change]]:
        """Return a run's specification after a pool file was applied, and what differs."""

    def own_routing(self) -> dict[str, Any]:
        """Return what the gateway's settings and pool file say of `Routing`."""

    def check(self, specification: Specification, standing: RunTemplate) -> None:
        """Return if this gateway could ask by a specification.

        Raises:
            ConfigurationError: it could not.
        """


class PoolService:
    """The use case behind `/admin/pool`.

    Args:
        runs: where runs are opened.
        store: their logs.
        assembly: makes specifications.
    """

    def __init__(self, runs: RunRegistry, store: Store, assembly: Assembler) -> None:
        self._runs = runs
        self._store = store
        self._assembly = assembly

    async def show(self, name: str | None, access: Access = EVERYTHING) -> PoolShown:
        """Return a run's pool.

        Raises:
            NotFoundError: no such run.
            NotReadyError: its log is still being replayed: the pool may have changed in it.
        """
        run = await self._runs.loaded(name, access)
        posterior, template = run.current
        specification = _specification(template)
        waiting, hyper = posterior.on_probation, posterior.prior.hyper
        arms = [
            ArmShown(
                arm=k,
                name=name,
                retired=arm.retired,
                price=template.prices[k],
                source=arm.source,
                since=arm.since,
                events=round(float(posterior.events[k]), 6),
                on_probation=waiting is not None and bool(waiting[k]),
            )
            for k, (name, arm) in enumerate(zip(template.pool, specification.arms, strict=True))
        ]
        return PoolShown(
            run=run.name,
            version=specification.version,
            posterior_version=posterior.count,
            arms=arms,
            pool=specification.file().model_dump(mode="json", exclude_defaults=True),
            policy=template.default_policy.name,
            v=hyper.v,
            gamma=hyper.gamma,
            max_calls=template.max_calls,
            proposal=list(run.proposal),
        )

    async def apply(self, request: PoolRequest, access: Access = EVERYTHING) -> PoolReply:
        """Change a run's pool. When this returns, the change is in the log, and this gateway asks by it.

        Raises:
            NotFoundError: no such run.
            ForbiddenError: the key may name some runs only, and the change names an address that is new here.
            ValidationError: the pool file cannot be read, or the change cannot be made here.
            PoolConflictError: the pool has another version than the caller expects.
            NotReadyError: the run does not learn.
        """
        run = await self._runs.find(request.run, access)
        if run.failure is not None:
            raise NotReadyError(failure_of(run), details={"run": run.name}, retry_after_seconds=1)
        pool, given = self._read(request)
        while True:
            acts = await self._store.acts(run.name)
            await self._caught_up(run, [act.event_id for act in acts])
            template = run.template
            standing = _specification(template)
            if request.expect not in (None, standing.version):
                raise PoolConflictError(
                    f"the pool of run {run.name!r} has version {standing.version}, and {request.expect} was expected: "
                    "look at it again",
                    details={"run": run.name, "version": standing.version},
                )
            wanted, changes = self._assembly.changed(standing, pool, given, time.time_ns() // 1_000_000)
            if changes:
                wanted = msgspec.structs.replace(wanted, by=access.name)
                if access.runs is not None:
                    self._check_reach(wanted, standing, access)
                self._check(wanted, template)
            if request.dry_run or not changes:
                version = wanted.version if changes else standing.version
                return PoolReply(run=run.name, version=version, changes=changes, applied=False, event_id=None)
            event_id = await self._store.append_act(
                run.name, f"pool-{wanted.version}", encode(wanted), POOL, identity=run.identity, expected=len(acts)
            )
            if event_id is None:
                continue  # Somebody else was first: look at what the pool is now.
            run.acknowledged = max(run.acknowledged, event_id, key=event_order)
            await self._caught_up(run, [event_id], patient=False)
            return PoolReply(
                run=run.name,
                version=wanted.version,
                changes=changes,
                applied=True,
                event_id=event_id,
                away=_away(run.template, [one.scorer for one in changes if one.action in ("add", "replace")]),
            )

    def _check_reach(self, wanted: Specification, standing: Specification, access: Access) -> None:
        """Return if the change talks to nobody new: all runs share what this gateway reads and knows.

        Raises:
            ForbiddenError: it does.
        """
        own = [entry_fields(entry) for entry in self._assembly.pool.scorers]
        known = {reach(fields) for fields in (*own, *_entries(standing))}
        for fields in _entries(wanted):
            if reach(fields) not in known:
                raise ForbiddenError(
                    f"scorer {fields['name']!r} has an address, key variable or file that neither this gateway's pool "
                    f"file nor the run has, and the key {access.name!r} may name some runs only: name the scorer in "
                    "the gateway's pool file, or send a key for all runs",
                    details={"field": "pool", "scorer": fields["name"]},
                )

    def _read(self, request: PoolRequest) -> tuple[PoolFile, dict[str, Any]]:
        """Return the pool file and routing that are asked for."""
        if request.pool is None:
            return self._assembly.pool, self._assembly.own_routing()
        try:
            pool = PoolFile.model_validate(request.pool)
        except pydantic.ValidationError as error:
            first = error.errors()[0]
            where = ".".join(str(part) for part in ("pool", *first["loc"]))
            raise ValidationError(
                f"{where}: {first['msg']} (fields: docs/scorers.md)", details={"field": where}
            ) from error
        return pool, routing_of(pool)

    def _check(self, wanted: Specification, standing: RunTemplate) -> None:
        try:
            for arm in wanted.asked:
                read_entry(arm.entry)
            self._assembly.check(wanted, standing)
        except ServiceError as error:
            raise ValidationError(f"the pool cannot be applied: {error.message}", details={"field": "pool"}) from error

    async def _caught_up(self, run: Run, events: Sequence[str], *, patient: bool = True) -> None:
        """Wait until these events were folded here.

        Raises:
            NotReadyError: they were not in time.
        """
        if not events:
            return
        last = max(events, key=event_order)
        deadline = time.monotonic() + APPLIED_SECONDS
        while event_order(run.last_event_id) < event_order(last):
            if time.monotonic() > deadline or run.failure is not None:
                if not patient:
                    return
                raise NotReadyError(
                    f"run {run.name!r} is still replaying its log: try again in a moment", retry_after_seconds=1
                )
            await asyncio.sleep(POLL_SECONDS)


def routing_of(pool: PoolFile) -> dict[str, Any]:
    """Return the fields of `Routing` that a pool file says something of."""
    given: dict[str, Any] = {} if pool.routing is None else pool.routing.model_dump(exclude_none=True)
    if "policy" not in given and pool.combine not in (None, "route"):
        given["policy"] = str(pool.combine)
    return given


def standing_pool(fingerprint: bytes, acts: Sequence[LogEntry]) -> Specification | None:
    """Return a run's pool from what the store keeps of it: the last change, or what it began with; None for neither."""
    changes = [act for act in acts if act.value == POOL]
    if changes:
        return decode(changes[-1].payload)
    founding = json.loads(fingerprint).get("founding")
    return None if founding is None else msgspec.convert(founding, Specification)


async def names_of(store: Store, run: str) -> tuple[str, ...]:
    """Return the names of every scorer that a run ever asked, in arm order, as the store has them; none of no such run.

    Raises:
        StoreUnavailableError: the store does not answer.
    """
    check, acts = await store.check_run(run, ()), await store.acts(run)
    if check.identity is None:
        return ()
    standing = standing_pool(check.identity.fingerprint, acts)
    return tuple(json.loads(check.identity.fingerprint)["pool"]) if standing is None else standing.names


def _away(template: RunTemplate, names: Sequence[str | None]) -> list[str]:
    """Return a sentence on each of these scorers that cannot be asked now."""
    scorers = {template.pool[k]: template.arms[k] for k in template.asked}
    found = []
    for name in names:
        scorer = scorers.get(name or "")
        if scorer is not None and not scorer.available:
            replicas = scorer.status().replicas
            reasons = [f"{replica.url}: {replica.problem or 'no answer'}" for replica in replicas]
            found.append(f"{name}: {'; '.join(reasons) or 'away'}")
    return found


def _specification(template: RunTemplate) -> Specification:
    if template.specification is None:
        raise ConfigurationError("the pool of this gateway is fixed")
    return template.specification


def _entries(specification: Specification) -> list[dict[str, Any]]:
    """Return the entries of everybody who is asked."""
    return [*[arm.entry for arm in specification.asked], *specification.referees]

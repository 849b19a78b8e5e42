"""The background task that keeps the breakers of a scorer's replicas true: each is asked something small, again.

Closes the breaker of a replica that answers and counts a failure on one that does not; a refused connection opens it
at once and gives up what is in flight there. A replica that is new, or has been out, must pass the whole probe of its
kind; one with a problem, or that refused connections since, gets no traffic until it does. A replica that has equals is
also asked how busy it is (vLLM's `/metrics`), for the choice among them.

    ProbeError            the replica answered, and not what was asked for
    ├── UnreachableError      it did not answer, or said that it cannot now: away, loading, overloaded
    └── NoSuchPathError       it does not know the path

Each kind says what is asked (`Checks`), by means of `exchange` and `settle`; the encoder over vLLM is checked like a
scorer. Whoever owns the monitor awaits `check_all` before the first traffic, starts it, and stops it when the service
drains. Knows replicas; nothing of runs or posteriors.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Sequence
from dataclasses import dataclass
from typing import Final, Protocol

import numpy as np

from service.scorers.transport.exchange import RETRIED_STATUSES
from service.scorers.transport.http import HttpError, HttpProtocolError, ResponseTooLargeError
from service.scorers.transport.load import read_load
from service.scorers.transport.replica import Replica
from service.scorers.wire import METRICS_PATH, error_message

LOAD_VALID_INTERVALS: Final = 3
"""Health checks after which a load that was not told again is forgotten."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class HealthPolicy:
    """How often replicas are checked.

    Attributes:
        interval_seconds: mean time between two checks of one replica.
        timeout_seconds: time for one check or whole probe. A busy CPU worker answers behind its queue, so keep it above
            a few batches.
        jitter: each wait is `interval_seconds` times a uniform factor in [1 - jitter, 1 + jitter], so that gateways
            that started together do not check together.
    """

    interval_seconds: float = 2.0
    timeout_seconds: float = 5.0
    jitter: float = 0.25

    def __post_init__(self) -> None:
        if self.interval_seconds <= 0 or self.timeout_seconds <= 0 or not 0 <= self.jitter < 1:
            raise ValueError(f"health policy {self}: times must be positive and 0 <= jitter < 1")


class ProbeError(Exception):
    """A replica did not give the answer that was asked for; the message says what it did instead."""


class UnreachableError(ProbeError):
    """A replica gave no answer for now; its settings may well be right."""


class NoSuchPathError(ProbeError):
    """The replica does not know the path."""


async def exchange(replica: Replica, method: str, path: str, body: bytes, deadline: float) -> bytes:
    """Return the body of a replica's answer to one check.

    Args:
        replica: who is asked.
        method: GET or POST.
        path: under its origin.
        body: JSON; empty for GET.
        deadline: absolute `loop.time()`.

    Raises:
        UnreachableError: no answer, or a status that says "not now".
        NoSuchPathError: 404 or 405.
        ProbeError: any other answer than 200.
    """
    try:
        response = await replica.check(method, path, body, deadline=deadline)
    except (HttpProtocolError, ResponseTooLargeError) as error:
        raise ProbeError(str(error)) from error
    except HttpError as error:
        raise UnreachableError(str(error)) from error
    if response.status == 200:
        return response.body
    words = f"{path} answered {response.status}: {error_message(response.body)}"
    if response.status in RETRIED_STATUSES:
        raise UnreachableError(words)
    raise (NoSuchPathError if response.status in (404, 405) else ProbeError)(words)


async def settle(replica: Replica, probe: Awaitable[None]) -> None:
    """Admit the replica if its probe passes; else reject it, or note why it is not ready yet."""
    try:
        await probe
    except UnreachableError as error:
        replica.report_check(str(error))
    except ProbeError as error:
        replica.reject(str(error))
    else:
        replica.admit()


class Checks(Protocol):
    """What one scorer's replicas are asked."""

    @property
    def name(self) -> str:
        """The scorer's name, for logs."""

    @property
    def replicas(self) -> tuple[Replica, ...]:
        """Its servers."""

    async def ready(self, replica: Replica, deadline: float) -> None:
        """Ask a replica that is in use something small.

        Raises:
            UnreachableError: no answer for now.
            ProbeError: another answer than such a scorer gives.
        """

    async def probe(self, replica: Replica, deadline: float) -> None:
        """Ask a replica that is new or has been out everything, and admit it, reject it, or report why not yet."""


class ReplicaMonitor:
    """Checks every replica until stopped.

    Args:
        scorers: what each one's replicas are asked.
        policy: how often.
        rng: for the jitter.
    """

    def __init__(self, scorers: Sequence[Checks], policy: HealthPolicy, rng: np.random.Generator) -> None:
        self._scorers = tuple(scorers)
        self._policy = policy
        self._rng = rng
        self._tasks: list[asyncio.Task[None]] = []
        self._unexpected = 0
        self._measured = {replica: len(one.replicas) > 1 for one in self._scorers for replica in one.replicas}

    @property
    def running(self) -> bool:
        """True if every checking task is alive."""
        return bool(self._tasks) and not any(task.done() for task in self._tasks)

    @property
    def unexpected_errors(self) -> int:
        """Checks since construction that failed by a fault of ours rather than of a worker; 0 unless there is a bug."""
        return self._unexpected

    async def check_all(self) -> None:
        """Check every replica once, all at once; for start-up, before the first traffic.

        From then on a replica gets traffic only when its probe has passed, now or at a later check. Logs what the
        probes find. Takes at most `timeout_seconds`, whatever the workers do.
        """
        for one in self._scorers:
            for replica in one.replicas:
                if not replica.proven:
                    replica.withhold()
        await asyncio.gather(*(self._check(one, replica) for one in self._scorers for replica in one.replicas))

    def start(self) -> None:
        """Begin checking in the background of the running loop. No effect when already begun."""
        if not self._tasks:
            self._supervise(True)
            self._tasks = [
                asyncio.create_task(self._watch(one, replica), name=f"health {replica.url}")
                for one in self._scorers
                for replica in one.replicas
            ]

    async def stop(self) -> None:
        """Stop checking; returns when the tasks have ended."""
        tasks, self._tasks = self._tasks, []
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self._supervise(False)

    def _supervise(self, supervised: bool) -> None:
        for one in self._scorers:
            for replica in one.replicas:
                replica.supervised = supervised

    async def _watch(self, one: Checks, replica: Replica) -> None:
        policy = self._policy
        while True:
            await asyncio.sleep(policy.interval_seconds * self._rng.uniform(1 - policy.jitter, 1 + policy.jitter))
            try:
                await self._check(one, replica)
            except Exception:  # noqa: BLE001 - a background task must outlive its own bugs
                self._unexpected += 1
                _log.exception(
                    "health check failed unexpectedly", extra={"fields": {"model": one.name, "url": replica.url}}
                )
                replica.report_check("the health check itself failed")

    async def _check(self, one: Checks, replica: Replica) -> None:
        deadline = asyncio.get_running_loop().time() + self._policy.timeout_seconds
        if not replica.proven:
            await one.probe(replica, deadline)
            return
        number = replica.begin()
        try:
            await one.ready(replica, deadline)
        except UnreachableError as error:
            replica.report_check(str(error))
        except ProbeError as error:
            replica.report_check(str(error))
            # Another server may have taken its place; the next check finds out what is wrong.
            replica.proven = False
        else:
            replica.report_check(None, number)
            await self._measure(replica, deadline)

    async def _measure(self, replica: Replica, deadline: float) -> None:
        """Only where there is another replica to choose is the load of use, and only vLLM and our worker tell it."""
        if not self._measured[replica]:
            return
        try:
            response = await replica.check("GET", METRICS_PATH, deadline=deadline)
        except HttpError:
            # Its answer to the readiness check stands; what was known of its load goes out of date by itself.
            return
        load = read_load(response.body) if response.status == 200 else None
        replica.report_load(load, valid_seconds=LOAD_VALID_INTERVALS * self._policy.interval_seconds)

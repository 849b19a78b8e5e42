"""One worker process behind an arm: its connections, its breaker, its load and its latency.

Counts and times every exchange and reports it to the breaker; does not read bodies, choose among replicas or retry.
A failure may be the input's fault: `examine` finds out whether the replica still answers what is known to be good, and
only if it does not, the breaker counts. `service.scorers.requests` asks it, `service.scorers.health` checks it.
"""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Final

from service.scorers.status import ReplicaStatus
from service.scorers.transport.breaker import BreakerPolicy, BreakerState, CircuitBreaker
from service.scorers.transport.http import (
    CONNECT_TIMEOUT_SECONDS,
    IDLE_SECONDS,
    MAX_RESPONSE_BYTES,
    ConnectError,
    DeadlineError,
    HttpError,
    HttpPool,
    Response,
)

LATENCY_WEIGHT: Final = 0.1
"""Weight of the newest answer in the moving average of latency."""

FAULTY_STATUSES: Final = frozenset({500, 502, 503, 504})
"""Statuses that blame the replica, not the request."""

LONGEST_REST_SECONDS: Final = 120.0
"""A server that asks for more patience (Retry-After) is asked again after this time."""

FAIR_SHARE: Final = 0.5
"""An attempt that ran out of time is the replica's fault if the replica had this share of `attempt_timeout_seconds`;
with less, the haste was ours. Below `exchange.ATTEMPT_SHARE`: an attempt that leaves time for another must count.
"""

Request = Callable[..., Awaitable[Response]]
"""A way of sending a request: called as `HttpPool.request` is."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class ReplicaSnapshot:
    """What metrics and the operator's page show of one replica.

    Attributes:
        url: the replica's origin.
        state: its breaker's.
        in_flight: requests sent or queued for a connection.
        items: of those requests, together.
        others: items that the worker had from others when it was last asked; 0 when that is unknown or long ago.
        requests: exchanges begun since start, health checks excluded.
        failures: exchanges that failed by the replica's fault, health checks included.
        consecutive_failures: of those, since the last success.
        latency_seconds: moving average over answers with status 200; None before the first.
        problem: what the last probe found wrong, for which the replica is kept out; None when nothing.
        max_model_len: see `Replica`.
    """

    url: str
    state: BreakerState
    in_flight: int
    items: int
    others: int
    requests: int
    failures: int
    consecutive_failures: int
    latency_seconds: float | None
    problem: str | None
    max_model_len: int | None

    def status(self) -> ReplicaStatus:
        """Return what operators see."""
        latency = self.latency_seconds
        return ReplicaStatus(
            url=self.url,
            state=self.state.value,
            in_flight=self.in_flight,
            failures=self.consecutive_failures,
            latency_ms=None if latency is None else latency * 1e3,
            problem=self.problem,
            max_model_len=self.max_model_len,
        )


class Replica:
    """One worker process. Not thread-safe; one event loop.

    Attributes:
        proven: a probe has passed since the replica was last out. Only the health monitor's probes prove.
        admitted: a probe has ever passed.
        max_model_len: tokens that the worker says it reads at most; None while it has not.
        supervised: a health monitor watches. Then a replica that refused a connection, and so may come back as another
            one, gets no traffic until a probe has passed; without a monitor a trial request finds out.

    Args:
        pool: connections for scoring.
        check_pool: connections for health checks: never kept alive, so that each check also finds out whether the port
            still accepts, and never queued behind scoring.
        model: the arm's name, for logs.
        max_in_flight: requests at once before the replica counts as full.
        attempt_timeout_seconds: the time that an answer may take; see `FAIR_SHARE`.
        policy: the breaker's.
        clock: seconds; any monotonic origin.
    """

    def __init__(
        self,
        pool: HttpPool,
        check_pool: HttpPool,
        *,
        model: str,
        max_in_flight: int,
        attempt_timeout_seconds: float,
        policy: BreakerPolicy,
        clock: Callable[[], float],
    ) -> None:
        self.url = pool.url
        self.in_flight = 0
        self.items = 0
        self.breaker = CircuitBreaker(policy, clock)
        self.proven = False
        self.admitted = False
        self.supervised = False
        self.max_model_len: int | None = None
        self._model = model
        self._fair_seconds = FAIR_SHARE * attempt_timeout_seconds
        self._problem: str | None = None
        self._noted: str | None = None
        self._pool = pool
        self._request: Request = pool.request
        self._check_pool = check_pool
        self._max_in_flight = max_in_flight
        self._clock = clock
        self._requests = 0
        self._failures = 0
        self._latency: float | None = None
        self._others = 0
        self._others_until = -math.inf
        self._rests_until = -math.inf
        self._begun = 0
        self._answered = 0
        self._probing: tuple[int, asyncio.Task[bool]] | None = None
        self._examinations: set[asyncio.Task[bool]] = set()

    @property
    def allows(self) -> bool:
        """True if a request may be sent now: the breaker has a permit, and the server did not ask for patience."""
        return self.breaker.allows and self.rest_seconds == 0.0

    @property
    def rest_seconds(self) -> float:
        """Seconds until the server wants to be asked again; 0 unless it said so."""
        return 0.0 if self._rests_until == -math.inf else max(0.0, self._rests_until - self._clock())

    def rest(self, seconds: float | None) -> None:
        """Send nothing for a while: the server answered 429.

        Args:
            seconds: its Retry-After; None where it did not say, so that only this request goes elsewhere.
        """
        if seconds is not None:
            self._rests_until = self._clock() + min(seconds, LONGEST_REST_SECONDS)

    @property
    def full(self) -> bool:
        """At its limit of requests in flight."""
        return self.in_flight >= self._max_in_flight

    @property
    def load(self) -> int:
        """Items that the worker has to score: ours now, and others' when it last said."""
        return self.items + self.others

    @property
    def others(self) -> int:
        """Items that the worker had from others when it was last asked."""
        return self._others if self._others and self._clock() < self._others_until else 0

    def report_load(self, items: int | None, *, valid_seconds: float) -> None:
        """What the worker says it has to score, ours included, and for how long that is believed.

        What is ours is known better here, up to what is on the way; the rest is others': of other gateways, of
        trainers that ask it themselves.
        """
        self._others = 0 if items is None else max(items - self.items, 0)
        self._others_until = self._clock() + valid_seconds

    def snapshot(self) -> ReplicaSnapshot:
        """The state now."""
        return ReplicaSnapshot(
            url=self.url,
            state=self.breaker.state,
            in_flight=self.in_flight,
            items=self.items,
            others=self.others,
            requests=self._requests,
            failures=self._failures,
            consecutive_failures=self.breaker.consecutive_failures,
            latency_seconds=self._latency,
            problem=self._problem,
            max_model_len=self.max_model_len,
        )

    def intercept(self, wrap: Callable[[str, Request], Request]) -> None:
        """Send scoring requests through what `wrap` makes of the replica's URL and its way of sending them."""
        self._request = wrap(self.url, self._request)

    def begin(self) -> int:
        """The number of an exchange that begins now. What began later has a larger number."""
        self._begun += 1
        return self._begun

    def answered_since(self, number: int) -> bool:
        """Return True if the replica has answered an exchange that began after this one."""
        return self._answered > number

    async def post(self, path: str, body: bytes, permit: int, *, items: int = 1, deadline: float) -> Response:
        """One exchange about some items on the scoring connections, whatever its status.

        The breaker learns the outcome, except for status 200: only who reads the body knows whether it is an answer,
        and must then call `accept` or `blame`.

        Raises:
            HttpError: no whole response.
        """
        try:
            response = await self.send(path, body, permit, self.begin(), items=items, deadline=deadline)
        except (ConnectError, DeadlineError):
            raise
        except HttpError as error:
            self.blame(permit, str(error))
            raise
        if response.status in FAULTY_STATUSES:
            self.blame(permit, f"status {response.status}")
        return response

    async def send(
        self, path: str, body: bytes, permit: int, number: int, *, items: int = 1, deadline: float
    ) -> Response:
        """As `post`, but the breaker learns only what leaves no doubt: no connection, no answer in time, a refusal.

        After status 200, a status of `FAULTY_STATUSES` or another `HttpError`, which the input may have caused, the
        caller must call `accept`, `blame` or `examine`.

        Args:
            path: under the origin.
            body: JSON.
            permit: of the breaker.
            number: of `begin`.
            items: in the body.
            deadline: absolute `loop.time()`.

        Raises:
            HttpError: no whole response.
        """
        self.in_flight += 1
        self.items += items
        self._requests += 1
        began = self._clock()
        try:
            response = await self._request("POST", path, body, deadline=deadline)
        except ConnectError as error:
            self.blame(permit, str(error))
            if error.refused:
                self._refused(str(error))
            raise
        except DeadlineError as error:
            # Our own queue was too long, our caller in a hurry, or the input slow: a later one was answered.
            if error.peer_seconds < self._fair_seconds or self.answered_since(number):
                self.breaker.abandon(permit)
            else:
                self.blame(permit, str(error))
            raise
        except HttpError:
            raise
        except BaseException:
            self.breaker.abandon(permit)
            raise
        finally:
            self.in_flight -= 1
            self.items -= items
        if response.status == 200:
            self._observe(self._clock() - began)
        elif response.status not in FAULTY_STATUSES:
            self.breaker.success(permit)
        return response

    def accept(self, permit: int, number: int = 0) -> None:
        """The body of a 200 was an answer; `number` is that of its `begin`."""
        self._answered = max(self._answered, number)
        self.breaker.success(permit)

    def examine(
        self, permit: int, number: int, reason: str, probe: Callable[[], Awaitable[bool]]
    ) -> asyncio.Task[bool]:
        """Find out whether the replica or the input caused a failure, in the background; True clears the replica.

        An answer to an exchange that began later clears it, or one to `probe`: a question that is known to be good,
        asked once for all failures that wait. Without either the breaker counts the failure. That happens even if
        nobody waits for the result.

        Args:
            permit: of the failed exchange.
            number: of its `begin`.
            reason: for the log.
            probe: returns whether the replica answered.
        """
        task = asyncio.get_running_loop().create_task(self._examine(permit, number, reason, probe))
        self._examinations.add(task)
        task.add_done_callback(self._examinations.discard)
        return task

    async def check(self, method: str, path: str, body: bytes = b"", *, deadline: float) -> Response:
        """One exchange on a fresh connection, past the breaker.

        A refused connection opens the breaker and gives up everything in flight here: a worker that shuts down closes
        its port first and may leave requests hanging.

        Raises:
            HttpError: no whole response.
        """
        try:
            return await self._check_pool.request(method, path, body, deadline=deadline)
        except ConnectError as error:
            if error.refused:
                self._refused(str(error))
            raise

    def blame(self, permit: int, reason: str) -> None:
        """Count a failure by the replica's fault."""
        self._failures += 1
        if self.breaker.failure(permit):
            self.proven = False
            self._warn("worker replica taken out", reason)

    def report_check(self, reason: str | None, number: int = 0) -> None:
        """The outcome of a whole health check, with the number of its `begin`: None for ready, else why not."""
        if reason is None:
            self._answered = max(self._answered, number)
            self._back()
            return
        permit = self.breaker.acquire()
        if permit is not None:
            self.blame(permit, reason)
            return
        self._failures += 1
        if self.breaker.held and reason != self._noted:
            self._warn("worker replica is not ready", reason)

    def withhold(self) -> None:
        """Give it no traffic before a probe has passed."""
        self.breaker.hold()

    def admit(self) -> None:
        """A probe has passed: traffic may come."""
        self.proven = self.admitted = True
        self._problem = None
        self._back()

    def reject(self, problem: str) -> None:
        """A probe found that its rewards cannot be used: no traffic until one passes."""
        self.proven = False
        self._problem = problem
        self._failures += 1
        self.breaker.hold()
        if problem != self._noted:
            self._warn("worker replica rejected", problem)

    async def close(self) -> None:
        """Close connections; requests in flight fail."""
        tasks = [*self._examinations, *([self._probing[1]] if self._probing is not None else [])]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self._pool.close()
        await self._check_pool.close()

    async def _examine(self, permit: int, number: int, reason: str, probe: Callable[[], Awaitable[bool]]) -> bool:
        try:
            well = await self._is_well(number, probe)
        except BaseException:
            self.breaker.abandon(permit)
            raise
        if well:
            self.breaker.success(permit)
        else:
            self.blame(permit, reason)
        return well

    async def _is_well(self, number: int, probe: Callable[[], Awaitable[bool]]) -> bool:
        while not self.answered_since(number):
            if self._probing is None:
                begun = self.begin()
                self._probing = begun, asyncio.get_running_loop().create_task(self._probe(begun, probe))
            begun, probing = self._probing
            # Several failures wait for one probe: the end of one of them must not cancel it.
            if not await asyncio.shield(probing) and begun > number:
                return False
        return True

    async def _probe(self, number: int, probe: Callable[[], Awaitable[bool]]) -> bool:
        try:
            answered = await probe()
        finally:
            self._probing = None
        if answered:
            self._answered = max(self._answered, number)
        return answered

    def _refused(self, reason: str) -> None:
        if self.breaker.state is BreakerState.CLOSED:
            self._warn("worker replica taken out", reason)
        self.proven = False
        if self.supervised:
            self.breaker.hold()
        else:
            self.breaker.trip()
        self._pool.abort_in_flight(reason)

    def _back(self) -> None:
        if self.breaker.state is not BreakerState.CLOSED:
            _log.info("worker replica is back", extra={"fields": {"model": self._model, "url": self.url}})
        self._noted = None
        self.breaker.close()

    def _warn(self, event: str, reason: str) -> None:
        self._noted = reason
        _log.warning(event, extra={"fields": {"model": self._model, "url": self.url, "reason": reason}})

    def _observe(self, seconds: float) -> None:
        if self._latency is None:
            self._latency = seconds
        else:
            self._latency += LATENCY_WEIGHT * (seconds - self._latency)


def open_replica(
    url: str,
    *,
    name: str,
    api_key: str | None,
    max_in_flight: int,
    attempt_timeout_seconds: float,
    clock: Callable[[], float],
    breaker: BreakerPolicy,
    connect_timeout_seconds: float = CONNECT_TIMEOUT_SECONDS,
    max_response_bytes: int = MAX_RESPONSE_BYTES,
) -> Replica:
    """Return the replica at an address, with connections of its own.

    Raises:
        ValueError: the URL or the key cannot be used.
    """

    def pool(max_connections: int, idle_seconds: float) -> HttpPool:
        return HttpPool(
            url,
            max_connections=max_connections,
            idle_seconds=idle_seconds,
            connect_timeout_seconds=connect_timeout_seconds,
            max_response_bytes=max_response_bytes,
            api_key=api_key,
        )

    return Replica(
        pool(max_in_flight, IDLE_SECONDS),
        pool(2, 0.0),
        model=name,
        max_in_flight=max_in_flight,
        attempt_timeout_seconds=attempt_timeout_seconds,
        policy=breaker,
        clock=clock,
    )

"""What scorers behind equal servers share: their settings, admission, limits, health checks and end.

Each kind that asks servers over our transport builds on it and adds what it says to them. Knows no words of any.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from router_core.records import Instance
from service.errors import ConfigurationError
from service.scorers.requests import Monitor, Requester, RequestLimits
from service.scorers.transport.breaker import BreakerPolicy
from service.scorers.transport.http import CONNECT_TIMEOUT_SECONDS, MAX_RESPONSE_BYTES
from service.scorers.transport.replica import Replica, Request, open_replica


@dataclass(frozen=True, slots=True, kw_only=True)
class ServedConfig:
    """One scorer of the pool file that is asked over a network.

    Attributes:
        name: the scorer's name in the pool.
        urls: one origin per replica; all serve the same.
        max_in_flight: requests at once per replica; also its connections.
        parallel_requests: requests of one call in flight at once.
        attempt_timeout_seconds: one replica's time for one request; set it below the callers' deadlines.
        connect_timeout_seconds: of that, for connecting.
        timeout_seconds: see `Scorer.timeout_seconds`.
        max_attempts: replicas asked for one request, the first included.
        requests_per_minute: bound on this gateway's requests; None for none.
        tokens_per_minute: bound on their tokens, as estimated; None for none.
        breaker: when a replica is taken out.
        max_response_bytes: bound on one answer.
        api_key: sent as a bearer token. vLLM itself does not check it on `/classify`; a proxy before it may.
        applies: says which instances the scorer is asked about; None for all.
    """

    name: str
    urls: tuple[str, ...]
    max_in_flight: int = 64
    parallel_requests: int = 8
    attempt_timeout_seconds: float = 10.0
    connect_timeout_seconds: float = CONNECT_TIMEOUT_SECONDS
    timeout_seconds: float | None = None
    max_attempts: int = 3
    requests_per_minute: float | None = None
    tokens_per_minute: float | None = None
    breaker: BreakerPolicy = field(default_factory=BreakerPolicy)
    max_response_bytes: int = MAX_RESPONSE_BYTES
    api_key: str | None = field(default=None, repr=False)
    applies: Callable[[Instance], bool] | None = None

    def __post_init__(self) -> None:
        if not self.name or not self.urls:
            raise ConfigurationError(f"scorer {self.name!r} needs a name and at least one URL")
        if len(set(self.urls)) != len(self.urls):
            raise ConfigurationError(f"scorer {self.name!r} names a URL twice: {', '.join(self.urls)}")
        for option in ("max_in_flight", "parallel_requests", "max_attempts"):
            if getattr(self, option) < 1:
                raise ConfigurationError(f"scorer {self.name!r}: {option} is {getattr(self, option)}; use at least 1")
        for option in ("attempt_timeout_seconds", "connect_timeout_seconds"):
            if not 0 < getattr(self, option) < math.inf:
                raise ConfigurationError(
                    f"scorer {self.name!r}: {option} is {getattr(self, option)}; use a positive time"
                )


class ServedScorer:
    """The half of `service.scorers.protocol.Scorer` that scorers behind equal servers share.

    Not thread-safe; one event loop. The owner calls `close`.

    Args:
        config: whom to ask and how.
        kind: see `Scorer.kind`.
        word: what errors call it, for example `RM`.
        clock: monotonic seconds, for breakers and latencies.

    Raises:
        ConfigurationError: a URL or the key cannot be used.
    """

    def __init__(self, config: ServedConfig, kind: str, word: str, clock: Callable[[], float]) -> None:
        self.name = config.name
        self.kind = kind
        self.choosy = config.applies is not None
        self.timeout_seconds = config.timeout_seconds
        try:
            self.replicas = tuple(_replica(config, url, clock) for url in config.urls)
        except ValueError as error:
            raise ConfigurationError(f"{word} {config.name!r}: {error}") from error
        limits = RequestLimits(
            config.name,
            f"{word} {config.name!r}",
            config.attempt_timeout_seconds,
            config.max_attempts,
            config.requests_per_minute,
            config.tokens_per_minute,
        )
        self._requester = Requester(limits, self.replicas, clock)
        self._monitor: Monitor | None = None
        self._parallel = min(config.parallel_requests, config.max_in_flight * len(self.replicas))
        self._admits = config.applies

    @property
    def available(self) -> bool:
        """True if some replica may be sent a request now."""
        # A loop, since this is asked several times a request and a generator costs more than the question.
        for replica in self.replicas:
            if replica.allows and not replica.full:
                return self._requester.has_room
        return False

    @property
    def reachable(self) -> bool:
        """True if some replica's breaker allows a request."""
        return any(replica.allows for replica in self.replicas)

    def slots(self) -> asyncio.Semaphore:
        # More than the replicas take would wait for a connection, on the time of an attempt.
        return asyncio.Semaphore(self._parallel)

    def applies(self, instance: Instance) -> bool:
        """Return True unless the pool file bars the instance."""
        return self._admits is None or self._admits(instance)

    @property
    def counts_to(self) -> int | None:
        """None: the servers count."""
        return None

    async def readable(self, instances: Sequence[Instance]) -> list[int]:
        """Return the number of responses of each instance: nothing is known."""
        return [len(instance.responses) for instance in instances]

    @property
    def unexpected_errors(self) -> int:
        return self._monitor.unexpected_errors if self._monitor is not None else 0

    async def check(self) -> None:
        if self._monitor is not None:
            await self._monitor.check_all()

    def intercept(self, wrap: Callable[[str, Request], Request]) -> None:
        """Send scoring requests through what `wrap` makes of a replica's URL and its way of sending them."""
        for replica in self.replicas:
            replica.intercept(wrap)

    def start(self) -> None:
        if self._monitor is not None:
            self._monitor.start()

    async def close(self) -> None:
        if self._monitor is not None:
            await self._monitor.stop()
        for replica in self.replicas:
            await replica.close()


def _replica(config: ServedConfig, url: str, clock: Callable[[], float]) -> Replica:
    return open_replica(
        url,
        name=config.name,
        api_key=config.api_key,
        max_in_flight=config.max_in_flight,
        attempt_timeout_seconds=config.attempt_timeout_seconds,
        clock=clock,
        breaker=config.breaker,
        connect_timeout_seconds=config.connect_timeout_seconds,
        max_response_bytes=config.max_response_bytes,
    )

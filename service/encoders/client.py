"""`StateClient`: one transformer behind any number of equal vLLM servers; token ids in, last states out.

Chooses a server, cuts what is asked into requests, retries elsewhere, reads and checks the answers; connections,
breaker and load of each server are `service.scorers.transport.replica`'s. `service.encoders.remote` calls it,
`service.encoders.health` keeps its breakers true. Knows no texts and no contexts.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Final

import msgspec
import numpy as np
from numpy.typing import NDArray

from service.encoders.protocol import EncoderUnavailableError
from service.encoders.wire import EMBEDDINGS_PATH, EmbeddingsAnswer, WireError, decode_answer, encode_request
from service.errors import ConfigurationError
from service.scorers.transport.breaker import BreakerPolicy
from service.scorers.transport.http import (
    CONNECT_TIMEOUT_SECONDS,
    IDLE_SECONDS,
    DeadlineError,
    HttpError,
    HttpPool,
    Response,
)
from service.scorers.transport.replica import ATTEMPT_SHARE, CLOCK_SLACK_SECONDS, RETRIED_STATUSES, Replica
from service.scorers.wire import error_message

MAX_RESPONSE_BYTES: Final = 64 << 20
"""Largest answer: 64 vectors of 4,096 columns are 1.4 MB, and as decimal numbers six times that."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EncoderConfig:
    """Where the transformer is served.

    Attributes:
        urls: one origin per server; all serve the same weights.
        dim: columns of a state.
        model: the name under which it is served; None leaves it out, and the server's only model answers.
        texts_per_request: token id lists in one request at most.
        max_in_flight: requests at once per server before it counts as full; also its connections.
        timeout_seconds: for one request, retries included.
        max_attempts: servers asked for one request, the first included.
        breaker: when a server is taken out.
        api_key: sent as a bearer token; vLLM checks it on `/v1/embeddings`.
    """

    urls: tuple[str, ...]
    dim: int
    model: str | None = None
    texts_per_request: int = 64
    max_in_flight: int = 64
    timeout_seconds: float = 5.0
    max_attempts: int = 3
    breaker: BreakerPolicy = field(default_factory=BreakerPolicy)
    api_key: str | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        if not self.urls or len(set(self.urls)) != len(self.urls):
            raise ConfigurationError(f"encoder servers {list(self.urls)}: give at least one URL, each once")


class StateClient:
    """Asks for states. Not thread-safe; one event loop. The owner calls `close`.

    Args:
        config: what to ask.
        clock: monotonic seconds, for breakers and latencies.

    Raises:
        ConfigurationError: a URL or the key cannot be used.
    """

    def __init__(self, config: EncoderConfig, *, clock: Callable[[], float] = time.monotonic) -> None:
        self.config = config
        self.replicas = tuple(_build_replica(config, url, clock) for url in config.urls)
        self._decoder = msgspec.json.Decoder(EmbeddingsAnswer)
        self._turn = 0

    @property
    def available(self) -> bool:
        """True if a server's breaker lets requests through."""
        return any(replica.allows for replica in self.replicas)

    async def states(self, ids: Sequence[Sequence[int]], *, deadline: float) -> NDArray[np.float32]:
        """The states of these token ids: (N, dim) float32, in order; requests of one call are in flight together.

        Args:
            ids: N lists, none empty.
            deadline: absolute `loop.time()`, retries included.

        Raises:
            EncoderUnavailableError: no server gave a usable answer in time.
        """
        size = self.config.texts_per_request
        chunks = [ids[start : start + size] for start in range(0, len(ids), size)]
        if len(chunks) == 1:
            return await self._ask(chunks[0], deadline)
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(self._told(chunk, deadline)) for chunk in chunks]
        answers = [task.result() for task in tasks]
        for answer in answers:
            if isinstance(answer, EncoderUnavailableError):
                raise answer
        return np.concatenate([answer for answer in answers if not isinstance(answer, EncoderUnavailableError)])

    def request(self, ids: Sequence[Sequence[int]]) -> bytes:
        """The body that asks for them."""
        return encode_request(ids, self.config.model)

    def read(self, body: bytes, count: int) -> NDArray[np.float32]:
        """The states in an answer.

        Raises:
            WireError: it is none.
        """
        return decode_answer(body, count, self.config.dim, self._decoder)

    async def close(self) -> None:
        """Close connections; what is in flight fails."""
        for replica in self.replicas:
            await replica.close()

    async def _told(
        self, ids: Sequence[Sequence[int]], deadline: float
    ) -> NDArray[np.float32] | EncoderUnavailableError:
        """As `_ask`, with the error as a value, so that one chunk does not cancel the others half-way."""
        try:
            return await self._ask(ids, deadline)
        except EncoderUnavailableError as error:
            return error

    async def _ask(self, ids: Sequence[Sequence[int]], deadline: float) -> NDArray[np.float32]:
        body = self.request(ids)
        loop = asyncio.get_running_loop()
        tried: list[Replica] = []
        reasons: list[str] = []
        while len(tried) < self.config.max_attempts and (chosen := self._pick(tried)) is not None:
            replica, permit = chosen
            tried.append(replica)
            now = loop.time()
            last = len(tried) == self.config.max_attempts or not self._others(tried)
            until = deadline if last else now + ATTEMPT_SHARE * (deadline - now)
            try:
                response = await replica.post(EMBEDDINGS_PATH, body, permit, deadline=until)
            except HttpError as error:
                reasons.append(str(error))
                if isinstance(error, DeadlineError) and loop.time() >= deadline - CLOCK_SLACK_SECONDS:
                    break
                continue
            if response.status == 200:
                return self._accept(replica, permit, response, len(ids))
            reasons.append(f"{replica.url}: {response.status} {error_message(response.body)}")
            if response.status not in RETRIED_STATUSES:
                break
        raise _unavailable("; ".join(reasons) or "every server is out")

    def _accept(self, replica: Replica, permit: int, response: Response, count: int) -> NDArray[np.float32]:
        try:
            states = self.read(response.body, count)
        except WireError as error:
            replica.blame(permit, str(error))
            raise _unavailable(f"{replica.url}: {error}") from error
        replica.accept(permit)
        return states

    def _others(self, tried: Sequence[Replica]) -> bool:
        return any(replica.allows for replica in self.replicas if replica not in tried)

    def _pick(self, tried: Sequence[Replica]) -> tuple[Replica, int] | None:
        """The server with the fewest requests outstanding, ties in turn, and its permit."""
        candidates = [replica for replica in self.replicas if replica not in tried and replica.allows]
        if not candidates:
            return None
        self._turn += 1
        turned = [candidates[(self._turn + offset) % len(candidates)] for offset in range(len(candidates))]
        replica = min(turned, key=lambda one: one.in_flight)
        permit = replica.breaker.acquire()
        return None if permit is None else (replica, permit)


def _unavailable(reason: str) -> EncoderUnavailableError:
    return EncoderUnavailableError(
        f"the encoder's server gave no vectors: {reason}", details={"reason": reason}, retry_after_seconds=1
    )


def _build_replica(config: EncoderConfig, url: str, clock: Callable[[], float]) -> Replica:
    def pool(max_connections: int, idle_seconds: float) -> HttpPool:
        return HttpPool(
            url,
            max_connections=max_connections,
            idle_seconds=idle_seconds,
            connect_timeout_seconds=CONNECT_TIMEOUT_SECONDS,
            max_response_bytes=MAX_RESPONSE_BYTES,
            api_key=config.api_key,
        )

    try:
        return Replica(
            pool(config.max_in_flight, IDLE_SECONDS),
            pool(2, 0.0),
            model="encoder",
            max_in_flight=config.max_in_flight,
            attempt_timeout_seconds=config.timeout_seconds,
            policy=config.breaker,
            clock=clock,
        )
    except ValueError as error:
        raise ConfigurationError(f"encoder: {error}") from error

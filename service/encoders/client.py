"""`StateClient`: one transformer behind any number of equal vLLM servers; token ids in, last states out.

Cuts what is asked into requests, reads and checks the answers, and says whose fault a failure is: those of several
instances are divided by the caller (`SuspectError`). Which server is asked and which one next is
`service.scorers.requests`'s; connections, breaker and load of each are `service.scorers.transport.replica`'s.
`service.encoders.remote` calls it, `service.scorers.health` keeps its breakers true. Knows no texts and no contexts.
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

from service.encoders.protocol import EncoderInputError, EncoderUnavailableError
from service.encoders.wire import EMBEDDINGS_PATH, EmbeddingsAnswer, WireError, decode_answer, encode_request
from service.errors import ConfigurationError
from service.scorers.protocol import WorkerError, WorkerInputError, WorkerRejectedError
from service.scorers.requests import Requester, RequestLimits, SuspectError
from service.scorers.transport.breaker import BreakerPolicy
from service.scorers.transport.replica import Replica, open_replica

MAX_STATE: Final = 1e9
"""Largest size of a number in a state. Those of language models are below 1e6; sums over much larger ones overflow."""

MAX_RESPONSE_BYTES: Final = 64 << 20
"""Largest answer: 64 vectors of 4,096 columns are 1.4 MB, and as decimal numbers six times that."""


REFUSED_TEXTS: Final = frozenset({400, 413, 422})
"""Statuses by which a server may refuse what it is asked, not who asks."""


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
    """Asks for states; its own `Dialogue`. Not thread-safe; one event loop. The owner calls `close`.

    Args:
        config: what to ask.
        reference: token ids that every server is known to answer; without them each failure is the server's.
        clock: monotonic seconds, for breakers and latencies.

    Raises:
        ConfigurationError: a URL or the key cannot be used.
    """

    def __init__(
        self, config: EncoderConfig, reference: Sequence[int] = (), *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.config = config
        self._reference = reference
        self.replicas = tuple(_build_replica(config, url, clock) for url in config.urls)
        limits = RequestLimits("encoder", "the encoder", config.timeout_seconds, config.max_attempts)
        self._requester = Requester(limits, self.replicas, clock)
        self._decoder = msgspec.json.Decoder(EmbeddingsAnswer)

    @property
    def available(self) -> bool:
        """True if a server's breaker lets requests through."""
        return any(replica.allows for replica in self.replicas)

    async def states(self, ids: Sequence[Sequence[int]], *, deadline: float, alone: bool = True) -> NDArray[np.float32]:
        """The states of these token ids: (N, dim) float32, in order; requests of one call are in flight together.

        Args:
            ids: N lists, none empty.
            deadline: absolute `loop.time()`, retries included.
            alone: they are of one instance.

        Raises:
            EncoderUnavailableError: no server gave a usable answer in time.
            EncoderInputError: `alone`, and the servers fail on these.
            SuspectError: not `alone`, and some of them may be at fault.
        """
        size = self.config.texts_per_request
        chunks = [ids[start : start + size] for start in range(0, len(ids), size)]
        if len(chunks) == 1:
            return await self._ask(chunks[0], deadline, alone=alone)
        asked = [self._ask(chunk, deadline, alone=alone) for chunk in chunks]
        # With errors as values, so that one chunk does not cancel the others half-way.
        answers = await asyncio.gather(*asked, return_exceptions=True)
        for answer in answers:
            if isinstance(answer, BaseException):
                raise answer
        return np.concatenate([answer for answer in answers if not isinstance(answer, BaseException)])

    def doubt(self, ids: Sequence[Sequence[int]]) -> None:
        """Note that a server ended with these texts of one instance, and others'."""
        self._requester.doubt(ids)

    def request(self, ids: Sequence[Sequence[int]]) -> bytes:
        """The body that asks for them."""
        return encode_request(ids, self.config.model)

    def read(self, body: bytes, count: int) -> NDArray[np.float32]:
        """The states in an answer.

        Raises:
            WireError: it is none, or one of them is not finite or beyond `MAX_STATE`.
        """
        states = decode_answer(body, count, self.config.dim, self._decoder)
        if not np.isfinite(states).all():
            raise WireError("a vector holds NaN or infinity")
        if np.abs(states).max(initial=0.0) > MAX_STATE:
            raise WireError(f"a vector holds a number beyond {MAX_STATE:g}")
        return states

    async def close(self) -> None:
        """Close connections; what is in flight fails."""
        for replica in self.replicas:
            await replica.close()

    @property
    def path(self) -> str:
        """See `Dialogue`."""
        return EMBEDDINGS_PATH

    def probe(self) -> bytes | None:
        """See `Dialogue`."""
        return self.request([self._reference]) if self._reference else None

    def answers_probe(self, body: bytes) -> bool:
        """See `Dialogue`."""
        try:
            self.read(body, 1)
        except WireError:
            return False
        return True

    def refusal(self, message: str, details: dict[str, object], status: int, body: bytes) -> WorkerRejectedError:
        """See `Dialogue`."""
        return WorkerRejectedError(message, details=details)

    async def _ask(self, ids: Sequence[Sequence[int]], deadline: float, *, alone: bool) -> NDArray[np.float32]:
        single = ids if alone else None
        try:
            return await self._requester.ask(self, self.request(ids), len(ids), deadline, single=single)
        except WorkerInputError as error:
            raise EncoderInputError(error.message) from error
        except WorkerRejectedError as error:
            # A server may refuse everything, with the same status.
            if error.details["worker_status"] in REFUSED_TEXTS and await self._requester.well(self):
                raise EncoderInputError(error.message) if alone else SuspectError() from error
            raise _unavailable(error) from error
        except WorkerError as error:
            raise _unavailable(error) from error


def _unavailable(error: WorkerError) -> EncoderUnavailableError:
    return EncoderUnavailableError(error.message, details={"reason": error.message}, retry_after_seconds=1)


def _build_replica(config: EncoderConfig, url: str, clock: Callable[[], float]) -> Replica:
    try:
        return open_replica(
            url,
            name="encoder",
            api_key=config.api_key,
            max_in_flight=config.max_in_flight,
            attempt_timeout_seconds=config.timeout_seconds,
            clock=clock,
            breaker=config.breaker,
            max_response_bytes=MAX_RESPONSE_BYTES,
        )
    except ValueError as error:
        raise ConfigurationError(f"encoder: {error}") from error

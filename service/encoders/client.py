"""`StateClient`: one transformer behind any number of equal vLLM servers; token ids in, last states out.

Chooses a server, cuts what is asked into requests, retries elsewhere, reads and checks the answers. A failure at a
server that is well, or that ended with the request, is the texts' fault: those of several instances are divided by the
caller (`SuspectTextsError`), those of one are asked once more. Connections, breaker and load of each server are
`service.scorers.transport.replica`'s. `service.encoders.remote` calls it, `service.encoders.health` keeps its breakers
true. Knows no texts and no contexts.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Final

import msgspec
import numpy as np
from numpy.typing import NDArray

from service.encoders.protocol import EncoderInputError, EncoderUnavailableError
from service.encoders.wire import EMBEDDINGS_PATH, EmbeddingsAnswer, WireError, decode_answer, encode_request
from service.errors import ConfigurationError
from service.scorers.transport.breaker import BreakerPolicy
from service.scorers.transport.culprits import Culprits, digest_of
from service.scorers.transport.exchange import (
    ATTEMPT_SHARE,
    CLOCK_SLACK_SECONDS,
    CONFIRMATIONS,
    FailedError,
    RefusedError,
    attempt,
)
from service.scorers.transport.http import HttpError
from service.scorers.transport.replica import Replica, open_replica

MAX_STATE: Final = 1e9
"""Largest size of a number in a state. Those of language models are below 1e6; sums over much larger ones overflow."""

MAX_RESPONSE_BYTES: Final = 64 << 20
"""Largest answer: 64 vectors of 4,096 columns are 1.4 MB, and as decimal numbers six times that."""


REFUSED_TEXTS: Final = frozenset({400, 413, 422})
"""Statuses by which a server may refuse what it is asked, not who asks."""


class SuspectTextsError(Exception):
    """A request about several instances failed, and one of them may have caused it.

    `crashed`: a server ended with it.
    """

    def __init__(self, *, crashed: bool = False) -> None:
        super().__init__()
        self.crashed = crashed


@dataclass(slots=True)
class _History:
    """The attempts of one request so far."""

    tried: list[Replica] = field(default_factory=list)
    reasons: list[str] = field(default_factory=list)
    suspicions: int = 0
    crashes: int = 0


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
        self._culprits = Culprits(clock)
        self.replicas = tuple(_build_replica(config, url, clock) for url in config.urls)
        self._decoder = msgspec.json.Decoder(EmbeddingsAnswer)
        self._turn = 0

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
            SuspectTextsError: not `alone`, and some of them may be at fault.
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
        self._culprits.doubt(digest_of(ids))

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

    async def _ask(self, ids: Sequence[Sequence[int]], deadline: float, *, alone: bool) -> NDArray[np.float32]:
        history = _History()
        if alone and self._culprits:
            sentence = self._culprits.sentence(digest_of(ids))
            if sentence is not None:
                raise _input_error(sentence)
            history.crashes = int(self._culprits.doubted(digest_of(ids)))
        body = self.request(ids)
        loop = asyncio.get_running_loop()
        while (chosen := self._pick(history)) is not None:
            replica, permit = chosen
            history.tried.append(replica)
            now = loop.time()
            last = len(history.tried) >= self.config.max_attempts or not self._others(history.tried)
            until = deadline if last else now + ATTEMPT_SHARE * (deadline - now)
            try:
                return await attempt(
                    replica,
                    permit,
                    EMBEDDINGS_PATH,
                    body,
                    items=1,
                    until=until,
                    read=lambda answer: self.read(answer, len(ids)),
                    probe=partial(self._probe, replica),
                    model="encoder",
                )
            except RefusedError as error:
                history.reasons.append(str(error))
                if error.status not in REFUSED_TEXTS or not await self._probe(replica):
                    break
                history.suspicions = CONFIRMATIONS
            except FailedError as failure:
                history.reasons.append(str(failure))
                history.suspicions += not failure.blamed
                history.crashes += failure.crashed
            self._judge(history, ids, alone=alone)
            if loop.time() >= deadline - CLOCK_SLACK_SECONDS:
                break
        if alone and history.crashes:
            self.doubt(ids)
        raise _unavailable("; ".join(history.reasons) or "every server is out")

    def _judge(self, history: _History, ids: Sequence[Sequence[int]], *, alone: bool) -> None:
        """Charge the failures so far to the texts, if they are their fault, or may be.

        Raises:
            SuspectTextsError, EncoderInputError: they are.
        """
        if not alone and (history.suspicions or history.crashes):
            raise SuspectTextsError(crashed=history.crashes > 0)
        if max(history.suspicions, history.crashes) >= CONFIRMATIONS:
            sentence = "; ".join(dict.fromkeys(history.reasons))
            self._culprits.convict(digest_of(ids), sentence)
            raise _input_error(sentence)

    async def _probe(self, replica: Replica) -> bool:
        """Return True if the server answers the reference now."""
        if not self._reference:
            return False
        until = asyncio.get_running_loop().time() + self.config.timeout_seconds
        try:
            response = await replica.check("POST", EMBEDDINGS_PATH, self.request([self._reference]), deadline=until)
            if response.status == 200:
                self.read(response.body, 1)
        except (HttpError, WireError):
            return False
        return response.status == 200

    def _others(self, tried: Sequence[Replica]) -> bool:
        return any(replica.allows for replica in self.replicas if replica not in tried)

    def _pick(self, history: _History) -> tuple[Replica, int] | None:
        """The server with the fewest requests outstanding, ties in turn, and its permit.

        One that was tried is taken again only to confirm a failure of the texts.
        """
        if len(history.tried) >= self.config.max_attempts + history.suspicions:
            return None
        allowed = [replica for replica in self.replicas if replica.allows]
        candidates = [replica for replica in allowed if replica not in history.tried]
        if history.suspicions and not candidates:
            candidates = [replica for replica in allowed if replica is history.tried[-1]]
        if not candidates:
            return None
        self._turn += 1
        turned = [candidates[(self._turn + offset) % len(candidates)] for offset in range(len(candidates))]
        replica = min(turned, key=lambda one: one.in_flight)
        permit = replica.breaker.acquire()
        return None if permit is None else (replica, permit)


def _input_error(reasons: str) -> EncoderInputError:
    return EncoderInputError(f"the encoder fails on this input alone, and answers others: {reasons}")


def _unavailable(reason: str) -> EncoderUnavailableError:
    return EncoderUnavailableError(
        f"the encoder's server gave no vectors: {reason}", details={"reason": reason}, retry_after_seconds=1
    )


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

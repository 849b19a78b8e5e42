"""`HttpScorer`: one scorer behind any number of equal servers that speak the scorer protocol.

Kinds `http` and `rule` are this client. Cuts batches into requests and reads results; `service.scorers.requests` makes
each request. What is wrong with one instance is a result of its own, so that it costs the others nothing.
`service.scorers.http.build` makes one per entry of the pool. Knows no routing policy and no store.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

import msgspec

from router_core.attempts import TOO_LONG
from router_core.records import Instance
from router_core.turns import words_of
from service.scorers.admission import Ticket
from service.scorers.health import ProbeError, UnreachableError, exchange, settle
from service.scorers.http.wire import (
    HEALTH_PATH,
    PROBE_ITEM,
    SCORE_PATH,
    TIMEOUT,
    Item,
    Result,
    ScoreRequest,
    Turn,
    numbers,
    read_results,
    stable_code,
    value_problem,
)
from service.scorers.protocol import (
    AbstainedError,
    Scored,
    WorkerError,
    WorkerInputError,
    WorkerRejectedError,
    WorkerTimeoutError,
    WorkerTooLongError,
    WorkerUnavailableError,
)
from service.scorers.requests import Monitor
from service.scorers.served import ServedConfig, ServedScorer
from service.scorers.status import ScorerStatus
from service.scorers.transport.exchange import ATTEMPT_SHARE, AnswerError
from service.scorers.transport.replica import Replica
from service.scorers.wire import says_too_long

REPLY_SHARE: Final = 0.8
"""Share of an attempt's time that the server is given; the rest is for the way back."""


@dataclass(frozen=True, slots=True, kw_only=True)
class HttpConfig(ServedConfig):
    """One scorer of the pool file; see `ServedConfig`.

    Attributes:
        kind: `http` or `rule`.
        responses_per_request: responses per request; an instance with more goes alone.
    """

    kind: str
    responses_per_request: int = 32


class ScoreDialogue:
    """Implements `service.scorers.requests.Dialogue` for one request.

    Args:
        sizes: number of responses of each item.
    """

    path = SCORE_PATH

    def __init__(self, sizes: Sequence[int]) -> None:
        self._sizes = sizes

    def read(self, body: bytes, count: int) -> list[Result]:
        """Return one result per item."""
        return read_results(body, self._sizes)

    def probe(self) -> bytes | None:
        """Return a request that every service can answer."""
        return msgspec.json.encode(ScoreRequest([PROBE_ITEM]))

    def answers_probe(self, body: bytes) -> bool:
        """Return True if the body holds one result."""
        try:
            read_results(body, [1])
        except AnswerError:
            return False
        return True

    def refusal(self, message: str, details: dict[str, object], status: int, body: bytes) -> WorkerRejectedError:
        """Return the error of a refusal, which may blame the length of the input."""
        if says_too_long(status, body):
            return WorkerTooLongError(message, details=details)
        return WorkerRejectedError(message, details=details)


class HttpScorer(ServedScorer):
    """One scorer behind equal servers; implements `service.scorers.protocol.Scorer` and `health.Checks`.

    Not thread-safe; one event loop. The owner calls `close`.

    Args:
        config: whom to ask and how.
        clock: monotonic seconds, for breakers and latencies.
        monitor: makes the health monitor; None where nobody checks.

    Raises:
        ConfigurationError: a URL or the key cannot be used.
    """

    def __init__(
        self,
        config: HttpConfig,
        *,
        clock: Callable[[], float] = time.monotonic,
        monitor: Callable[[HttpScorer], Monitor] | None = None,
    ) -> None:
        super().__init__(config, config.kind, config.kind, clock)
        self.config = config
        self._monitor = None if monitor is None else monitor(self)

    async def score(
        self, instances: Sequence[Instance], *, deadline: float, ticket: Ticket | None = None
    ) -> list[Scored | WorkerError]:
        """Ask about many instances; see `Scorer.score`."""
        shared = ticket is not None and ticket.shared
        if not (self.reachable if shared else self.available):
            return [self._out()] * len(instances)
        slots = ticket.slots if ticket is not None and shared else self.slots()

        items = [_item(one) for one in instances]
        return await self._requester.ask_all(
            items, content=lambda item: item, cut=self._chunks, ask=lambda part: self._ask(part, deadline, slots)
        )

    def status(self) -> ScorerStatus:
        return ScorerStatus(
            name=self.name,
            kind=self.kind,
            available=self.available,
            rendering=None,
            max_model_len=None,
            over_long=None,
            replicas=[replica.snapshot().status() for replica in self.replicas],
        )

    async def ready(self, replica: Replica, deadline: float) -> None:
        """Ask `GET /health`; see `service.scorers.health.Checks.ready`."""
        await exchange(replica, "GET", HEALTH_PATH, b"", deadline)

    async def probe(self, replica: Replica, deadline: float) -> None:
        """Ask for one result; see `service.scorers.health.Checks.probe`."""
        await settle(replica, self._probe(replica, deadline))

    async def _probe(self, replica: Replica, deadline: float) -> None:
        request = msgspec.json.encode(ScoreRequest([PROBE_ITEM]))
        try:
            await self.ready(replica, deadline)
            read_results(await exchange(replica, "POST", SCORE_PATH, request, deadline), [1])
        except UnreachableError:
            raise
        except (ProbeError, AnswerError) as error:
            raise ProbeError(f"{error}; `reward-router check-scorer {replica.url}` says more") from error

    def _chunks(self, items: Sequence[Item]) -> list[list[int]]:
        """Positions, in order, cut where the next item would overfill the request."""
        chunks: list[list[int]] = []
        room = 0
        for index, item in enumerate(items):
            if not chunks or len(item.responses) > room:
                chunks.append([])
                room = self.config.responses_per_request
            chunks[-1].append(index)
            room -= len(item.responses)
        return chunks

    async def _ask(
        self, items: Sequence[Item], deadline: float, slots: asyncio.Semaphore
    ) -> list[Scored | WorkerError]:
        dialogue = ScoreDialogue([len(item.responses) for item in items])
        single = items[0] if len(items) == 1 else None
        async with slots:
            left = deadline - asyncio.get_running_loop().time()
            share = 1.0 if len(self.replicas) == 1 else ATTEMPT_SHARE
            budget = REPLY_SHARE * min(self.config.attempt_timeout_seconds, share * left)
            body = msgspec.json.encode(ScoreRequest([*items], budget if budget > 0 else None))
            results = await self._requester.ask(dialogue, body, len(items), deadline, single=single)
        outcomes = [self._read(result) for result in results]
        return [
            outcome if isinstance(outcome, WorkerError) else _equal_alike(outcome, item.responses)
            for outcome, item in zip(outcomes, items, strict=True)
        ]

    def _read(self, result: Result) -> Scored | WorkerError:
        title, details = f"{self.kind} {self.name!r}", {"model": self.name}
        if result.abstain is not None:
            return AbstainedError(f"{title} does not apply: {result.abstain[:300]}", details=details)
        if result.error is not None:
            message = f"{title}: {result.error.message[:300]}"
            code = stable_code(result.error.code)
            if code == TIMEOUT:
                return WorkerTimeoutError(message, details=details)
            if code == TOO_LONG:
                return WorkerTooLongError(message, details=details)
            return WorkerInputError(message, details=details | {"failure": code})
        problem = value_problem(result)
        if problem is not None:
            return WorkerInputError(f"{title}: {problem}", details=details)
        assert result.rewards is not None
        failures: tuple[str, ...] = ()
        if None in result.rewards:
            codes = result.failures or [None] * len(result.rewards)
            failures = tuple(
                ["" if r is not None else stable_code(c) for r, c in zip(result.rewards, codes, strict=True)]
            )
        components = {name: numbers(part) for name, part in result.components.items()}
        return Scored(numbers(result.rewards), 0, components, failures)

    def _out(self) -> WorkerUnavailableError:
        return WorkerUnavailableError(
            f"{self.kind} {self.name!r}: every server is out or at a limit (`max_in_flight`, "
            "`requests_per_minute`, `tokens_per_minute`)",
            details={"model": self.name},
            retry_after_seconds=1,
        )


def _equal_alike(scored: Scored, responses: Sequence[str]) -> Scored:
    """Return what the service said, where each response has what the first equal one with a reward has.

    The service sees all of them, since it may count them; that equal ones earn the same is not left to it.
    """
    if len(set(responses)) == len(responses):
        return scored
    place: dict[str, int] = {}
    for index, text in enumerate(responses):
        if text not in place or math.isnan(scored.rewards[place[text]]):
            place[text] = index
    order = [place[text] for text in responses]
    return Scored(
        [scored.rewards[index] for index in order],
        components={name: [part[index] for index in order] for name, part in scored.components.items()},
        failures=[scored.failures[index] for index in order] if scored.failures else (),
    )


def _item(instance: Instance) -> Item:
    item = Item([*instance.responses], reference=instance.reference, metadata=dict(instance.metadata))
    if instance.turns is None:
        item.prompt = instance.prompt
    else:
        item.messages = [Turn(turn.role, words_of(turn)) for turn in instance.turns]
    return item

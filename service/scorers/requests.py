"""Requests to a scorer: which replica is asked, which one next, and if the worker or the input caused a failure.

A failure that the input may have caused is examined (`Replica.examine`). If the replica is well, a request about
several instances is divided until the culprit stands alone; one about a single instance is asked once more, elsewhere
if possible, and then the failure is that instance's error. If the replica is not well, the breaker counts and the next
replica is asked. The instances of a request that a worker ended with are asked once more, each alone and none beside
another, so that an instance with which a second worker ends is known to be the cause. Such instances are remembered for
a while (`Culprits`), and neither searched for again nor sent to further workers.
What is said and understood is a `Dialogue`, one per kind. Called by the kinds' clients and the encoder's; knows none.
"""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Final, Protocol, TypeVar

from service.scorers.protocol import (
    WorkerError,
    WorkerInputError,
    WorkerProtocolError,
    WorkerRejectedError,
    WorkerTimeoutError,
    WorkerUnavailableError,
)
from service.scorers.rate import Rate
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
from service.scorers.transport.replica import Replica

WHOLESALE_STATUSES: Final = frozenset({401, 403, 405, 501})
"""Refusals of whoever asks or of the endpoint, not of an input: asking in halves would only repeat them."""

BYTES_PER_TOKEN: Final = 4.0
"""Bytes of a request's body per token that it is taken to have: English has four to five characters per token."""

_log = logging.getLogger(__name__)

Answered = TypeVar("Answered")
AnsweredCo = TypeVar("AnsweredCo", covariant=True)
Asked = TypeVar("Asked")
Made = TypeVar("Made")


class Monitor(Protocol):
    """Keeps the breakers of a scorer's replicas true; `service.scorers.health` has one."""

    @property
    def unexpected_errors(self) -> int:
        """See `Scorer.unexpected_errors`."""

    async def check_all(self) -> None:
        """Check every replica once."""

    def start(self) -> None:
        """Begin checking in the background."""

    async def stop(self) -> None:
        """Stop checking."""


class Dialogue(Protocol[AnsweredCo]):
    """What a kind says to its servers, and what it understands."""

    @property
    def path(self) -> str:
        """Path of every request."""

    def read(self, body: bytes, count: int) -> AnsweredCo:
        """Return what the body of a 200 says.

        Args:
            body: of the response.
            count: items that were asked about.

        Raises:
            AnswerError: it is no answer.
        """

    def probe(self) -> bytes | None:
        """Return the body of a question that is known to be good; None where there is none."""

    def answers_probe(self, body: bytes) -> bool:
        """Return True if the body of a 200 answers that question."""

    def refusal(self, message: str, details: dict[str, object], status: int, body: bytes) -> WorkerRejectedError:
        """Return the error of a final refusal.

        Args:
            message: what to say.
            details: see `ServiceError`.
            status: of the response.
            body: of the response.
        """


@dataclass(frozen=True, slots=True)
class RequestLimits:
    """How one scorer's requests are made.

    Attributes:
        name: the scorer's in the pool, for logs and details.
        title: what a message calls it, for example `RM 'a'`.
        attempt_timeout_seconds: one replica's time for one request.
        max_attempts: replicas asked for one request, the first included.
        requests_per_minute: bound on requests of this process; None for none.
        tokens_per_minute: bound on their tokens, as estimated; None for none.
    """

    name: str
    title: str
    attempt_timeout_seconds: float
    max_attempts: int = 3
    requests_per_minute: float | None = None
    tokens_per_minute: float | None = None


class SuspectError(Exception):
    """A request about several instances failed at a replica that is well: one of them may have caused it.

    `crashed`: replicas ended with it instead.
    """

    def __init__(self, *, crashed: bool = False) -> None:
        super().__init__()
        self.crashed = crashed


@dataclass(slots=True)
class _History:
    """The attempts of one request so far."""

    tried: list[Replica] = field(default_factory=list)
    reasons: list[str] = field(default_factory=list)
    unreadable: int = 0
    suspicions: int = 0
    crashes: int = 0
    over: bool = False
    """No further attempt: no replica is left, or no time."""


class Requester:
    """Asks the replicas of one scorer. Not thread-safe; one event loop.

    Args:
        limits: of the scorer.
        replicas: equal servers.
        clock: monotonic seconds.
    """

    def __init__(self, limits: RequestLimits, replicas: Sequence[Replica], clock: Callable[[], float]) -> None:
        self._limits = limits
        self._replicas = tuple(replicas)
        self._requests = Rate(limits.requests_per_minute)
        self._tokens = Rate(limits.tokens_per_minute)
        self._unbounded = limits.requests_per_minute is None and limits.tokens_per_minute is None
        self._turn = 0
        self._culprits = Culprits(clock)
        self._crash_lane = asyncio.Lock()
        """Held by the one request under way that a replica has ended with."""

    @property
    def has_room(self) -> bool:
        """True if a request of the last one's size may be sent now, by both bounds per minute."""
        return self._requests.has_room and self._tokens.has_room

    async def ask_all(
        self,
        asked: Sequence[Asked],
        *,
        content: Callable[[Asked], object],
        cut: Callable[[Sequence[Asked]], list[list[int]]],
        ask: Callable[[Sequence[Asked]], Awaitable[Sequence[Made | WorkerError]]],
    ) -> list[Made | WorkerError]:
        """Ask about many instances, in requests that hold several of them and are divided where they fail.

        The culprits stand alone in the end: about 2·log2(n) more requests for one of the n of a request, at most 2·n
        for any number. Instances that a replica has ended with are asked each alone, one after another.

        Args:
            asked: the instances.
            content: returns what `ask` gives to `Requester.ask` as the `single` of an instance.
            cut: returns the positions of those that share a request.
            ask: makes one request by `Requester.ask`.

        Returns:
            Per instance what was made of it, or its error. Several may share one error.
        """
        outcomes: dict[int, Made | WorkerError] = {}
        usual: list[int] = []
        doubted: list[int] = []
        for index, one in enumerate(asked):
            key = digest_of(content(one)) if self._culprits else None
            if key is None:
                usual.append(index)
            elif (known := self._known(key)) is not None:
                outcomes[index] = known
            else:
                (doubted if self._culprits.doubted(key) else usual).append(index)
        chunks = [[usual[place] for place in places] for places in cut([asked[index] for index in usual])]
        chunks += [[index] for index in doubted]
        parts = [[asked[index] for index in chunk] for chunk in chunks]
        if len(parts) == 1:
            answers = [await self._divided(parts[0], content, ask)]
        else:
            async with asyncio.TaskGroup() as tasks:
                under_way = [tasks.create_task(self._divided(part, content, ask)) for part in parts]
            answers = [task.result() for task in under_way]
        for chunk, answer in zip(chunks, answers, strict=True):
            outcomes.update(zip(chunk, answer, strict=True))
        return [outcomes[index] for index in range(len(asked))]

    async def _divided(
        self,
        chunk: Sequence[Asked],
        content: Callable[[Asked], object],
        ask: Callable[[Sequence[Asked]], Awaitable[Sequence[Made | WorkerError]]],
    ) -> list[Made | WorkerError]:
        """Ask about a chunk; in halves if it is refused or one of it is suspect, singly if a replica ended with it."""
        try:
            return [*await ask(chunk)]
        except SuspectError as error:
            if error.crashed:
                for one in chunk:
                    self._culprits.doubt(digest_of(content(one)))
                return [made for one in chunk for made in await self._divided([one], content, ask)]
        except WorkerRejectedError as error:
            if len(chunk) == 1 or error.details.get("worker_status") in WHOLESALE_STATUSES:
                return [error] * len(chunk)
        except WorkerError as error:
            return [error] * len(chunk)
        middle = len(chunk) // 2
        async with asyncio.TaskGroup() as tasks:
            halves = [tasks.create_task(self._divided(half, content, ask)) for half in (chunk[:middle], chunk[middle:])]
        return [made for half in halves for made in half.result()]

    async def ask(
        self,
        dialogue: Dialogue[Answered],
        body: bytes,
        count: int,
        deadline: float,
        *,
        single: object | None,
        answer_tokens: int = 0,
    ) -> Answered:
        """Return the answer to one request.

        Args:
            dialogue: reads it.
            body: the request's.
            count: items in the body.
            deadline: absolute `loop.time()`.
            single: what the instance is remembered by (see `digest_of`), if all items are of one; None if they are of
                several. Equal for each request about it, as the body may not be.
            answer_tokens: most that the server writes; they count by `tokens_per_minute` with those that it reads.

        Raises:
            SuspectError: not `single`, and an instance may have caused the failure.
            WorkerError: see `Scorer.score`.
        """
        loop = asyncio.get_running_loop()
        history = _History()
        tokens = len(body) / BYTES_PER_TOKEN + answer_tokens
        key = None if single is None or not self._culprits else digest_of(single)
        if key is not None:
            if (known := self._known(key)) is not None:
                raise known
            history.crashes = int(self._culprits.doubted(key))
        if loop.time() >= deadline:
            raise self._no_answer(True, history)
        try:
            while not history.over:
                if history.crashes:
                    async with asyncio.timeout_at(deadline), self._crash_lane:
                        answers = await self._once(dialogue, body, count, history, deadline, tokens)
                else:
                    answers = await self._once(dialogue, body, count, history, deadline, tokens)
                if answers:
                    if single is not None and history.crashes:
                        self._culprits.clear(digest_of(single))
                    return answers[0]
                self._judge(history, single)
        except TimeoutError:
            raise self._no_answer(True, history) from None
        raise self._no_answer(loop.time() >= deadline - CLOCK_SLACK_SECONDS, history)

    async def _once(
        self,
        dialogue: Dialogue[Answered],
        body: bytes,
        count: int,
        history: _History,
        deadline: float,
        tokens: float,
    ) -> tuple[Answered] | None:
        """Ask the next replica. Return its answer; None after a failure, which stands in the history then.

        Raises:
            WorkerRejectedError: a final refusal.
        """
        loop = asyncio.get_running_loop()
        picked = None
        if self._candidates(history) and await self._admitted(tokens, deadline):
            picked = self._next(history)
        if picked is None:
            history.over = True
            return None
        replica, permit = picked
        history.tried.append(replica)
        try:
            answer = await attempt(
                replica,
                permit,
                dialogue.path,
                body,
                items=count,
                until=self._attempt_deadline(loop.time(), deadline, last=self._is_last(history.tried)),
                read=lambda answered: dialogue.read(answered, count),
                probe=lambda: self._probe(replica, dialogue),
                model=self._limits.name,
            )
        except RefusedError as error:
            raise self._rejection(dialogue, replica, error) from error
        except FailedError as failure:
            history.reasons.append(self._where(replica, str(failure)))
            history.unreadable += failure.unreadable
            history.crashes += failure.crashed
            history.suspicions += not failure.blamed
        else:
            return (answer,)
        history.over = loop.time() >= deadline - CLOCK_SLACK_SECONDS
        return None

    def _judge(self, history: _History, single: object | None) -> None:
        """Charge the failures so far to the input, if they are its fault, or may be.

        Raises:
            SuspectError, WorkerInputError: they are.
        """
        if single is not None:
            if max(history.suspicions, history.crashes) >= CONFIRMATIONS:
                sentence = "; ".join(dict.fromkeys(history.reasons))
                self._culprits.convict(digest_of(single), sentence)
                raise self._input_error(sentence)
            if history.crashes and history.over:
                self._culprits.doubt(digest_of(single))
        elif history.suspicions:
            raise SuspectError
        elif history.crashes:
            raise SuspectError(crashed=True)

    def _known(self, key: bytes) -> WorkerInputError | None:
        """Return the error of an instance that the scorer failed on a while ago, and which is not asked again yet."""
        sentence = self._culprits.sentence(key)
        return None if sentence is None else self._input_error(sentence)

    async def _admitted(self, tokens: float, deadline: float) -> bool:
        """Wait for a place among the minute's requests and tokens; return False if there is none in time."""
        if self._unbounded:
            return True
        try:
            async with asyncio.timeout_at(deadline):
                await self._requests.take(1.0)
                await self._tokens.take(tokens)
        except TimeoutError:
            return False
        return True

    async def _probe(self, replica: Replica, dialogue: Dialogue[Answered]) -> bool:
        """Return True if the replica answers what is known to be good now, on a connection of its own."""
        until = asyncio.get_running_loop().time() + self._limits.attempt_timeout_seconds
        body = dialogue.probe()
        if body is None:
            return False
        try:
            response = await replica.check("POST", dialogue.path, body, deadline=until)
        except HttpError:
            return False
        return response.status == 200 and dialogue.answers_probe(response.body)

    async def well(self, dialogue: Dialogue[Answered]) -> bool:
        """Return True if a replica that is in use answers what is known to be good now."""
        for replica in self._replicas:
            if replica.allows and await self._probe(replica, dialogue):
                return True
        return False

    def doubt(self, single: object) -> None:
        """Note that a replica ended while it had this instance (see `ask`), among others perhaps."""
        self._culprits.doubt(digest_of(single))

    def _candidates(self, history: _History) -> list[Replica]:
        """The replicas that may be asked next. One that was tried is asked again only to confirm a failure of the
        input.
        """
        if len(history.tried) >= self._limits.max_attempts + history.suspicions:
            return []
        allowed = [replica for replica in self._replicas if replica.allows]
        candidates = [replica for replica in allowed if replica not in history.tried]
        if history.suspicions and not candidates:
            candidates = [replica for replica in allowed if replica is history.tried[-1]]
        return candidates

    def _next(self, history: _History) -> tuple[Replica, int] | None:
        """The replica to ask and its permit, or None.

        A full one is taken only when all are: its connections then queue.
        """
        candidates = self._candidates(history)
        if not candidates:
            return None
        turn = self._turn
        self._turn = turn + 1
        number = len(candidates)
        replica = candidates[0]
        if number > 1:
            # min() keeps the first of equals, so rotating the list takes ties in turn.
            replica = min(
                (candidates[(turn + offset) % number] for offset in range(number)), key=lambda r: (r.full, r.load)
            )
        permit = replica.breaker.acquire()
        return None if permit is None else (replica, permit)

    def _is_last(self, tried: Sequence[Replica]) -> bool:
        """Return True if no replica could be asked after those tried: this attempt may take all the time."""
        if len(tried) >= self._limits.max_attempts:
            return True
        return not any(replica.allows for replica in self._replicas if replica not in tried)

    def _attempt_deadline(self, now: float, deadline: float, *, last: bool) -> float:
        left = deadline - now
        return now + min(self._limits.attempt_timeout_seconds, left if last else ATTEMPT_SHARE * left)

    def _where(self, replica: Replica, reason: str) -> str:
        """A reason as callers may read it: replicas by number, addresses are for the log."""
        count = len(self._replicas)
        return reason if count == 1 else f"replica {self._replicas.index(replica) + 1} of {count}: {reason}"

    def _rejection(self, dialogue: Dialogue[Answered], replica: Replica, refused: RefusedError) -> WorkerRejectedError:
        status, words = refused.status, refused.words
        fields = {"model": self._limits.name, "url": replica.url, "reason": f"{status} {words}"}
        _log.info("a worker refused an input", extra={"fields": fields})
        message = f"{self._limits.title} refused the input ({status}): {words}"
        return dialogue.refusal(message, {"model": self._limits.name, "worker_status": status}, status, refused.body)

    def _input_error(self, sentence: str) -> WorkerInputError:
        return WorkerInputError(
            f"{self._limits.title} fails on this input alone, and answers others: {sentence}",
            details={"model": self._limits.name},
        )

    def _no_answer(self, late: bool, history: _History) -> WorkerError:
        title, details = self._limits.title, {"model": self._limits.name}
        tail = "; ".join(history.reasons)
        if late:
            message = f"{title}: no answer before the deadline" + (f" ({tail})" if tail else "")
            return WorkerTimeoutError(message, details=details)
        if history.unreadable and history.unreadable == len(history.reasons):
            return WorkerProtocolError(f"{title}: {tail}", details=details)
        message = f"{title}: no replica could answer: {tail or 'all are out'}"
        rest = min((replica.rest_seconds for replica in self._replicas), default=0.0)
        return WorkerUnavailableError(message, details=details, retry_after_seconds=max(1, math.ceil(rest)))

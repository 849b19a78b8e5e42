"""One request to an RM: which replica is asked, which one next, and if the worker or the input caused a failure.

A failure that the input may have caused is examined (`Replica.examine`). If the replica is well, a request about
several instances ends with `SuspectError`, and the caller divides it; one about a single instance is asked once more,
elsewhere if possible, and then the failure is that instance's error. If the replica is not well, the breaker counts and
the next replica is asked. The instances of a request that a worker ended with are asked once more, each alone and none
beside another, so that an instance with which a second worker ends is known to be the cause. Such instances are
remembered for a while (`Culprits`), and neither searched for again nor sent to further workers.
`service.scorers.rm.client` cuts batches into requests and calls this; knows no groups.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from service.scorers.protocol import (
    OverLong,
    WorkerError,
    WorkerInputError,
    WorkerProtocolError,
    WorkerRejectedError,
    WorkerTimeoutError,
    WorkerTooLongError,
    WorkerUnavailableError,
)
from service.scorers.rm.answers import AnswerError, RewardBound, read_rewards
from service.scorers.rm.render import Content, RenderError, Rendering, encode
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
from service.scorers.wire import CLASSIFY_PATH, PROBE_PROMPT, PROBE_RESPONSE, error_message, says_too_long

if TYPE_CHECKING:
    from service.scorers.rm.client import ArmConfig


_log = logging.getLogger(__name__)


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
    """Asks the replicas of one RM. Not thread-safe; one event loop.

    Args:
        config: of the RM.
        replicas: in the order of `config.urls`.
        clock: monotonic seconds.
    """

    def __init__(self, config: ArmConfig, replicas: Sequence[Replica], clock: Callable[[], float]) -> None:
        self._config = config
        self._replicas = tuple(replicas)
        self._bound = RewardBound(config.reward_limit)
        self._turn = 0
        self._culprits = Culprits(clock)
        self._crash_lane = asyncio.Lock()
        """Held by the one request under way that a replica has ended with."""

    def known(self, items: Sequence[Content]) -> WorkerInputError | None:
        """Return the error of an instance that the RM failed on a while ago, and which is not asked again yet."""
        sentence = self._culprits.sentence(digest_of(items)) if self._culprits else None
        return None if sentence is None else self._input_error(sentence)

    def doubted(self, items: Sequence[Content]) -> bool:
        """Return True if a replica has ended with these items, so that they had better be asked alone."""
        return bool(self._culprits) and self._culprits.doubted(digest_of(items))

    def doubt(self, items: Sequence[Content]) -> None:
        """Note that a replica has ended with these items of one instance, and others'."""
        self._culprits.doubt(digest_of(items))

    async def ask(self, rendering: Rendering, items: Sequence[Content], deadline: float, *, alone: bool) -> list[float]:
        """The reward of each item, transformed as configured.

        Args:
            rendering: of the items.
            items: as many as one request holds.
            deadline: absolute `loop.time()`.
            alone: all items are of one instance.

        Raises:
            SuspectError: not `alone`, and an instance may have caused the failure.
            WorkerError: see `Arm.score`.
            RenderError: the items cannot be rendered.
        """
        loop = asyncio.get_running_loop()
        if loop.time() >= deadline:
            raise self._no_answer(True, _History())
        history = _History()
        if alone and self._culprits:
            if (known := self.known(items)) is not None:
                raise known
            history.crashes = int(self.doubted(items))
        body = rendering.body(self._config.served_model, items)
        try:
            while not history.over:
                if history.crashes:
                    async with asyncio.timeout_at(deadline), self._crash_lane:
                        rewards = await self._once(rendering, body, len(items), history, deadline)
                else:
                    rewards = await self._once(rendering, body, len(items), history, deadline)
                if rewards is not None:
                    if alone and history.crashes:
                        self._culprits.clear(digest_of(items))
                    return rewards
                self._judge(history, items, alone=alone)
        except TimeoutError:
            raise self._no_answer(True, history) from None
        raise self._no_answer(loop.time() >= deadline - CLOCK_SLACK_SECONDS, history)

    async def _once(
        self, rendering: Rendering, body: bytes, count: int, history: _History, deadline: float
    ) -> list[float] | None:
        """Ask the next replica. Returns None after a failure, which stands in the history then.

        Raises:
            WorkerRejectedError: a final refusal.
        """
        loop = asyncio.get_running_loop()
        picked = self._next(history)
        if picked is None:
            history.over = True
            return None
        replica, permit = picked
        history.tried.append(replica)
        until = self._attempt_deadline(loop.time(), deadline, last=self._is_last(history.tried))
        try:
            return await self._attempt(replica, permit, rendering, body, count, until)
        except FailedError as failure:
            history.reasons.append(self._where(replica, str(failure)))
            history.unreadable += failure.unreadable
            history.crashes += failure.crashed
            history.suspicions += not failure.blamed
        history.over = loop.time() >= deadline - CLOCK_SLACK_SECONDS
        return None

    def _judge(self, history: _History, items: Sequence[Content], *, alone: bool) -> None:
        """Charge the failures so far to the input, if they are its fault, or may be.

        Raises:
            SuspectError, WorkerInputError: they are.
        """
        if alone:
            if max(history.suspicions, history.crashes) >= CONFIRMATIONS:
                sentence = "; ".join(dict.fromkeys(history.reasons))
                self._culprits.convict(digest_of(items), sentence)
                raise self._input_error(sentence)
            if history.crashes and history.over:
                self.doubt(items)
        elif history.suspicions:
            raise SuspectError
        elif history.crashes:
            raise SuspectError(crashed=True)

    async def _attempt(
        self, replica: Replica, permit: int, rendering: Rendering, body: bytes, count: int, until: float
    ) -> list[float]:
        """One exchange.

        Raises:
            WorkerRejectedError: a final refusal.
            FailedError: no reward, for any other reason.
        """
        try:
            rewards = await attempt(
                replica,
                permit,
                CLASSIFY_PATH,
                body,
                items=count,
                until=until,
                read=lambda answer: self._read(answer, count),
                probe=lambda: self._probe(replica, rendering),
                model=self._config.name,
            )
        except RefusedError as error:
            raise self._rejection(replica, error.status, error.body) from error
        return self._transformed(rewards)

    def _read(self, body: bytes, count: int) -> list[float]:
        """The rewards in an answer, within the RM's bound.

        Raises:
            AnswerError: see `read_rewards` and `RewardBound.check`.
        """
        rewards = read_rewards(body, count)
        try:
            self._bound.check(rewards)
        finally:
            # The good ones of an answer that is refused, too: they say that the outlier, asked alone, is one.
            self._bound.learn(rewards)
        return rewards

    async def _probe(self, replica: Replica, rendering: Rendering) -> bool:
        """Return True if the replica scores the probe conversation now, on a connection of its own."""
        until = asyncio.get_running_loop().time() + self._config.attempt_timeout_seconds
        try:
            body = encode(rendering, self._config.served_model, [(PROBE_PROMPT, PROBE_RESPONSE)])
            response = await replica.check("POST", CLASSIFY_PATH, body, deadline=until)
            if response.status == 200:
                self._bound.check(read_rewards(response.body, 1))
        except (HttpError, AnswerError, RenderError):
            return False
        return response.status == 200

    def _next(self, history: _History) -> tuple[Replica, int] | None:
        """The replica to ask and its permit, or None.

        A full one is taken only when all are: its connections then queue. One that was tried is taken again only to
        confirm a failure of the input.
        """
        allowed = [replica for replica in self._replicas if replica.breaker.allows]
        candidates = [replica for replica in allowed if replica not in history.tried]
        if history.suspicions and not candidates:
            candidates = [replica for replica in allowed if replica is history.tried[-1]]
        if not candidates or len(history.tried) >= self._config.max_attempts + history.suspicions:
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
        """Whether no other replica could be asked after those tried, so that this attempt may take all the time."""
        if len(tried) >= self._config.max_attempts:
            return True
        return not any(replica.breaker.allows for replica in self._replicas if replica not in tried)

    def _attempt_deadline(self, now: float, deadline: float, *, last: bool) -> float:
        left = deadline - now
        return now + min(self._config.attempt_timeout_seconds, left if last else ATTEMPT_SHARE * left)

    def _transformed(self, rewards: list[float]) -> list[float]:
        scale, shift = self._config.score_scale, self._config.score_shift
        if scale == 1.0 and shift == 0.0:
            return rewards
        return [scale * reward + shift for reward in rewards]

    def _where(self, replica: Replica, reason: str) -> str:
        """A reason as callers may read it: replicas by number, addresses are for the log."""
        count = len(self._replicas)
        return reason if count == 1 else f"replica {self._replicas.index(replica) + 1} of {count}: {reason}"

    def _rejection(self, replica: Replica, status: int, body: bytes) -> WorkerRejectedError:
        words = error_message(body)
        fields = {"model": self._config.name, "url": replica.url, "reason": f"{status} {words}"}
        _log.info("a worker refused an input", extra={"fields": fields})
        message = f"RM {self._config.name!r} refused the input ({status}): {words}"
        details = {"model": self._config.name, "worker_status": status}
        if says_too_long(status, body):
            return WorkerTooLongError(message, details=details, final=self._config.over_long is OverLong.REFUSE)
        return WorkerRejectedError(message, details=details)

    def _input_error(self, sentence: str) -> WorkerInputError:
        return WorkerInputError(
            f"RM {self._config.name!r} fails on this input alone, and answers others: {sentence}",
            details={"model": self._config.name},
        )

    def _no_answer(self, late: bool, history: _History) -> WorkerError:
        name, details = self._config.name, {"model": self._config.name}
        tail = "; ".join(history.reasons)
        if late:
            message = f"RM {name!r}: no answer before the deadline" + (f" ({tail})" if tail else "")
            return WorkerTimeoutError(message, details=details)
        if history.unreadable and history.unreadable == len(history.reasons):
            return WorkerProtocolError(f"RM {name!r}: {tail}", details=details)
        message = f"RM {name!r}: no replica could answer: {tail or 'all are out'}"
        return WorkerUnavailableError(message, details=details, retry_after_seconds=1)

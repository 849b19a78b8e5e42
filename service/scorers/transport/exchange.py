"""One attempt at one replica: send, read, and find out if the replica or the input caused a failure.

    AnswerError           a body that is no answer; what reads bodies raises it
    └── AnswerShapeError      one that no input explains
    FailedError           no usable answer; says whose fault it was, as far as that is known
    RefusedError          a status that another replica would answer too

`service.scorers.requests` decides what follows: another replica, a division of what was asked, or an error of the
input.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from typing import Final, TypeVar

from service.scorers.transport.http import (
    ConnectError,
    ConnectionDroppedError,
    DeadlineError,
    HttpError,
    ResponseTooLargeError,
)
from service.scorers.transport.replica import FAULTY_STATUSES, Replica
from service.scorers.wire import safe_words

RETRIED_STATUSES: Final = frozenset({408, 429, 500, 502, 503, 504})
"""Statuses that another replica may answer differently; what we ask is idempotent. 501 is not one of them."""

ATTEMPT_SHARE: Final = 0.6
"""While another replica remains untried, one attempt takes at most this share of the time left."""

CLOCK_SLACK_SECONDS: Final = 0.002
"""uvloop's clock ticks in milliseconds, so a deadline's timer may fire this much before `loop.time()` reaches it."""

CONFIRMATIONS: Final = 2
"""Failures of an input alone, at replicas that are well or that ended with it, that make it the input's error."""

T = TypeVar("T")

_log = logging.getLogger(__name__)


class AnswerError(Exception):
    """The body does not hold what was asked for; the message says why, without addresses."""


class AnswerShapeError(AnswerError):
    """The answer has another shape than was asked for: no input makes a server do that."""


class FailedError(Exception):
    """One attempt failed.

    Attributes:
        blamed: the replica's breaker knows.
        unreadable: what came was no answer.
        crashed: the replica ended with it.
    """

    def __init__(self, reason: str, *, blamed: bool, unreadable: bool = False, crashed: bool = False) -> None:
        super().__init__(reason)
        self.blamed = blamed
        self.unreadable = unreadable
        self.crashed = crashed


class RefusedError(Exception):
    """The replica refused the request for good; `words` are its own, without what they quote of the request."""

    def __init__(self, status: int, body: bytes, words: str) -> None:
        super().__init__(f"{status} {words}")
        self.status = status
        self.body = body
        self.words = words


async def attempt(
    replica: Replica,
    permit: int,
    path: str,
    body: bytes,
    *,
    items: int,
    until: float,
    read: Callable[[bytes], T],
    probe: Callable[[], Awaitable[bool]],
    model: str,
) -> T:
    """Ask one replica and return what `read` makes of its answer.

    Args:
        replica: who is asked.
        permit: of its breaker.
        path: under its origin.
        body: JSON.
        items: in the body.
        until: absolute `loop.time()`.
        read: raises `AnswerError`.
        probe: returns True if the replica answers what is known to be good; see `Replica.examine`.
        model: for the log.

    Raises:
        FailedError: no usable answer.
        RefusedError: a status outside `RETRIED_STATUSES`.
    """
    number = replica.begin()
    unreadable = dropped = False
    try:
        response = await replica.send(path, body, permit, number, items=items, deadline=until)
    except ConnectError as error:
        raise FailedError(_words(error), blamed=True, crashed=error.dropped) from error
    except DeadlineError as error:
        raise FailedError(_words(error), blamed=not replica.answered_since(number)) from error
    except HttpError as error:
        reason, detail = _words(error), str(error)
        dropped = isinstance(error, ConnectionDroppedError)
        unreadable = not dropped
    else:
        if response.status == 200:
            try:
                answer = read(response.body)
            except AnswerShapeError as error:
                replica.blame(permit, str(error))
                raise FailedError(str(error), blamed=True, unreadable=True) from error
            except AnswerError as error:
                reason = detail = str(error)
                unreadable = True
            else:
                replica.accept(permit, number)
                return answer
        else:
            words = safe_words(response.body, body)
            reason = detail = f"{response.status} {words}"
            if response.status not in RETRIED_STATUSES:
                raise RefusedError(response.status, response.body, words)
            if response.status == 429:
                replica.rest(response.retry_after_seconds)
            if response.status not in FAULTY_STATUSES:
                raise FailedError(reason, blamed=True)
    examination = replica.examine(permit, number, detail, probe)
    try:
        async with asyncio.timeout_at(until):
            well = await asyncio.shield(examination)
    except TimeoutError:
        well = False
    if well:
        fields = {"model": model, "url": replica.url, "reason": detail}
        _log.info("a request failed at a worker that is well", extra={"fields": fields})
    raise FailedError(reason, blamed=not well, unreadable=unreadable, crashed=dropped and not well)


def _words(error: HttpError) -> str:
    """The kind of an error, without addresses."""
    if isinstance(error, ConnectError):
        if error.dropped:
            return "the connection was dropped, and no other can be made"
        return "connection refused" if error.refused else "no connection"
    if isinstance(error, ConnectionDroppedError):
        return "the connection was dropped"
    if isinstance(error, DeadlineError):
        return "no answer in time"
    if isinstance(error, ResponseTooLargeError):
        return "the answer is too long"
    return "the answer is not HTTP"

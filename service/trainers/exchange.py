"""The client without its transport: what to send, when to try again, when to stop, how to read the answer.

Each function is a generator that yields `Send` and `Sleep` and is sent back an `Answer` or a `Broken`; `client` drives
it with a blocking or an asynchronous transport, so that neither is written twice. Knows neither sockets nor threads;
the clock is an argument.

Rules: 429, 502, 503, 504 and broken connections are tried again until the deadline, after `Retry-After` where it was
sent, else after a growing pause with jitter. Everything else is final at once. Trying again is safe: `/feedback` is
idempotent, and a reward that was drawn twice leaves one decision that nobody gives feedback on. A normalised reward
that is null because its model's scale is not known yet is asked for again too, a few times (`SCALE_TRIES`).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from service.trainers.values import (
    INVALID,
    NO_REWARD,
    RETRIED_CODES,
    UNAVAILABLE,
    Declined,
    Feedback,
    FeedbackResult,
    Missing,
    RewardItem,
    RewardResult,
    RouterProtocolError,
    RouterRefusedError,
    RouterUnavailableError,
    Scored,
    accepted_from,
    scored_from,
)

RETRIED_STATUSES = frozenset({429, 502, 503, 504})
"""502 and 504 are those of a proxy in front of the gateway."""

FIRST_PAUSE_SECONDS = 0.1
LONGEST_PAUSE_SECONDS = 5.0

SCALE_TRIES = 7
"""Tries, over about 5 s, for a reward that is null until its model's scale is known: the first of a run that asks for
`normalize`. Others' scores make the scale meanwhile."""


@dataclass(frozen=True, slots=True)
class Send:
    """POST (or GET, without a body) this, and wait for the answer no longer than that.

    Attributes:
        deadline: until when the call goes on trying, by the monotonic clock.
    """

    path: str
    body: bytes | None
    timeout_seconds: float
    deadline: float


@dataclass(frozen=True, slots=True)
class Sleep:
    """Wait."""

    seconds: float


@dataclass(frozen=True, slots=True)
class Answer:
    """An HTTP answer, whatever its status."""

    status: int
    body: bytes
    retry_after: str | None = None


@dataclass(frozen=True, slots=True)
class Broken:
    """There was no answer: refused, dropped or timed out."""

    reason: str


T = TypeVar("T")
Exchange = Generator[Send | Sleep, Answer | Broken | None, T]


@dataclass(frozen=True, slots=True)
class Patience:
    """How long to try.

    Args:
        deadline: by the clock, in seconds.
        attempt_seconds: longest wait for one answer.
        clock: monotonic seconds.
        jitter: a number in [0, 1) per call.
    """

    deadline: float
    attempt_seconds: float
    clock: Callable[[], float]
    jitter: Callable[[], float]

    @property
    def left(self) -> float:
        """Seconds until the deadline."""
        return self.deadline - self.clock()

    def pause(self, attempt: int, retry_after: str | None = None) -> float:
        """Seconds before the next try: as the server asked, else doubling from 0.1 s to 5 s, each times 0.5 to 1."""
        asked = _seconds(retry_after)
        if asked is not None:
            return asked
        return min(LONGEST_PAUSE_SECONDS, FIRST_PAUSE_SECONDS * 2.0 ** min(attempt, 10)) * (0.5 + self.jitter() / 2)


@dataclass(frozen=True, slots=True)
class Words:
    """What a client says with every call: run, policy and the like; None is not sent."""

    fields: Mapping[str, Any]

    def around(self, items: list[dict[str, Any]]) -> dict[str, Any]:
        """The body of a batch."""
        return {"items": items, **{name: value for name, value in self.fields.items() if value is not None}}


def call(path: str, document: object | None, patience: Patience) -> Exchange[Any]:
    """One call until it is answered for good; returns the parsed answer.

    Args:
        path: with the query if any.
        document: the JSON body; None for GET.
        patience: how long.

    Raises:
        RouterUnavailableError: the deadline was reached; says what came last.
        RouterRefusedError: a final refusal.
        RouterProtocolError: a 200 that is not JSON.
    """
    body = None if document is None else json.dumps(document, allow_nan=False).encode()
    attempt, reason = 0, "the deadline was over before the first try"
    while patience.left > 0:
        answer = yield Send(path, body, min(patience.attempt_seconds, patience.left), patience.deadline)
        assert answer is not None
        failure = why_again(answer)
        if failure is None:
            assert isinstance(answer, Answer)
            return _read(answer)
        reason = failure
        pause = patience.pause(attempt, answer.retry_after if isinstance(answer, Answer) else None)
        attempt += 1
        if pause >= patience.left:
            break
        yield Sleep(pause)
    raise RouterUnavailableError(
        f"{path} gave nothing after {attempt} tries; the last: {reason}. Is the gateway running and reachable "
        "(GET /readyz)? A longer deadline waits for it"
    )


def why_again(answer: Answer | Broken) -> str | None:
    """Return why the same must be tried again; None for an answer that is final."""
    if isinstance(answer, Broken):
        return answer.reason
    return _describe(answer) if answer.status in RETRIED_STATUSES else None


def reward_single(document: Mapping[str, Any], patience: Patience) -> Exchange[Scored]:
    """One `/reward`, and as many more as it takes until its model's scale is known.

    Raises:
        RouterUnavailableError, RouterRefusedError, RouterProtocolError: as `call`.
    """
    attempt = 0
    while True:
        scored = scored_from((yield from call("/reward", document, patience)))
        pause = patience.pause(attempt)
        attempt += 1
        if not _unscaled(scored, attempt) or pause >= patience.left:
            return scored
        yield Sleep(pause)


def reward_chunk(items: Sequence[RewardItem], words: Words, patience: Patience) -> Exchange[list[RewardResult]]:
    """One `/reward/batch` and as many more as it takes for the items that may be tried again.

    Returns:
        One result per item, in order; `Missing` for those that got no reward before the deadline.

    Raises:
        RouterRefusedError: the whole batch was refused (a wrong key, run or policy).
    """
    results: list[RewardResult] = [Missing("deadline_exceeded", "the deadline was over before the first try")] * len(
        items
    )
    try:
        yield from _settle("/reward/batch", items, words, patience, results, _reward_result)
    except RouterUnavailableError as error:
        return [Missing(UNAVAILABLE, str(error)) if _may_change(result) else result for result in results]
    return results


def feedback_chunk(items: Sequence[Feedback], words: Words, patience: Patience) -> Exchange[list[FeedbackResult]]:
    """One `/feedback/batch` and as many more as it takes for the items that may be tried again.

    Returns:
        One result per item, in order.

    Raises:
        RouterUnavailableError: nothing of it was acknowledged before the deadline.
        RouterRefusedError: the whole batch was refused.
    """
    results: list[FeedbackResult] = [Declined("deadline_exceeded", "not sent")] * len(items)
    try:
        yield from _settle("/feedback/batch", items, words, patience, results, _feedback_result)
    except RouterUnavailableError:
        if all(map(_may_change, results)):
            raise
    return results


def chunks(items: Sequence[T], sizes: Sequence[int], max_items: int, max_bytes: int) -> list[list[T]]:
    """The items in order, in as few lists as the two bounds allow; an item over `max_bytes` is a list of its own.

    >>> chunks("abcd", [1, 1, 5, 1], 3, 4)
    [['a', 'b'], ['c'], ['d']]
    """
    lists: list[list[T]] = []
    held = 0
    for item, size in zip(items, sizes, strict=True):
        if not lists or len(lists[-1]) >= max_items or held + size > max_bytes:
            lists.append([])
            held = 0
        lists[-1].append(item)
        held += size
    return lists


def _settle(
    path: str,
    items: Sequence[RewardItem | Feedback],
    words: Words,
    patience: Patience,
    results: list[Any],
    read: Callable[[Any], Any],
) -> Exchange[None]:
    """Put each item's result into `results`, and ask again for those that may change, until none is left or it is late.

    An item that cannot be written as the API takes it is not sent; its result says why.

    Raises:
        RouterUnavailableError, RouterRefusedError: as `_batch`; `results` holds what came before.
    """
    documents: dict[int, dict[str, Any]] = {}
    for index, item in enumerate(items):
        try:
            documents[index] = item.document()
        except ValueError as error:
            results[index] = read({"error": {"code": INVALID, "message": str(error)}})
    waiting, attempt = list(documents), 0
    while waiting:
        answers = yield from _batch(path, [documents[i] for i in waiting], words, patience)
        for index, answer in zip(waiting, answers, strict=True):
            results[index] = read(answer)
        pause = patience.pause(attempt)
        attempt += 1
        waiting = [i for i in waiting if _may_change(results[i]) or _unscaled(results[i], attempt)]
        if not waiting or pause >= patience.left:
            return
        yield Sleep(pause)


def _may_change(result: RewardResult | FeedbackResult) -> bool:
    """Return True if asking again may give another result."""
    return isinstance(result, Missing | Declined) and result.code in RETRIED_CODES


def _unscaled(result: RewardResult | FeedbackResult, attempts: int) -> bool:
    """Return True if a reward is null because its model's scale is not known, and few attempts were made."""
    if attempts >= SCALE_TRIES:
        return False
    if isinstance(result, Missing):
        return result.code == NO_REWARD
    return isinstance(result, Scored) and NO_REWARD in (result.extra.get("failure") or ())


def _batch(path: str, items: list[dict[str, Any]], words: Words, patience: Patience) -> Exchange[list[Any]]:
    """The results of one batch; one that is too large for the gateway is halved."""
    try:
        document = yield from call(path, words.around(items), patience)
    except RouterRefusedError as error:
        if error.status == 413 and len(items) == 1:
            return [{"error": {"code": error.code, "message": error.message}}]
        if len(items) == 1 or not (error.status == 413 or error.details.get("field") == "items"):
            raise
        half = len(items) // 2
        first = yield from _batch(path, items[:half], words, patience)
        second = yield from _batch(path, items[half:], words, patience)
        return first + second
    results = document.get("results") if isinstance(document, dict) else None
    if not isinstance(results, list) or len(results) != len(items):
        raise RouterProtocolError(f"{path} did not answer one result per item: is the URL that of a reward router?")
    return results


def _reward_result(answer: Any) -> RewardResult:
    code, message = _item_error(answer)
    return scored_from(answer) if code is None else Missing(code, message)


def _feedback_result(answer: Any) -> FeedbackResult:
    code, message = _item_error(answer)
    return accepted_from(answer) if code is None else Declined(code, message)


def _item_error(answer: Any) -> tuple[str | None, str]:
    if not isinstance(answer, dict):
        raise RouterProtocolError(f"a result is {type(answer).__name__}, not an object")
    error = answer.get("error")
    if error is None:
        return None, ""
    return str(error.get("code", "")), str(error.get("message", ""))


def _read(answer: Answer) -> Any:
    try:
        document = json.loads(answer.body)
    except (ValueError, RecursionError) as broken:
        if answer.status < 400:
            raise RouterProtocolError(f"the answer is not JSON ({broken}): is the URL that of a gateway?") from broken
        raise RouterRefusedError(answer.status, "", _describe(answer)) from broken
    if answer.status < 400:
        return document
    error = document.get("error") if isinstance(document, dict) else None
    if not isinstance(error, dict):
        raise RouterRefusedError(answer.status, "", _describe(answer))
    raise RouterRefusedError(
        answer.status, str(error.get("code", "")), str(error.get("message", "")), error.get("details")
    )


def _describe(answer: Answer) -> str:
    return f"HTTP {answer.status} {answer.body[:300].decode('utf-8', 'replace')}"


def _seconds(retry_after: str | None) -> float | None:
    """`Retry-After` in seconds, a minute at most; its other form, a date, is not what the gateway sends."""
    return min(float(retry_after), 60.0) if retry_after is not None and retry_after.isdecimal() else None

"""What every store checks in the same way: a decision's `n`, a feedback's reference, the age of an id.

Knows the values of `service.stores.protocol` and no server. Called by the stores.
"""

from __future__ import annotations

import time

import msgspec

from service.stores.ids import created_ms
from service.stores.protocol import DecisionRecord, FeedbackRecord


def system_ms() -> int:
    """The default clock of a store: milliseconds since 1970."""
    return time.time_ns() // 1_000_000


class _Counted(msgspec.Struct):
    """The only field of a decision's payload that a store reads."""

    n: int


_COUNTED = msgspec.msgpack.Decoder(_Counted)


def response_count(decision: DecisionRecord) -> int:
    """`n` of the decision's payload.

    Raises:
        ValueError: the payload is not a msgpack map with an integer `n` >= 1.
    """
    try:
        n = _COUNTED.decode(decision.payload).n
    except msgspec.DecodeError as error:
        raise ValueError(f"payload of decision {decision.decision_id} is no msgpack map with n: {error}") from error
    if n < 1:
        raise ValueError(f"payload of decision {decision.decision_id} says n = {n}; a decision has at least 1 response")
    return n


def check_reference(item: FeedbackRecord) -> None:
    """Exactly one of the two references must be given.

    Raises:
        ValueError: none or both.
    """
    if (item.decision_id is None) == (item.content_key is None):
        raise ValueError("a FeedbackRecord needs exactly one of decision_id and content_key")


def is_expired(decision_id: str | None, now_ms: int, window_ms: int) -> bool:
    """Return True if an id whose decision is gone was made by us more than a window ago (else it was never ours)."""
    made = None if decision_id is None else created_ms(decision_id)
    return made is not None and now_ms - made >= window_ms

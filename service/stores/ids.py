"""Names in the store: decision ids that carry their creation time, and what a run may be called.

Knows nothing of a server. Time and randomness arrive as arguments. Called by the score use case (new ids) and by the
stores (was this id ever ours, and how long ago?).
"""

from __future__ import annotations

import re

from service.errors import ValidationError

RANDOM_BYTES = 10
"""Random bytes in a decision id: 80 bits, so that ids of one millisecond collide once in 2^40 decisions."""

RUN_PATTERN = r"^[A-Za-z0-9._-]{1,64}$"
"""What a run may be called. It is part of every key: braces would end the hash tag that keeps a run on one node."""

_ALPHABET = "0123456789abcdefghijklmnopqrstuv"
_PAIRS = [high + low for high in _ALPHABET for low in _ALPHABET]
_ID = re.compile(r"d[0-9a-v]{26}")
_RUN = re.compile(RUN_PATTERN)
_MAX_MS = 1 << 48


def new_decision_id(now_ms: int, rng_bytes: bytes) -> str:
    """The letter "d" and 128 bits in base32hex (RFC 4648, lower case): 48 bits of time, then 80 random bits.

    Ids of different milliseconds sort by time, as text and as bytes.

    Args:
        now_ms: creation time, milliseconds since 1970, in [0, 2^48).
        rng_bytes: `RANDOM_BYTES` bytes from a source that callers cannot guess.

    Raises:
        ValueError: time or number of bytes out of range.

    >>> new_decision_id(1, bytes(10))
    'd00000000040000000000000000'
    """
    if not 0 <= now_ms < _MAX_MS:
        raise ValueError(f"now_ms = {now_ms} is outside [0, 2^48); give milliseconds since 1970")
    if len(rng_bytes) != RANDOM_BYTES:
        raise ValueError(f"rng_bytes holds {len(rng_bytes)} bytes; give {RANDOM_BYTES}")
    # 26 digits of 5 bits are 130 bits: two zero bits fill the last digit.
    bits = (now_ms << 80 | int.from_bytes(rng_bytes, "big")) << 2
    return "d" + "".join([_PAIRS[bits >> shift & 1023] for shift in range(120, -10, -10)])


def created_ms(decision_id: str) -> int | None:
    """Creation time of a decision id, milliseconds since 1970; None for what `new_decision_id` cannot have made.

    >>> created_ms(new_decision_id(1_700_000_000_000, bytes(10)))
    1700000000000
    >>> created_ms("abc") is None
    True
    """
    if _ID.fullmatch(decision_id) is None:
        return None
    # The first ten digits hold the 48 bits of time and two random ones.
    return int(decision_id[1:11], 32) >> 2


def event_order(event_id: str) -> tuple[int, int]:
    """The id of an event as numbers (milliseconds, sequence), which compare in the order of the log.

    >>> event_order("12-3") < event_order("12-10")
    True
    """
    milliseconds, _, sequence = event_id.partition("-")
    return int(milliseconds), int(sequence or 0)


def check_run(run: str) -> str:
    """Return the run's name if it can be one.

    Raises:
        ValidationError: it does not match `RUN_PATTERN`.
    """
    if _RUN.fullmatch(run) is None:
        raise ValidationError(
            f"run is {run[:200]!r}: use 1 to 64 letters, digits, '.', '_' and '-'", details={"field": "run"}
        )
    return run

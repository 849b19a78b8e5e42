"""Inputs that a scorer has failed on lately, so that they are neither searched for again nor end worker after worker.

Keys are digests of what was sent. `service.scorers.requests` keeps one per scorer.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

import msgspec

REMEMBERED_SECONDS: Final = 120.0
"""How long an input is remembered after its last failure: a caller's repetitions come within seconds, and a worker may
be mended."""

REMEMBERED_INPUTS: Final = 4096
"""Inputs that are remembered at most, the latest ones: 1 MB."""


def digest_of(content: Any) -> bytes:
    """Return the key of something that is sent: a body, texts, token ids, or what is made of them."""
    return hashlib.blake2b(msgspec.msgpack.encode(content), digest_size=16).digest()


@dataclass(slots=True)
class _Note:
    until: float
    sentence: str | None


class Culprits:
    """What is remembered of one scorer. Not thread-safe.

    Args:
        clock: monotonic seconds.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._notes: OrderedDict[bytes, _Note] = OrderedDict()

    def __bool__(self) -> bool:
        """Return True if something may be remembered; otherwise no digest is needed."""
        return bool(self._notes)

    def sentence(self, key: bytes) -> str | None:
        """Return what the scorer failed with on this input alone; None for an input that is not known for that."""
        note = self._current(key)
        return None if note is None else note.sentence

    def doubted(self, key: bytes) -> bool:
        """Return True if a worker ended while it had this input, among others perhaps."""
        note = self._current(key)
        return note is not None and note.sentence is None

    def doubt(self, key: bytes) -> None:
        """Note that a worker ended while it had this input."""
        if self.sentence(key) is None:
            self._keep(key, None)

    def convict(self, key: bytes, sentence: str) -> None:
        """Note that the scorer fails on this input alone."""
        self._keep(key, sentence)

    def clear(self, key: bytes) -> None:
        """Forget an input: the scorer has answered it."""
        self._notes.pop(key, None)

    def _current(self, key: bytes) -> _Note | None:
        note = self._notes.get(key)
        if note is not None and self._clock() >= note.until:
            del self._notes[key]
            return None
        return note

    def _keep(self, key: bytes, sentence: str | None) -> None:
        now = self._clock()
        self._notes.pop(key, None)
        self._notes[key] = _Note(now + REMEMBERED_SECONDS, sentence)
        while self._notes:
            oldest = next(iter(self._notes.values()))
            if len(self._notes) <= REMEMBERED_INPUTS and now < oldest.until:
                break
            self._notes.popitem(last=False)

"""Acts of operators in a run's log: which there are, and what they say. Knows no store.

An act is an entry of the log whose value begins with `admin:`. A change of the pool is one, and whatever is done with
the whole run: archive, export, import. Each has a place in the log and teaches nothing; `service.usecases.follow` folds
it, exports and reports pass over it. Deleting a run leaves its act beside the runs, since the log goes too.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

import msgspec

from service.stores.protocol import LogEntry

PREFIX = b"admin:"

POOL = PREFIX + b"pool"
"""The pool was changed: the payload is a `service.specification.Specification`."""

ARCHIVE = PREFIX + b"archive"
UNARCHIVE = PREFIX + b"unarchive"
EXPORT = PREFIX + b"export"
IMPORT = PREFIX + b"import"
DELETE = PREFIX + b"delete"


class Note(msgspec.Struct, omit_defaults=True):
    """The payload of the other acts.

    Attributes:
        time_ms: Unix time in milliseconds.
        by: who did it, as far as that is known.
        about: a name: of a file, or of another run.
    """

    time_ms: int
    by: str = ""
    about: str = ""


class _Made(msgspec.Struct):
    """The part of a changed pool that says who changed it."""

    by: str = ""


def is_act(entry: LogEntry) -> bool:
    """Return True if an entry of a log is an act of an operator, and no feedback or audit."""
    return entry.value.startswith(PREFIX)


def is_archived(acts: Sequence[LogEntry]) -> bool:
    """Return True if the run was archived, and not taken back since."""
    said = [entry.value for entry in acts if entry.value in (ARCHIVE, UNARCHIVE)]
    return bool(said) and said[-1] == ARCHIVE


def note(by: str = "", about: str = "") -> bytes:
    """Return the payload of an act that happens now."""
    return msgspec.msgpack.encode(Note(time.time_ns() // 1_000_000, by, about))


def read_note(entry: LogEntry) -> Note:
    """Return what an act says; for a change of the pool the time of its entry."""
    if entry.value == POOL:
        return Note(int(entry.event_id.partition("-")[0]), msgspec.msgpack.decode(entry.payload, type=_Made).by)
    return msgspec.msgpack.decode(entry.payload, type=Note)

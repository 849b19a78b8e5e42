"""Events as JSON Lines: one header line, then one object per event. For people, jq, and where pyarrow is not installed.

Infinity has no number in JSON: a mean of −∞ (an arm that the policy never asks) is null. Called by `export` and `load`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any, BinaryIO

import msgspec
import numpy as np

from router_core.files import numbered_lines
from service.errors import ConfigurationError
from service.lab.eventlog.record import Header, LoggedEvent, event_of_row, model_of
from service.usecases.decisions import StoredDecision

HEADER_KEY = "reward_router"
"""The only key of the first line."""

_UNREADABLE = (msgspec.DecodeError, KeyError, TypeError, ValueError, OverflowError, RecursionError)


class JsonlWriter:
    """Writes one file, from its first byte to its last.

    Args:
        file: open for writing; the caller closes it.
        header: its first line.
    """

    def __init__(self, file: BinaryIO, header: Header) -> None:
        self._file = file
        self._header = header
        self._file.write(b'{"%b": %b}\n' % (HEADER_KEY.encode(), header.to_json().encode()))

    def write(self, events: Sequence[LoggedEvent]) -> None:
        """Append events."""
        for event in events:
            self._file.write(msgspec.json.encode(_row(event, self._header)) + b"\n")

    def close(self) -> None:
        """Nothing is left to be written."""


def read_jsonl_header(path: Path) -> Header:
    """The first line.

    Raises:
        ConfigurationError: it is no header.
    """
    with closing(numbered_lines(path)) as lines:
        try:
            header = msgspec.json.decode(next(lines, (1, b""))[1])[HEADER_KEY]
        except _UNREADABLE as error:
            raise ConfigurationError(f"{path} is no event log of reward-router: its first line is no header") from error
    return Header.from_json(msgspec.json.encode(header), path)


def read_jsonl(path: Path) -> Iterator[LoggedEvent]:
    """Every event, one by one.

    Raises:
        ConfigurationError: a line that is no event.
    """
    with closing(numbered_lines(path)) as lines:
        next(lines, None)
        for number, line in lines:
            try:
                yield _event(msgspec.json.decode(line))
            except _UNREADABLE as error:
                raise ConfigurationError(f"{path} line {number} is no event ({error!r}): export again") from error


def _row(event: LoggedEvent, header: Header) -> dict[str, Any]:
    decision = event.decision
    row: dict[str, Any] = {
        "event_id": event.event_id,
        "decision_id": event.decision_id,
        "feedback_time_ms": event.feedback_time_ms,
        "run": header.run,
        "model": model_of(header.pool, decision.arm),
        **{name: getattr(decision, name) for name in StoredDecision.__struct_fields__},
    }
    row["x"] = np.frombuffer(decision.x, "<f4").tolist()
    row["means"] = [mean if math.isfinite(mean) else None for mean in decision.means]
    row["attempts"] = [attempt._asdict() for attempt in decision.attempts]
    row["shadows"] = None if decision.shadows is None else [attempt._asdict() for attempt in decision.shadows]
    row["learned"] = [{"arm": arm, "reward": reward} for arm, reward in event.learned]
    row["audit"] = None if decision.audit is None else msgspec.structs.asdict(decision.audit)
    row.update(source=event.source.value, after_gold=event.after_gold)
    row.update(signal=event.feedback.signal.value, value=event.feedback.value, reward=event.reward)
    return row


def _event(row: dict[str, Any]) -> LoggedEvent:
    x = np.array(row["x"], "<f4").tobytes()
    return event_of_row({**row, "means": [-math.inf if mean is None else mean for mean in row["means"]]}, x)

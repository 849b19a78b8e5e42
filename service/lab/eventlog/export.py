"""Fill a file from a run's log in a store: in chunks, to a temporary file, renamed when it is complete.

Knows the Store protocol, not its classes; asks it for nothing that changes it. Called by the command `export`.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO, Protocol

from router_core.files import data_suffix
from router_core.records import Signal
from service.errors import ConfigurationError, NotFoundError
from service.lab.eventlog.jsonl import JsonlWriter, read_jsonl, read_jsonl_header
from service.lab.eventlog.record import Header, LoggedEvent, RewardFollower, new_header, require_same_run
from service.stores.acts import is_act
from service.stores.protocol import LogEntry, LogStatus, Store
from service.usecases.runs import known_runs

CHUNK = 4096
"""Events in memory at once, and rows per row group."""

FIRST = "0-0"
"""The id before every event's."""


class EventWriter(Protocol):
    """A file being written."""

    def write(self, events: list[LoggedEvent]) -> None:
        """Append events."""

    def close(self) -> None:
        """Write what a reader needs at the end."""


@dataclass(frozen=True, slots=True)
class Exported:
    """What an export did.

    Attributes:
        header: of the file.
        events: rows of the file.
        added: rows of them that this call read from the store.
        last_event: id of the last row; None for an empty file.
    """

    header: Header
    events: int
    added: int
    last_event: str | None


async def export_log(
    store: Store,
    run: str,
    out: Path,
    *,
    since: str | None = None,
    resume: bool = False,
    on_events: Callable[[int], None] | None = None,
) -> Exported:
    """Write the run's log, as it stands when this is called, to a file: Parquet, or JSON Lines where it ends in .jsonl.

    Args:
        store: where the log is.
        run: whose log.
        out: replaced when the new file is complete, and not before.
        since: only events after this id.
        resume: keep the rows of `out`, if it exists, and add what came after them.
        on_events: told how many more events were read; for progress bars.

    Raises:
        NotFoundError: no such run.
        ConfigurationError: `out` is of another run, or cannot be written; events were trimmed before they were read.
        StoreUnavailableError: the store does not answer; `out` is as it was.
    """
    if since is not None:
        _order(since)
    check = await store.check_run(run, ())
    if check.identity is None:
        known = known_runs(await store.list_runs())
        raise NotFoundError(
            f"run {run!r} is unknown in this store ({known}): check the name, --store and --data-dir",
            details={"run": run},
        )
    fingerprint, status = check.identity.fingerprint, check.status
    old = _standing_header(out) if resume else None
    acts = await store.acts(run)
    header = _header(run, fingerprint, status, since, old, acts)
    if old is not None:
        require_same_run(old, header, out)
    follower = RewardFollower(header)
    with _replacing(out) as file, closing(open_writer(out, file, header)) as writer:
        kept, last = _keep(out, writer, follower) if old is not None else (0, None)
        last_kept = last
        after = last or (since if since is not None and header.signal is not Signal.LOSS else FIRST)
        added, read = 0, 0
        async for entries in _chunks(store, run, after, status.last_id):
            events = [follower.event(entry) for entry in entries if not is_act(entry)]
            wanted = events if since is None else [e for e in events if _order(e.event_id) > _order(since)]
            writer.write(wanted)
            read, added = read + len(entries), added + len(wanted)
            last = wanted[-1].event_id if wanted else last
            if on_events is not None:
                on_events(len(events))
        # Acts teach nothing and are no rows; those before the last row were read by the export that wrote it.
        passed = [act for act in acts if last_kept is not None and _order(act.event_id) < _order(last_kept)]
        if not passed or header.first_position == 0:
            _check_complete(run, header, status, kept + len(passed), read)
    return Exported(header, kept + added, added, last)


def read_header(path: Path) -> Header:
    """What a file of events says about itself.

    Raises:
        ConfigurationError: it is none.
    """
    if _is_jsonl(path):
        return read_jsonl_header(path)
    header: Header = _parquet().read_parquet_header(path)
    return header


def read_events(path: Path) -> Iterable[LoggedEvent]:
    """Every event of a file, one by one.

    Raises:
        ConfigurationError: it is no file of events.
    """
    if _is_jsonl(path):
        return read_jsonl(path)
    events: Iterable[LoggedEvent] = _parquet().read_parquet(path)
    return events


def open_writer(out: Path, file: BinaryIO, header: Header) -> EventWriter:
    """The writer that the file's name asks for.

    Raises:
        ConfigurationError: Parquet without pyarrow, or a compressed file.
    """
    if data_suffix(out) != out.suffix.lower():
        raise ConfigurationError(f"--out {out}: events are written plain; leave out {out.suffix}, compress it later")
    if _is_jsonl(out):
        return JsonlWriter(file, header)
    writer: EventWriter = _parquet().ParquetWriter(file, header)
    return writer


def _parquet() -> Any:
    """The module that needs pyarrow, loaded when a Parquet file is named.

    Raises:
        ConfigurationError: pyarrow is not installed.
    """
    try:
        return importlib.import_module("service.lab.eventlog.parquet")
    except ImportError as error:
        raise ConfigurationError(
            f"Parquet needs pyarrow ({error}): pip install 'reward-router[export]', or give a file that ends in .jsonl"
        ) from error


def _standing_header(out: Path) -> Header | None:
    return read_header(out) if out.exists() else None


def _header(
    run: str,
    fingerprint: bytes,
    status: LogStatus,
    since: str | None,
    old: Header | None,
    acts: Sequence[LogEntry],
) -> Header:
    if old is not None:
        new = new_header(run, fingerprint, old.first_position, from_first_event=old.first_position == 0, acts=acts)
        return replace(new, exact_rewards=old.exact_rewards)
    position = status.trimmed if since is None else None
    return new_header(run, fingerprint, position, from_first_event=status.trimmed == 0, acts=acts)


def _keep(out: Path, writer: EventWriter, follower: RewardFollower) -> tuple[int, str | None]:
    """Copy the rows of the file that is there, and let the statistics pass over them; how many, and the last id."""
    kept, last = 0, None
    chunk: list[LoggedEvent] = []
    for event in read_events(out):
        follower.learned(event.decision_id, event.decision, event.told)
        chunk.append(event)
        kept, last = kept + 1, event.event_id
        if len(chunk) == CHUNK:
            writer.write(chunk)
            chunk = []
    writer.write(chunk)
    return kept, last


async def _chunks(store: Store, run: str, after: str, last: str) -> AsyncIterator[list[LogEntry]]:
    """The log from `after` to `last`: what is appended meanwhile is for the next export."""
    while _order(after) < _order(last):
        entries = await store.read_log(run, after, count=CHUNK, block_ms=0)
        if not entries:
            return
        after = entries[-1].event_id
        yield [entry for entry in entries if _order(entry.event_id) <= _order(last)]


def _check_complete(run: str, header: Header, status: LogStatus, kept: int, read: int) -> None:
    """Raises ConfigurationError where the file would have a hole, because the log was trimmed."""
    if header.first_position is None:
        return
    missing = status.appended - header.first_position - kept - read
    if missing > 0:
        raise ConfigurationError(
            f"{missing} events of run {run!r} were trimmed before they could be read: export to a new file, and more "
            "often than the gateway trims (log_keep_events)"
        )


@contextmanager
def _replacing(out: Path) -> Iterator[BinaryIO]:
    """A file beside `out` that takes its name when all went well, and is removed otherwise."""
    part = out.with_name(f".{out.name}.{os.getpid()}.part")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        file = part.open("wb")
    except OSError as error:
        raise ConfigurationError(f"{out} cannot be written ({error.strerror}): check path and space") from error
    try:
        with file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        part.replace(out)
    finally:
        part.unlink(missing_ok=True)


def _is_jsonl(path: Path) -> bool:
    return data_suffix(path) == ".jsonl"


def _order(event_id: str) -> tuple[int, int]:
    """Ids of the log as numbers, in the order of the log.

    Raises:
        ConfigurationError: it is no id.
    """
    milliseconds, _, sequence = event_id.partition("-")
    if not (milliseconds.isdigit() and (sequence or "0").isdigit()):
        raise ConfigurationError(f"event id is {event_id!r}: give one as `export` prints it, like 1700000000000-0")
    return int(milliseconds), int(sequence or 0)

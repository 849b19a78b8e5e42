"""A whole run as a file: its log, snapshot and acts, to be kept or brought into another store.

The file is msgpack in gzip: one header, then one record per entry. It holds what learning needs: decisions that still
wait for feedback, audits that wait for a referee, and the score log stay where they are. Knows the Store protocol.
Called by the command `runs`.
"""

from __future__ import annotations

import gzip
import os
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec

from service.errors import ConfigurationError, ConflictError, NotFoundError
from service.stores.ids import event_order
from service.stores.protocol import LogEntry, LogStatus, RunIdentity, Store
from service.usecases.runs import known_runs

FORMAT = "reward-router-run/1"

CHUNK = 4096
"""Entries read and written at once."""


class RunHeader(msgspec.Struct):
    """What a file says of its run.

    Attributes:
        format: `FORMAT`.
        run: its name.
        fingerprint: as its store kept it.
        appended, trimmed, last_id: of its log; the file ends there.
        position, snapshot: the newest snapshot; 0 and nothing where there was none.
        acts: of operators: event id, name, payload, value.
    """

    format: str
    run: str
    fingerprint: bytes
    appended: int
    trimmed: int
    last_id: str
    position: int
    snapshot: bytes
    acts: list[tuple[str, str, bytes, bytes]]


_ENCODER = msgspec.msgpack.Encoder()
_HEADER = msgspec.msgpack.Decoder(RunHeader)
_ENTRY = msgspec.msgpack.Decoder(tuple[str, str, bytes, bytes])


async def known(store: Store, run: str) -> tuple[RunIdentity, LogStatus]:
    """Return a run's identity and the status of its log.

    Raises:
        NotFoundError: the store holds nothing of it.
    """
    check = await store.check_run(run, ())
    if check.identity is None:
        raise NotFoundError(f"run {run!r} is unknown in this store ({known_runs(await store.list_runs())})")
    return check.identity, check.status


async def write_run(store: Store, run: str, out: Path) -> int:
    """Write a run to a file, as its log stands when this is called; return how many entries it holds.

    Raises:
        NotFoundError: no such run.
        ConfigurationError: the file cannot be written, or the log was trimmed before it was read.
    """
    identity, status = await known(store, run)
    acts = [act for act in await store.acts(run) if event_order(act.event_id) <= event_order(status.last_id)]
    snapshot = await store.load_snapshot(run)
    position = 0 if snapshot is None else _position_of(snapshot)
    header = RunHeader(
        FORMAT, run, identity.fingerprint, status.appended, status.trimmed, status.last_id, position,
        snapshot or b"", [(act.event_id, act.decision_id, act.payload, act.value) for act in acts],
    )  # fmt: skip
    part, count, after = out.with_name(f".{out.name}.{os.getpid()}.part"), 0, "0-0"
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with gzip.open(part, "wb", compresslevel=3) as file:
            _put(file, _ENCODER.encode(header))
            while event_order(after) < event_order(status.last_id):
                entries = await store.read_log(run, after, count=CHUNK, block_ms=0)
                for entry in entries:
                    if event_order(entry.event_id) <= event_order(status.last_id):
                        _put(file, _ENCODER.encode((entry.event_id, entry.decision_id, entry.payload, entry.value)))
                        count += 1
                if not entries:
                    break
                after = entries[-1].event_id
        if count != status.appended - status.trimmed:
            raise ConfigurationError(f"the log of run {run!r} was trimmed while it was read: export again")
        part.replace(out)
    except OSError as error:
        raise ConfigurationError(f"{out} cannot be written ({error.strerror}): check path and space") from error
    finally:
        part.unlink(missing_ok=True)
    return count


def read_header(path: Path) -> RunHeader:
    """Return what a file says of its run.

    Raises:
        ConfigurationError: it is none.
    """
    return _header(next(_records(path), b""), path)


async def read_run(store: Store, path: Path, name: str | None = None) -> tuple[str, int]:
    """Bring the run of a file into a store; return its name there and how many entries it has.

    Args:
        store: where it goes.
        path: the file.
        name: of the run there; None: the same.

    Raises:
        ConfigurationError: the file is none, or was cut off.
        ConflictError: the name is taken.
    """
    records = _records(path)
    header = _header(next(records, b""), path)
    run = name or header.run
    if await store.has_run(run):
        raise ConflictError(f"run {run!r} is in this store: import it under another name (--as)")
    # What an import left that was broken off.
    await store.drop_run(run)
    count = 0
    chunk: list[LogEntry] = []
    for record in records:
        chunk.append(LogEntry(*_entry(record, path)))
        count += 1
        if len(chunk) == CHUNK:
            await store.write_entries(run, chunk)
            chunk = []
    if count != header.appended - header.trimmed:
        raise ConfigurationError(f"{path} was cut off: it holds {count} of {header.appended - header.trimmed} entries")
    await store.write_entries(run, chunk)
    await store.write_entries(run, [LogEntry(*act) for act in header.acts], acts=True)
    status = LogStatus(header.appended, header.last_id, header.trimmed)
    await store.finish_run(
        run, header.fingerprint, status, (header.position, header.snapshot) if header.snapshot else None
    )
    return run, count


def _position_of(snapshot: bytes) -> int:
    """Return how many events a snapshot holds."""
    length = int.from_bytes(snapshot[:8], "little")
    document: Any = msgspec.json.decode(snapshot[8 : 8 + length])
    header: Any = msgspec.json.decode(document["__metadata__"]["reward_router"])
    return int(header["position"])


def _put(file: Any, record: bytes) -> None:
    file.write(len(record).to_bytes(8, "little") + record)


def _records(path: Path) -> Iterator[bytes]:
    try:
        with gzip.open(path, "rb") as file:
            while head := file.read(8):
                length = int.from_bytes(head, "little")
                record = file.read(length)
                if len(record) != length:
                    raise ConfigurationError(f"{path} was cut off: export again")
                yield record
    except (OSError, EOFError, zlib.error) as error:
        raise ConfigurationError(f"{path} is no run of reward-router: {error}") from error


def _header(record: bytes, path: Path) -> RunHeader:
    try:
        header = _HEADER.decode(record)
    except msgspec.DecodeError as error:
        raise ConfigurationError(f"{path} is no run of reward-router: {error}") from error
    if header.format != FORMAT:
        raise ConfigurationError(f"{path} has the format {header.format!r}, this version reads {FORMAT!r}")
    return header


def _entry(record: bytes, path: Path) -> tuple[str, str, bytes, bytes]:
    try:
        return _ENTRY.decode(record)
    except msgspec.DecodeError as error:
        raise ConfigurationError(f"{path} holds an entry that cannot be read: {error}") from error

"""What the RMs have answered so far, on disk before it counts: an append-only file of one line an answer.

Knows files and answers; nothing of RMs or rows' formats. The command `label` holds one while it runs: a run that is
interrupted, or killed, loses what was in flight and nothing else. An answer is kept under the content that was asked
about, not under a row's id: a row whose text has changed is asked again, two rows of equal text are asked about once.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Final, Self

import msgspec

from router_core.records import Instance
from service.errors import ConfigurationError

SYNC_SECONDS: Final = 1.0
"""A power cut loses at most the answers of this time; a crash of the program alone loses none."""


class Answer(msgspec.Struct, frozen=True, omit_defaults=True):
    """What one RM said of one content: its scores, or the reason why it has none."""

    content: str
    model: str
    scores: tuple[float, ...] | None = None
    reason: str | None = None


def content_key(instance: Instance) -> str:
    """Return a digest (hex) of all that a scorer may read."""
    said: list[object] = [instance.items()[0][0], *[response for _, response in instance.items()]]
    if instance.reference is not None or instance.metadata:
        said.append([instance.reference, instance.metadata])
    return hashlib.sha256(msgspec.json.encode(said)).hexdigest()[:32]


class Journal:
    """The journal of one output file; a context manager that holds the file's lock.

    Args:
        path: made if it is not there. A torn last line, from a machine that went down, is cut off.

    Raises:
        ConfigurationError: another run holds it, it cannot be opened, or it was altered.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._answers: dict[tuple[str, str], Answer] = {}
        self._encode = msgspec.json.Encoder().encode
        self._synced = time.monotonic()
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o600)
        except OSError as error:
            raise ConfigurationError(f"{path}: cannot be opened ({error.strerror}); choose another --out") from error
        try:
            self._lock()
            self._read()
        except BaseException:
            os.close(self._file)
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        os.fsync(self._file)
        os.close(self._file)

    @property
    def answers(self) -> Mapping[tuple[str, str], Answer]:
        """By (content, model); the last answer to each."""
        return self._answers

    def append(self, answers: Sequence[Answer]) -> None:
        """Write answers behind the others, in one call to the system."""
        _write(self._file, b"".join(self._encode(answer) + b"\n" for answer in answers))
        self._answers.update({(answer.content, answer.model): answer for answer in answers})
        if time.monotonic() - self._synced > SYNC_SECONDS:
            os.fsync(self._file)
            self._synced = time.monotonic()

    def remove(self) -> None:
        """Delete the file: all that it holds stands in the output."""
        self.path.unlink()

    def _lock(self) -> None:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise ConfigurationError(
                f"{self.path}: another run writes it; wait for that one, or choose another --out"
            ) from error

    def _read(self) -> None:
        content = self.path.read_bytes()
        decoder = msgspec.json.Decoder(Answer)
        position = 0
        for number, line in enumerate(content.splitlines(keepends=True), start=1):
            try:
                answer = decoder.decode(line)
            except msgspec.MsgspecError as error:
                if position + len(line) < len(content):
                    raise ConfigurationError(
                        f"{self.path}, line {number}: is no answer of an earlier run ({error}); remove the line"
                    ) from error
                break
            if not line.endswith(b"\n"):
                break
            self._answers[answer.content, answer.model] = answer
            position += len(line)
        if position < len(content):
            os.ftruncate(self._file, position)


def write_atomically(path: Path, lines: Sequence[bytes]) -> None:
    """Replace the file by these lines: a reader sees the old file or the whole new one.

    Raises:
        ConfigurationError: it cannot be written.
    """
    scratch = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with scratch.open("wb") as file:
            file.writelines(line + b"\n" for line in lines)
            file.flush()
            os.fsync(file.fileno())
        scratch.replace(path)
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    except OSError as error:
        scratch.unlink(missing_ok=True)
        raise ConfigurationError(f"{path}: cannot be written ({error.strerror}); check path and space") from error


def _write(file: int, data: bytes) -> None:
    """All of it: the system may take a part at a time."""
    view = memoryview(data)
    while view:
        view = view[os.write(file, view) :]

"""A backbone that never embeds the same text twice: vectors by content digest in one SQLite file per backbone.

Knows files, digests and float32 blobs; nothing of what a backbone is made of, and no environment: the directory is
handed in. `encoder.registry.load_backbone(spec, cache=DIR)` wraps the backbones that are worth it; the offline stage,
`evaluate`, `replay` and the tables read through it.

Many processes may share a directory: SQLite's write-ahead log lets them read while one writes, and a row is written
once, by whoever computed it first. A file that SQLite cannot read is put aside and made anew, with a warning; a row
whose check sum is wrong is computed again.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import re
import sqlite3
import tempfile
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol, TypeVar, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from router_core.encoder.base import Backbone, Block
from router_core.errors import EncoderError

MAX_BYTES = 2 << 30
"""Largest sum of vectors in one file, 2 GiB: a million vectors of 512 columns. The oldest rows make room."""
CHUNK = 64
"""Conversations embedded between two writes: what an interrupted run has to do again at most."""
BUSY_SECONDS = 60.0
"""How long to wait for another process's write; a write is one chunk and takes milliseconds."""
_READ = 500
"""Keys of one query; SQLite takes 999 parameters at least."""
_SCHEMA = """
CREATE TABLE IF NOT EXISTS encodings (
    position INTEGER PRIMARY KEY AUTOINCREMENT,
    key BLOB NOT NULL UNIQUE,
    vector BLOB NOT NULL,
    crc INTEGER NOT NULL
)
"""
# A row that failed its check is there already, and is put right.
_INSERT = """
INSERT INTO encodings (key, vector, crc) VALUES (?, ?, ?)
ON CONFLICT (key) DO UPDATE SET vector = excluded.vector, crc = excluded.crc
"""
_DROP_OLDEST = "DELETE FROM encodings WHERE position IN (SELECT position FROM encodings ORDER BY position LIMIT ?)"
_PROBES = (
    ("What is 17 * 23?", "17 * 23 = 391."),
    ("Write a function that sorts a list.", "def sort(xs):\n    return sorted(xs)\n"),
    ("Wie heißt die Hauptstadt von Frankreich?", "Paris — naturally.\n\n* It lies on the Seine."),
    ("", ""),
)
_log = logging.getLogger(__name__)

_T = TypeVar("_T")
Conversation = tuple[str, str]
Progress = Callable[[int, int], None]


@runtime_checkable
class Identified(Protocol):
    """A backbone that can tell its weights from any others'."""

    @property
    def identity(self) -> str:
        """Digest over everything that a row depends on besides the texts: weights, tokenizer, precision, limits."""


class CachedBackbone:
    """The same vectors as the backbone's, computed once per (prompt, response) and machine.

    Vectors are stored as the float32 that the backbone gave, so a hit is bit-identical to the first result. It holds
    no open file between calls and may be used from several threads and processes.
    """

    def __init__(
        self,
        backbone: Backbone,
        directory: str | os.PathLike[str],
        max_bytes: int = MAX_BYTES,
        progress: Progress | None = None,
    ) -> None:
        """`progress(done, of)` is called after each chunk of misses; both count conversations.

        Raises:
            EncoderError: the directory cannot be made, or `max_bytes` does not hold a single vector.
        """
        self._backbone = backbone
        self._max_rows = max_bytes // (4 * backbone.dim)
        self._progress = progress
        if self._max_rows < 1:
            raise EncoderError(f"max_bytes = {max_bytes}: holds no vector of {backbone.dim} columns; give more")
        identity = backbone_identity(backbone)
        name = re.sub(r"[^A-Za-z0-9.-]+", "-", backbone.spec).strip("-.")[-60:] or "backbone"
        self._path = Path(directory) / f"{name}-{identity[:24]}.sqlite"
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise EncoderError(
                f"cache {self._path.parent}: cannot be made ({error.strerror}); give another directory, or none"
            ) from error

    @property
    def path(self) -> Path:
        """The SQLite file."""
        return self._path

    @property
    def wrapped(self) -> Backbone:
        """The backbone that computes what is not stored."""
        return self._backbone

    @property
    def identity(self) -> str:
        """The backbone's."""
        return backbone_identity(self._backbone)

    @property
    def spec(self) -> str:
        """The backbone's: a checkpoint does not depend on the cache."""
        return self._backbone.spec

    @property
    def dim(self) -> int:
        """The backbone's."""
        return self._backbone.dim

    @property
    def blocks(self) -> tuple[Block, ...]:
        """The backbone's."""
        return self._backbone.blocks

    def __len__(self) -> int:
        """Vectors stored."""
        return int(self._run(_count))

    def embed(self, conversations: Sequence[Conversation]) -> NDArray[np.float32]:
        """(N, dim) float32: stored rows, and the backbone's for the rest, which are stored chunk by chunk."""
        keys = [content_key(prompt, response) for prompt, response in conversations]
        found = self._read(set(keys))
        missing = {key: i for i, key in reversed(list(enumerate(keys))) if key not in found}
        # By length, so that a chunk needs little padding.
        order = sorted(missing.items(), key=lambda item: sum(map(len, conversations[item[1]])))
        for start in range(0, len(order), CHUNK):
            chunk = order[start : start + CHUNK]
            vectors = self._backbone.embed([conversations[i] for _, i in chunk])
            fresh = {key: vector for (key, _), vector in zip(chunk, vectors, strict=True)}
            self._write(fresh)
            found.update(fresh)
            if self._progress is not None:
                self._progress(start + len(chunk), len(order))
        out = np.empty((len(keys), self.dim), dtype=np.float32)
        for row, key in zip(out, keys, strict=True):
            row[:] = found[key]
        return out

    def _read(self, keys: set[bytes]) -> dict[bytes, NDArray[np.float32]]:
        wanted = sorted(keys)

        def look_up(database: sqlite3.Connection) -> dict[bytes, NDArray[np.float32]]:
            found: dict[bytes, NDArray[np.float32]] = {}
            for start in range(0, len(wanted), _READ):
                part = wanted[start : start + _READ]
                marks = ",".join("?" * len(part))
                rows = database.execute(f"SELECT key, vector, crc FROM encodings WHERE key IN ({marks})", part)
                for key, blob, crc in rows:
                    if len(blob) == 4 * self.dim and zlib.crc32(blob) == crc:
                        found[key] = np.frombuffer(blob, dtype="<f4")
            return found

        return self._run(look_up)

    def _write(self, vectors: dict[bytes, NDArray[np.float32]]) -> None:
        rows = []
        for key, vector in vectors.items():
            if np.isfinite(vector).all():
                blob = np.ascontiguousarray(vector, dtype="<f4").tobytes()
                rows.append((key, blob, zlib.crc32(blob)))

        def store(database: sqlite3.Connection) -> None:
            database.executemany(_INSERT, rows)
            excess = _count(database) - self._max_rows
            if excess > 0:
                database.execute(_DROP_OLDEST, (excess,))

        self._run(store)

    def _run(self, action: Callable[[sqlite3.Connection], _T]) -> _T:
        """`action` on an open database, in one transaction; a file that is no sound database is put aside first.

        Raises:
            EncoderError: the file cannot be opened or written (permissions, full disk).
        """
        try:
            return self._once(action)
        except sqlite3.OperationalError as error:
            raise EncoderError(
                f"cache {self._path}: {error}; check permissions and space, or work without the cache"
            ) from error
        except sqlite3.DatabaseError as error:
            self._put_aside(error)
            return self._once(action)

    def _once(self, action: Callable[[sqlite3.Connection], _T]) -> _T:
        with contextlib.closing(self._connect()) as database, database:
            return action(database)

    def _put_aside(self, error: sqlite3.DatabaseError) -> None:
        aside = self._path.with_suffix(".corrupt")
        _log.warning("cache %s cannot be read (%s): put aside as %s and made anew", self._path, error, aside.name)
        for suffix in ("-wal", "-shm"):
            self._path.with_name(self._path.name + suffix).unlink(missing_ok=True)
        with contextlib.suppress(FileNotFoundError):
            self._path.replace(aside)

    def _connect(self) -> sqlite3.Connection:
        if not self._path.exists():
            self._create()
        database = sqlite3.connect(self._path, timeout=BUSY_SECONDS)
        try:
            # A power cut may lose the last rows, never the file: they are computed again.
            database.execute("PRAGMA synchronous = NORMAL")
            database.execute(_SCHEMA)
            database.execute("SELECT key, vector, crc FROM encodings LIMIT 0")
        except BaseException:
            database.close()
            raise
        return database

    def _create(self) -> None:
        """Make the file under another name, then link it: SQLite does not wait for others while it changes to WAL.

        Raises:
            EncoderError: the directory cannot be written, or its file system has no links.
        """
        try:
            with tempfile.TemporaryDirectory(dir=self._path.parent) as directory:
                made = Path(directory) / self._path.name
                with contextlib.closing(sqlite3.connect(made)) as database:
                    database.execute("PRAGMA journal_mode = WAL")
                    database.execute(_SCHEMA)
                with contextlib.suppress(FileExistsError):  # another process was first
                    self._path.hardlink_to(made)
        except OSError as error:
            raise EncoderError(
                f"cache {self._path}: cannot be made ({error.strerror}); check permissions and space, "
                "or work without the cache"
            ) from error


def _count(database: sqlite3.Connection) -> int:
    return int(database.execute("SELECT count(*) FROM encodings").fetchone()[0])


def content_key(prompt: str, response: str) -> bytes:
    """SHA-256 over both texts, the prompt's length first, so that moving the border between them changes the key."""
    head = prompt.encode("utf-8", "surrogatepass")
    digest = hashlib.sha256(len(head).to_bytes(8, "little"))
    digest.update(head)
    digest.update(response.encode("utf-8", "surrogatepass"))
    return digest.digest()


def backbone_identity(backbone: Any) -> str:
    """The backbone's own identity, or else a digest of its spec and of what it makes of a few fixed texts."""
    if isinstance(backbone, Identified):
        return backbone.identity
    digest = hashlib.sha256(f"{backbone.spec}\n{backbone.dim}\n".encode())
    digest.update(np.ascontiguousarray(backbone.embed(_PROBES), dtype="<f4").tobytes())
    return digest.hexdigest()

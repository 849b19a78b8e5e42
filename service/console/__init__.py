"""The console: a page that shows what the gateway has learned and does now. Called by `handlers.console`.

`static/` holds the page, its scripts and style as they are sent: no build step. `static/vendor/` holds the libraries,
as published on npm, with their licences. This module reads the files once and knows no route.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Final

STATIC: Final = Path(__file__).parent / "static"

TYPES: Final = {
    ".html": "text/html; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".svg": "image/svg+xml",
    ".txt": "text/plain; charset=utf-8",
}
"""Media types by the ends of names."""

PAGE: Final = "index.html"


@dataclass(frozen=True, slots=True)
class ConsoleFile:
    """One file as it is sent."""

    content: bytes
    media_type: str


@dataclass(frozen=True, slots=True)
class ConsoleFiles:
    """The page and its parts.

    Attributes:
        page: with the addresses of its parts.
        parts: by path below `static/`.
        digest: changes with any of them; it stands in their addresses, so that browsers may keep them for ever.
    """

    page: ConsoleFile
    parts: Mapping[str, ConsoleFile]
    digest: str


@cache
def console_files() -> ConsoleFiles:
    """Return the files; they are read once."""
    paths = sorted(path for path in STATIC.rglob("*") if path.is_file() and path.suffix in TYPES)
    parts = {path.relative_to(STATIC).as_posix(): ConsoleFile(path.read_bytes(), TYPES[path.suffix]) for path in paths}
    digest = hashlib.sha256()
    for name, part in parts.items():
        digest.update(f"{name} {len(part.content)} ".encode() + part.content)
    page = parts.pop(PAGE)
    short = digest.hexdigest()[:16]
    return ConsoleFiles(ConsoleFile(page.content.replace(b"{digest}", short.encode()), page.media_type), parts, short)

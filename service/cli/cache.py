"""Where commands keep encodings of texts: a directory of the user's, unless told otherwise."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

Cache = Annotated[
    Path | None,
    typer.Option(help="Encodings of transformer encoders (default: ~/.cache/reward-router).", show_default=False),
]
UseCache = Annotated[bool, typer.Option("--use-cache/--no-cache", help="Keep encodings for the next time.")]


def encodings_directory(given: Path | None, *, use: bool = True) -> Path | None:
    """The directory for `load_backbone`: the given one, else `$XDG_CACHE_HOME/reward-router`, else in ~/.cache.

    Args:
        given: what the command line says.
        use: False for no cache at all.
    """
    if not use:
        return None
    if given is not None:
        return given
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "reward-router"

"""The option `--url` of every command that calls a gateway: by default the one that was started from here.

`up` leaves a note of its address in its data directory while it serves; the commands read it, so that a gateway that
did not get the usual port is found nevertheless.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Final

import typer

from service.cli.processes import USUAL_PORT, answers
from service.settings import read_settings

URL_VARIABLES: Final = ("REWARD_ROUTER_URL", "REWARD_ROUTER_CLIENT_URL")
"""Environment variables with the gateway's address; the second is the one that trainers' helpers read."""

NOTE: Final = "gateway.url"
"""File of a data directory: the address of the gateway that runs there."""


def usual_url() -> str:
    """Return the address of the gateway of the settings' data directory while one answers, else the usual one."""
    try:
        noted = (read_settings().data_dir / NOTE).read_text("utf-8").strip()
    except OSError:
        noted = ""
    # Killed, a gateway leaves its note behind.
    if noted.startswith("http") and answers(f"{noted}/healthz"):
        return noted
    return f"http://127.0.0.1:{USUAL_PORT}"


Url = Annotated[
    str,
    typer.Option(
        help=f"The gateway. (default: the one that `up` serves from here, else http://127.0.0.1:{USUAL_PORT})",
        envvar=[*URL_VARIABLES],
        default_factory=usual_url,
        show_default=False,
    ),
]
"""The option; parameters without a default stand first, so that it does, too."""


@contextmanager
def noted_url(data_dir: Path, url: str) -> Iterator[None]:
    """Keep a note of the address in the directory for the length of the block."""
    note = data_dir / NOTE
    note.write_text(url + "\n", "utf-8")
    try:
        yield
    finally:
        # Another one that was started on the same directory has put its own there.
        if note.exists() and note.read_text("utf-8").strip() == url:
            note.unlink()

"""The option `--json` of commands that print figures: into a file, or alone on standard output."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

JsonOut = Annotated[
    Path | None, typer.Option("--json", help="Write the figures to this file; `-` for standard output.")
]


def publish(figures: Mapping[str, Any], out: Path | None, show: Callable[[], None]) -> None:
    """Print the figures as JSON and nothing else for `-`; else show them, and write the file that is named.

    Args:
        figures: what to tell; what JSON does not know is written as its text.
        out: what the command line says.
        show: prints them for people.
    """
    if out is not None and str(out) == "-":
        typer.echo(json.dumps(figures, default=str))
        return
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(figures, indent=1, default=str) + "\n", "utf-8")
    show()

"""The option `--api-key` of the commands."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import typer

from service.cli import app
from service.cli.key_option import CLIENT_KEY_VARIABLE, KEY_VARIABLE


def commands(command: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """Yield every command below one, with its name."""
    yield name, command
    for word, below in getattr(command, "commands", {}).items():
        yield from commands(below, f"{name} {word}".strip())


def test_every_command_reads_its_key_from_the_same_variables() -> None:
    found = {
        name: parameter.envvar
        for name, command in commands(typer.main.get_command(app))
        for parameter in command.params
        # A scorer's key is another one.
        if "--api-key" in parameter.opts and name != "check-scorer"
    }
    assert {"pool show", "runs list", "replay", "models", "label", "audit", "report"} <= found.keys()
    assert {name: [*of] for name, of in found.items()} == {name: [KEY_VARIABLE, CLIENT_KEY_VARIABLE] for name in found}

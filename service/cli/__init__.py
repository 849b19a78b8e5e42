"""The command line `reward-router`: one file per command, imported when the command is asked for.

The only part of `service` besides `lab` that may import the offline stage.
"""

from __future__ import annotations

import sys
from collections import UserDict
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from importlib.metadata import version
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from typer.core import TyperGroup
from typer.main import get_group

from router_core.errors import RouterCoreError
from service.entry import missing
from service.errors import ServiceError

COMMANDS = (
    "demo",
    "up",
    "serve",
    "worker",
    "check-scorer",
    "check-trainer",
    "manifests",
    "pin",
    "encoder",
    "keys",
    "train",
    "convert",
    "label",
    "evaluate",
    "frontier",
    "replay",
    "models",
    "pool",
    "runs",
    "acts",
    "audit",
    "report",
    "export",
    "ope",
)
"""In the order of the help. Each has a file of its name, which holds a function of its name, or an `app` of several."""


class _Commands(UserDict[str, Any]):
    """The commands by name, None until one is asked for."""

    def __getitem__(self, name: str) -> Any:
        if self.data[name] is None:
            self.data[name] = _load(name)
        return self.data[name]


class _Group(TyperGroup):
    def __init__(self, **given: Any) -> None:
        super().__init__(**given)
        self.commands = _Commands(dict.fromkeys(COMMANDS))


def _load(name: str) -> Any:
    file = name.replace("-", "_")
    try:
        module = import_module(f"{__name__}.{file}")
    except ModuleNotFoundError as error:
        sys.exit(missing(error))
    shelf = typer.Typer(rich_markup_mode="rich")
    if hasattr(module, "app"):
        shelf.add_typer(module.app, name=name)
    else:
        shelf.command(name)(getattr(module, file))
    return get_group(shelf).commands[name]


def _print_version(asked: bool) -> None:
    if asked:
        typer.echo(f"reward-router {version('reward-router')}")
        raise typer.Exit


app = typer.Typer(
    name="reward-router",
    cls=_Group,
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    help=(
        "Asks ONE reward model per (prompt, responses) instance and learns from feedback which one.\n\n"
        "First steps: [bold]reward-router demo[/] makes a pool, starts everything and shows what was learned; "
        "[bold]reward-router up[/] keeps serving. Then POST /reward, and send what you find out to POST /feedback."
    ),
)


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and leave.", is_eager=True, callback=_print_version)
    ] = False,
) -> None:
    """Take the options that stand before a command."""


def main() -> None:
    """Entry point."""
    with report_errors():
        app()


@contextmanager
def report_errors() -> Iterator[None]:
    """Make of errors of ours, and of files, a sentence on standard error, and exit status 2."""
    try:
        yield
    except (ServiceError, RouterCoreError) as error:
        # Escaped: the lines of a log are full of brackets.
        _say(str(error))
        sys.exit(2)
    except OSError as error:
        if error.filename is None:
            raise
        _say(f"{error.filename}: {error.strerror}; check the path and its permissions")
        sys.exit(2)


def _say(text: str) -> None:
    Console(stderr=True).print(f"[bold red]error[/] {escape(text)}", highlight=False, soft_wrap=True)

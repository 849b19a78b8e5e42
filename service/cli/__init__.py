"""The command line `reward-router`: one file per command, composed here. The only part that may import the offline
stage.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape

from router_core.errors import RouterCoreError
from service.cli import (
    acts,
    audit,
    check_scorer,
    check_trainer,
    convert,
    demo,
    encoder,
    evaluate,
    export,
    frontier,
    keys,
    label,
    manifests,
    models,
    ope,
    pin,
    pool,
    replay,
    report,
    runs,
    serve,
    train,
    up,
    worker,
)
from service.errors import ServiceError


def _print_version(asked: bool) -> None:
    if asked:
        typer.echo(f"reward-router {version('reward-router')}")
        raise typer.Exit


app = typer.Typer(
    name="reward-router",
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


app.command("demo")(demo.demo)
app.command("up")(up.up)
app.command("serve")(serve.serve)
app.command("worker")(worker.worker)
app.command("check-scorer")(check_scorer.check_scorer)
app.command("check-trainer")(check_trainer.check_trainer)
app.command("manifests")(manifests.manifests)
app.command("pin")(pin.pin)
app.add_typer(encoder.app, name="encoder")
app.add_typer(keys.app, name="keys")
app.command("train")(train.train)
app.command("convert")(convert.convert)
app.command("label")(label.label)
app.command("evaluate")(evaluate.evaluate)
app.command("frontier")(frontier.frontier)
app.command("replay")(replay.replay)
app.command("models")(models.models)
app.add_typer(pool.app, name="pool")
app.add_typer(runs.app, name="runs")
app.command("acts")(acts.acts)
app.command("audit")(audit.audit)
app.command("report")(report.report)
app.command("export")(export.export)
app.command("ope")(ope.ope)


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

"""`reward-router check-trainer`: would trainers get their rewards from this gateway?"""

from __future__ import annotations

from typing import Annotated

import httpx2 as httpx
import typer
from rich.console import Console

from service.cli.key_option import key_option
from service.errors import ConfigurationError
from service.lab.trainer_conformance import Replayed, replay

FAILED = 1
"""Exit status where a recording failed."""


def check_trainer(
    url: Annotated[str, typer.Argument(metavar="URL", help="Origin of the gateway.", show_default=False)],
    api_key: Annotated[
        str | None,
        key_option("Its key."),
    ] = None,
    run: Annotated[str, typer.Option(help="Training run that the requests are counted to.")] = "check-trainer",
    timeout_seconds: Annotated[float, typer.Option(min=0.001, help="Longest time of one answer.")] = 30.0,
) -> None:
    """Replay requests of every trainer against a running gateway, and say which would work.

    Prints one line a request; the exit status is 1 if one fails. The trainers are described in docs/trainers.
    """
    if not url.startswith(("http://", "https://")):
        raise ConfigurationError(f"URL is {url!r}: give one that begins with http:// or https://")
    headers = {} if api_key is None else {"authorization": f"Bearer {api_key}"}
    with httpx.Client(base_url=url, headers=headers, timeout=timeout_seconds, trust_env=False) as client:
        _print(replay(client, {"run": run}))


def _print(replayed: list[Replayed]) -> None:
    console = Console()
    for one in replayed:
        mark = "[green]ok[/]  " if one.problem is None else "[bold red]FAIL[/]"
        recording = one.recording
        console.print(mark, end=" ")
        sentence = f"{recording.trainer}: {recording.what} ({recording.path})"
        console.print(sentence, highlight=False, markup=False, soft_wrap=True)
        if one.problem is not None:
            console.print(f"     {one.problem}", highlight=False, markup=False, soft_wrap=True)
    failed = sum(one.problem is not None for one in replayed)
    console.print(f"{len(replayed) - failed} of {len(replayed)} requests would work", highlight=False)
    if failed:
        raise typer.Exit(FAILED)

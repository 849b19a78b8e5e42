"""`reward-router check-scorer`: does a service speak the scorer protocol?"""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from service.errors import ConfigurationError
from service.lab.conformance import DEFAULT_SAMPLE, Checked, Sample, Service, check_service
from service.scorers.transport.http import HttpPool

FAILED = 1
"""Exit status where a check failed."""


def check_scorer(
    url: Annotated[str, typer.Argument(metavar="URL", help="Origin of the service.", show_default=False)],
    api_key: Annotated[
        str | None, typer.Option(envvar="SCORER_API_KEY", show_envvar=True, help="Its key.", show_default=False)
    ] = None,
    item: Annotated[
        Path | None,
        typer.Option(help="JSON file: an item of the protocol that the service has to give rewards.", metavar="FILE"),
    ] = None,
    timeout_seconds: Annotated[float, typer.Option(min=0.001, help="Longest time of one answer.")] = 30.0,
) -> None:
    """Check that a service can be a scorer of kind `http` or `rule`.

    Prints one line a check; the exit status is 1 if one fails. The protocol is described in docs/scorers.md.
    """
    sample = DEFAULT_SAMPLE if item is None else _read(item)
    checked = asyncio.run(_check(url, api_key, sample, timeout_seconds))
    console = Console()
    for one in checked:
        mark = "[green]ok[/]  " if one.problem is None else "[bold red]FAIL[/]"
        console.print(mark, end=" ")
        console.print(one.sentence, highlight=False, markup=False, soft_wrap=True)
        if one.problem is not None:
            console.print(f"     {one.problem}", highlight=False, markup=False, soft_wrap=True)
    failed = sum(one.problem is not None for one in checked)
    console.print(f"{len(checked) - failed} of {len(checked)} checks passed", highlight=False)
    if failed:
        raise typer.Exit(FAILED)


async def _check(url: str, api_key: str | None, sample: Sample, seconds: float) -> list[Checked]:
    try:
        pool = HttpPool(url, api_key=api_key)
        keyless = None if api_key is None else HttpPool(url)
    except ValueError as error:
        raise ConfigurationError(str(error)) from error
    try:
        return await check_service(Service(pool, keyless, seconds, sample))
    finally:
        await pool.close()
        if keyless is not None:
            await keyless.close()


def _read(file: Path) -> Sample:
    try:
        item = json.loads(file.read_text("utf-8"))
    except (ValueError, RecursionError) as error:
        raise ConfigurationError(f"--item {file} is no JSON: {error}") from error
    asked = isinstance(item, dict) and ("prompt" in item) != ("messages" in item)
    responses = item.get("responses") if asked else None
    if not isinstance(responses, list) or len(responses) < 2 or not all(isinstance(one, str) for one in responses):
        raise ConfigurationError(
            f"--item {file}: give an object with `prompt` or `messages`, and at least two texts in `responses`"
        )
    return Sample(item, own=True)

"""`reward-router export`: a run's event log as a file, for audit and off-policy evaluation."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress, SpinnerColumn, TextColumn

from service.cli.store_option import store_option
from service.errors import ConfigurationError, StoreUnavailableError
from service.lab.eventlog.export import Exported, export_log
from service.settings import EMBEDDED, Settings, read_settings, store_directory
from service.stores.embedded import EmbeddedStore
from service.stores.redis import RedisStore


def export(
    run: Annotated[str, typer.Argument(help="Name of the run.")],
    out: Annotated[Path, typer.Option(help="File to write: Parquet, or JSON Lines where it ends in .jsonl.")],
    store: Annotated[str | None, store_option()] = None,
    data_dir: Annotated[
        Path | None, typer.Option(help="Directory of everything that is kept, as of `up` and `serve`. (default: .data)")
    ] = None,
    since: Annotated[str | None, typer.Option(help="Only events after this event id.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Keep the rows of OUT and add what came after.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a sentence.")] = False,
) -> None:
    """Write every accepted feedback of a run, with its whole decision, to one file. The gateway may keep running.

    docs/off-policy.md lists the columns; `reward-router ope` reads the file.
    """
    if since is not None and resume:
        raise ConfigurationError("--since and --resume exclude each other: --resume goes on where OUT ends")
    settings = read_settings(store_url=store, data_dir=data_dir)
    columns = (SpinnerColumn(), TextColumn("{task.description}"), MofNCompleteColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress, running_store(settings) as url:
        task = progress.add_task("events", total=None)
        done = asyncio.run(export_run(url, settings, run, out, since, resume, lambda n: progress.advance(task, n)))
    if as_json:
        report = {"out": str(out), "run": run, "events": done.events, "added": done.added}
        typer.echo(json.dumps({**report, "last_event": done.last_event, "exact_rewards": done.header.exact_rewards}))
        return
    console = Console()
    console.print(
        f"{done.events} events of run {run} in {out} ({done.added} added), last event {done.last_event or 'none'}",
        highlight=False,
        soft_wrap=True,
    )
    if not done.header.exact_rewards:
        console.print(
            "The log's beginning is trimmed, so that losses cannot be scaled as the run scaled them: the column "
            "`reward` is empty",
            soft_wrap=True,
        )


async def export_run(
    url: str,
    settings: Settings,
    run: str,
    out: Path,
    since: str | None = None,
    resume: bool = False,
    advance: Callable[[int], None] = lambda _: None,
) -> Exported:
    """Write a run's log to a file; arguments as `export_log`.

    Raises:
        ConfigurationError: the store knows no such run.
        StoreUnavailableError: the store does not answer.
    """
    store = RedisStore(
        url, window_seconds=settings.decision_ttl_seconds, timeout_seconds=settings.store_timeout_seconds
    )
    try:
        return await export_log(store, run, out, since=since, resume=resume, on_events=advance)
    finally:
        await store.close()


@contextmanager
def running_store(settings: Settings) -> Iterator[str]:
    """URL of the settings' store; an embedded one is started for the while, unless a gateway already runs it.

    Raises:
        ConfigurationError: there is no embedded store in the directory.
    """
    if settings.store_url != EMBEDDED:
        yield settings.store_url
        return
    embedded = EmbeddedStore(store_directory(settings.data_dir), fsync=settings.store_fsync)
    if not (embedded.data_dir / "appendonlydir").is_dir():
        raise ConfigurationError(
            f"there is no embedded store in {settings.data_dir}: give the gateway's --data-dir, or --store URL"
        )
    # Without a port its address is the socket in its directory, where a running gateway's server listens.
    if asyncio.run(_answers(embedded.url, settings)):
        yield embedded.url
        return
    with embedded:
        yield embedded.url


async def _answers(url: str, settings: Settings) -> bool:
    store = RedisStore(
        url, window_seconds=settings.decision_ttl_seconds, timeout_seconds=settings.store_timeout_seconds
    )
    try:
        await store.ping()
    except StoreUnavailableError:
        return False
    finally:
        await store.close()
    return True

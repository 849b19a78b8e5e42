"""`reward-router runs`: the training runs that a store holds, and what is done with whole runs.

Each act but listing is an entry of the run's log, or, where the run is deleted, of the store's.
"""

from __future__ import annotations

import asyncio
import getpass
import json
import time
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any, TypeVar

import msgspec
import typer
from rich.console import Console

from service.cli.export import running_store
from service.cli.fitting import fitting_table
from service.cli.key_option import key_option
from service.cli.store_option import store_option
from service.errors import ConfigurationError, ServiceError
from service.lab.client import GatewayClient
from service.lab.runfile import known, read_header, read_run, write_run
from service.settings import read_settings
from service.specification import decode
from service.stores.acts import (
    ARCHIVE,
    DELETE,
    EXPORT,
    IMPORT,
    POOL,
    PREFIX,
    UNARCHIVE,
    Note,
    is_archived,
    note,
    read_note,
)
from service.stores.protocol import LogEntry
from service.stores.redis import RedisStore
from service.usecases.status import stored_runs

T = TypeVar("T")

CLOSED_SECONDS = 10.0
"""After this time every gateway that reaches the store has closed an archived run."""

EVENTS = "events: accepted feedback, verdicts of audits, and changes of the run, each learned exactly once"

app = typer.Typer(
    invoke_without_command=True, help="List the runs of a store; archive, export, import and delete them."
)

Run = Annotated[str, typer.Argument(help="Name of the run.")]
StoreUrl = Annotated[str | None, store_option()]
DataDir = Annotated[
    Path | None, typer.Option(help="Directory of everything that is kept, as of `up` and `serve`. (default: .data)")
]
GatewayUrl = Annotated[str | None, typer.Option(help="A running gateway, whose store is meant, instead of --store.")]
Key = Annotated[str | None, key_option("With --url: API key.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]


@app.callback()
def runs(
    context: typer.Context,
    url: GatewayUrl = None,
    api_key: Key = None,
    store: StoreUrl = None,
    data_dir: DataDir = None,
    as_json: AsJson = False,
) -> None:
    """List the runs of a store: events learned from, signal, prior, scorers. The gateway may keep running."""
    if context.invoked_subcommand is None:
        list_runs(url, api_key, store, data_dir, as_json)


@app.command("list")
def list_runs(
    url: GatewayUrl = None,
    api_key: Key = None,
    store: StoreUrl = None,
    data_dir: DataDir = None,
    as_json: AsJson = False,
) -> None:
    """List the runs of a store: events learned from, signal, prior, scorers. The gateway may keep running."""
    found = asyncio.run(_asked(url, api_key)) if url is not None else with_store(store, data_dir, _found)
    if as_json:
        typer.echo(json.dumps(found))
        return
    rows = [
        (
            run["run"] + (" (archived)" if run["archived"] else ""),
            str(run["events"]),
            run["signal"],
            run["prior"],
            ", ".join(run["pool"]),
        )
        for run in found
    ]
    console = Console()
    columns = ("run", "events", "signal", "prior", "scorers")
    console.print(fitting_table(console, columns, rows, drop=("scorers", "prior"), title=f"{len(rows)} runs"))
    console.print(EVENTS, highlight=False, soft_wrap=True)


async def _asked(url: str, api_key: str | None) -> list[dict[str, Any]]:
    async with GatewayClient(url, api_key=api_key) as client:
        found: list[dict[str, Any]] = await client.get("/runs")
        return found


async def _found(store: RedisStore) -> list[dict[str, Any]]:
    return [run.model_dump() for run in await stored_runs(store, await store.list_runs())]


@app.command()
def log(run: Run, store: StoreUrl = None, data_dir: DataDir = None, as_json: AsJson = False) -> None:
    """Print what operators did with a run: changes of its pool, archive, export, import; and that it was deleted."""

    async def read(opened: RedisStore) -> list[LogEntry]:
        gone = [entry for entry in await opened.notes() if entry.decision_id == run]
        return [*gone, *await opened.acts(run)]

    rows = [told(entry) for entry in with_store(store, data_dir, read)]
    if as_json:
        typer.echo(json.dumps(rows))
        return
    for row in rows:
        when = datetime.fromtimestamp(int(row["time_ms"]) / 1000, UTC).strftime("%Y-%m-%d %H:%M:%S")
        typer.echo(f"{when}  {row['act']}  {row['about']}  by {row['by'] or 'unknown'}  ({row['event']})")


def told(entry: LogEntry) -> dict[str, Any]:
    """Return an act on a run as a row: `event`, `time_ms`, `act`, `by`, `about`.

    A damaged act, or one of another program, is a row too, with the time of its entry; `about` says why it is not read.
    """
    act = entry.value.removeprefix(PREFIX).decode(errors="replace")
    try:
        said = read_note(entry)
        about = f"version {decode(entry.payload).version}" if entry.value == POOL else said.about
    except (msgspec.MsgspecError, UnicodeDecodeError, ServiceError) as error:
        said, about = Note(int(entry.event_id.partition("-")[0])), f"cannot be read: {error}"
    return {"event": entry.event_id, "time_ms": said.time_ms, "act": act, "by": said.by, "about": about}


@app.command()
def archive(
    run: Run,
    undo: Annotated[bool, typer.Option("--undo", help="Take it back: the run goes on where it was.")] = False,
    store: StoreUrl = None,
    data_dir: DataDir = None,
) -> None:
    """Close a run: gateways ask and teach it no more, and answer 410. It keeps everything."""

    async def act(opened: RedisStore) -> bool:
        identity, _ = await known(opened, run)
        acts = await opened.acts(run)
        if is_archived(acts) is not undo:
            return False
        value = UNARCHIVE if undo else ARCHIVE
        return await opened.append_act(run, "run", _said(), value, identity=identity) is not None

    done = with_store(store, data_dir, act)
    state = "open" if undo else "archived"
    typer.echo(f"run {run} is {state}" if done else f"run {run} was {state} before")


@app.command("export")
def export_run(
    run: Run,
    out: Annotated[Path, typer.Option(help="File to write.")],
    store: StoreUrl = None,
    data_dir: DataDir = None,
) -> None:
    """Write a whole run to one file, from which `runs import` makes it again, posterior and all.

    `reward-router export` writes tables for evaluation instead.
    """

    async def act(opened: RedisStore) -> int:
        count = await write_run(opened, run, out)
        identity, _ = await known(opened, run)
        await opened.append_act(run, "run", _said(out.name), EXPORT, identity=identity)
        return count

    typer.echo(f"run {run}: {with_store(store, data_dir, act)} entries in {out}")


@app.command("import")
def import_run(
    file: Annotated[Path, typer.Argument(help="File that `runs export` has written.")],
    name: Annotated[str | None, typer.Option("--as", help="Name of the run here. (default: as it was)")] = None,
    store: StoreUrl = None,
    data_dir: DataDir = None,
) -> None:
    """Bring a run into a store that has none of its name. A gateway with its checkpoint goes on with it."""

    async def act(opened: RedisStore) -> tuple[str, int]:
        origin = read_header(file).run
        run, count = await read_run(opened, file, name)
        identity, _ = await known(opened, run)
        await opened.append_act(run, "run", _said(origin), IMPORT, identity=identity)
        return run, count

    run, count = with_store(store, data_dir, act)
    typer.echo(f"run {run}: {count} entries from {file}")


@app.command()
def delete(
    run: Run,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
    store: StoreUrl = None,
    data_dir: DataDir = None,
) -> None:
    """Delete an archived run for good: log, snapshot, decisions, audits. That it was deleted is kept."""

    async def act(opened: RedisStore) -> None:
        await known(opened, run)
        acts = await opened.acts(run)
        if not is_archived(acts):
            raise ConfigurationError(
                f"run {run!r} is not archived, so that gateways may hold it: `reward-router runs archive {run}` first"
            )
        archived = max(read_note(entry).time_ms for entry in acts if entry.value == ARCHIVE) / 1000
        await asyncio.sleep(min(max(archived + CLOSED_SECONDS - time.time(), 0.0), CLOSED_SECONDS))
        await opened.note(run, _said(), DELETE)
        await opened.drop_run(run)

    if not yes:
        typer.confirm(f"Delete run {run} for good?", abort=True)
    with_store(store, data_dir, act)
    typer.echo(f"run {run} is deleted")


def _said(about: str = "") -> bytes:
    return note(getpass.getuser(), about)


def with_store(url: str | None, data_dir: Path | None, act: Callable[[RedisStore], Awaitable[T]]) -> T:
    """Return what an act on the store of these options gives."""
    settings = read_settings(store_url=url, data_dir=data_dir)

    async def run(found: str) -> T:
        store = RedisStore(
            found, window_seconds=settings.decision_ttl_seconds, timeout_seconds=settings.store_timeout_seconds
        )
        try:
            return await act(store)
        finally:
            await store.close()

    with running_store(settings) as found:
        return asyncio.run(run(found))

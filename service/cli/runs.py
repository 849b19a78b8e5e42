"""`reward-router runs`: the training runs that a store holds."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from service.cli.export import running_store
from service.cli.fitting import fitting_table
from service.cli.store_option import store_option
from service.settings import Settings, read_settings
from service.stores.redis import RedisStore


def runs(
    store: Annotated[str | None, store_option()] = None,
    data_dir: Annotated[
        Path | None, typer.Option(help="Directory of everything that is kept, as of `up` and `serve`. (default: .data)")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """List the runs of a store: events learned from, signal, prior, scorers. The gateway may keep running."""
    settings = read_settings(store_url=store, data_dir=data_dir)
    with running_store(settings) as url:
        found = asyncio.run(_found(url, settings))
    if as_json:
        typer.echo(json.dumps(found))
        return
    rows = [(run["run"], str(run["events"]), run["signal"], run["prior"], ", ".join(run["pool"])) for run in found]
    console = Console()
    columns = ("run", "events", "signal", "prior", "scorers")
    console.print(fitting_table(console, columns, rows, drop=("scorers", "prior"), title=f"{len(rows)} runs"))


async def _found(url: str, settings: Settings) -> list[dict[str, Any]]:
    store = RedisStore(
        url, window_seconds=settings.decision_ttl_seconds, timeout_seconds=settings.store_timeout_seconds
    )
    try:
        checks = {name: await store.check_run(name, ()) for name in await store.list_runs()}
    finally:
        await store.close()
    found = []
    for name, check in checks.items():
        if check.identity is None:
            continue
        identity = json.loads(check.identity.fingerprint)
        said = {key: identity.get(key) for key in ("signal", "prior", "pool")}
        found.append({"run": name, "events": check.status.appended, **said})
    return found

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
from service.lab.client import GatewayClient
from service.settings import Settings, read_settings
from service.stores.redis import RedisStore
from service.usecases.status import stored_runs


def runs(
    url: Annotated[
        str | None, typer.Option(help="A running gateway, whose store is meant, instead of --store.")
    ] = None,
    api_key: Annotated[
        str | None, typer.Option(help="With --url: API key.", envvar="REWARD_ROUTER_CLIENT_API_KEY")
    ] = None,
    store: Annotated[str | None, store_option()] = None,
    data_dir: Annotated[
        Path | None, typer.Option(help="Directory of everything that is kept, as of `up` and `serve`. (default: .data)")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """List the runs of a store: events learned from, signal, prior, scorers. The gateway may keep running."""
    if url is not None:
        found = asyncio.run(_asked(url, api_key))
    else:
        settings = read_settings(store_url=store, data_dir=data_dir)
        with running_store(settings) as address:
            found = asyncio.run(_found(address, settings))
    if as_json:
        typer.echo(json.dumps(found))
        return
    rows = [(run["run"], str(run["events"]), run["signal"], run["prior"], ", ".join(run["pool"])) for run in found]
    console = Console()
    columns = ("run", "events", "signal", "prior", "scorers")
    console.print(fitting_table(console, columns, rows, drop=("scorers", "prior"), title=f"{len(rows)} runs"))


async def _asked(url: str, api_key: str | None) -> list[dict[str, Any]]:
    async with GatewayClient(url, api_key=api_key) as client:
        found: list[dict[str, Any]] = await client.get("/runs")
        return found


async def _found(url: str, settings: Settings) -> list[dict[str, Any]]:
    store = RedisStore(
        url, window_seconds=settings.decision_ttl_seconds, timeout_seconds=settings.store_timeout_seconds
    )
    try:
        return [run.model_dump() for run in await stored_runs(store, await store.list_runs())]
    finally:
        await store.close()

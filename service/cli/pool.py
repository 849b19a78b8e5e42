"""`reward-router pool`: what a pool file would change in a live run, and the change."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import urlencode

import typer
from rich.console import Console

from service.cli.key_option import key_option
from service.cli.url_option import Url
from service.lab.client import GatewayClient
from service.pool import load_pool
from service.usecases.pools import PoolReply, PoolShown

app = typer.Typer(
    no_args_is_help=True,
    help="Show, compare and change the pool of a live run: scorers, prices, limits, v, gamma, budget, audits.",
)

Run = Annotated[str | None, typer.Option(help="Name of the run. (default: the gateway's)")]
Key = Annotated[str | None, key_option()]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of lines.")]
Pool = Annotated[
    Path | None, typer.Argument(help="Pool file (YAML) with every scorer of the pool to be. (default: the gateway's)")
]


@app.command()
def show(url: Url, run: Run = None, api_key: Key = None, as_json: AsJson = False) -> None:
    """Print a run's pool: every scorer that it ever asked, and what the gateway's own pool file would change."""
    query = "" if run is None else "?" + urlencode({"run": run})
    document = asyncio.run(_get("/pool" + query, url, api_key))
    found, console = PoolShown.model_validate(document), Console()
    if as_json:
        typer.echo(found.model_dump_json(indent=2))
        return
    terms = f"policy {found.policy}, v {found.v:g}, gamma {found.gamma:g}, at most {found.max_calls} calls"
    console.print(f"run {found.run}, pool version {found.version}: {terms}", highlight=False, soft_wrap=True)
    for arm in found.arms:
        state = "retired" if arm.retired else "on probation" if arm.on_probation else "asked"
        told = f"  {arm.arm} {arm.name}: {state}, price {arm.price:g}, {arm.events:.1f} events, from {arm.source}"
        console.print(told, highlight=False, soft_wrap=True)
    if found.proposal:
        console.print("the gateway's own pool file would change:", highlight=False)
        _print(console, [str(change) for change in found.proposal])


@app.command()
def diff(url: Url, pool: Pool = None, run: Run = None, api_key: Key = None, as_json: AsJson = False) -> None:
    """Print what a pool file would change in a run. Exit status 1 where it would change something."""
    reply = asyncio.run(_post(_body(pool, run, dry_run=True), url, api_key))
    _tell(reply, as_json)
    if reply.changes:
        raise typer.Exit(1)


@app.command("apply")
def apply_file(
    url: Url,
    pool: Pool = None,
    run: Run = None,
    expect: Annotated[int | None, typer.Option(help="Version of the run's pool that it must have now.")] = None,
    api_key: Key = None,
    as_json: AsJson = False,
) -> None:
    """Change a run's pool to what a pool file says. Requests under way, and their feedback, are answered as before.

    docs/pools-live.md says what new scorers start from.
    """
    body = {**_body(pool, run, dry_run=False), "expect": expect}
    _tell(asyncio.run(_post(body, url, api_key)), as_json)


def _body(pool: Path | None, run: str | None, *, dry_run: bool) -> dict[str, Any]:
    # Read here: relative paths are this machine's, and a mistake needs no gateway to be found.
    document = None if pool is None else load_pool(pool).model_dump(mode="json", exclude_defaults=True)
    return {"pool": document, "run": run, "dry_run": dry_run}


def _tell(reply: PoolReply, as_json: bool) -> None:
    if as_json:
        typer.echo(reply.model_dump_json(indent=2))
        return
    console = Console()
    if not reply.changes:
        console.print(f"run {reply.run}: nothing to change, pool version {reply.version}", highlight=False)
        return
    done = f"applied as event {reply.event_id}" if reply.applied else "would be"
    console.print(f"run {reply.run}: pool version {reply.version} {done}", highlight=False, soft_wrap=True)
    _print(console, [str(change) for change in reply.changes])
    if reply.away:
        console.print("cannot be asked now, and others are until it can:", highlight=False)
        _print(console, reply.away)


def _print(console: Console, changes: list[str]) -> None:
    for change in changes:
        console.print(f"  {change}", highlight=False, soft_wrap=True, markup=False)


async def _get(path: str, url: str, api_key: str | None) -> Any:
    async with GatewayClient(url, api_key=api_key) as gateway:
        return await gateway.get(path)


async def _post(body: dict[str, Any], url: str, api_key: str | None) -> PoolReply:
    async with GatewayClient(url, api_key=api_key) as gateway:
        return PoolReply.model_validate(await gateway.post("/admin/pool", body))

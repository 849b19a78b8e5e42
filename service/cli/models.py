"""`reward-router models`: the pool of a running gateway, and what it has learned of each RM."""

from __future__ import annotations

import asyncio
import json
from typing import Annotated

import typer
from rich.console import Console

from service.cli.first_request import askable_lines
from service.cli.fitting import fitting_table
from service.lab.client import GatewayClient


def models(
    url: Annotated[str, typer.Option(help="The gateway.")] = "http://127.0.0.1:8080",
    run: Annotated[str | None, typer.Option(help="The run whose posterior is shown.")] = None,
    api_key: Annotated[str | None, typer.Option(help="API key.", envvar="REWARD_ROUTER_CLIENT_API_KEY")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Show each reward model of a running gateway: its workers, feedbacks so far, mean reward."""
    pool, posterior = asyncio.run(_ask(url, run, api_key))
    if as_json:
        typer.echo(json.dumps({"models": pool, "posterior": posterior}))
        return
    rows = []
    known = {learned["model"]: learned for learned in posterior["models"]}
    for arm in pool:
        # A referee is no arm: nothing is learned about whom to ask.
        learned = known.get(arm["name"])
        mean = None if learned is None else learned["mean_reward"]
        rows.append(
            (
                arm["name"],
                "yes" if arm["available"] else "[red]no[/]",
                ", ".join(f"{replica['url']} {replica['state']}" for replica in arm["replicas"]),
                arm["rendering"] or "–",
                "–" if arm["max_model_len"] is None else f"{arm['max_model_len']} tokens",
                "referee" if learned is None else str(learned["feedbacks"]),
                "–" if mean is None else f"{mean:.3f}",
                "–" if learned is None else f"{learned['sd']:.4f}",
            )
        )
    console = Console()
    for line in askable_lines(pool):
        console.print(line, highlight=False, markup=False, soft_wrap=True)
    columns = ("model", "available", "replicas", "sent", "reads", "feedbacks", "mean reward", "weight sd")
    title = f"run {posterior['run']}: {posterior['version']} events learned, prior {posterior['prior']}"
    drop = ("replicas", "sent", "reads", "weight sd", "mean reward")
    console.print(fitting_table(console, columns, rows, drop=drop, title=title))


async def _ask(url: str, run: str | None, api_key: str | None) -> tuple[list[dict], dict]:  # type: ignore[type-arg]
    async with GatewayClient(url, api_key=api_key) as client:
        query = f"?run={run}" if run else ""
        return await client.get("/models"), await client.get(f"/posterior{query}")

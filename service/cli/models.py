"""`reward-router models`: the pool of a running gateway, and what it has learned of each RM."""

from __future__ import annotations

import asyncio
import json
import tempfile
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from service.cli.export import export_run, running_store
from service.cli.first_request import askable_lines
from service.cli.fitting import fitting_table
from service.cli.key_option import key_option
from service.cli.store_option import store_option
from service.cli.url_option import Url
from service.lab.client import GatewayClient
from service.lab.eventlog.load import load_log
from service.settings import Settings, read_settings

FEEDBACKS = (
    "events: what the run's log holds (feedback, verdicts of audits, changes of the pool); feedbacks: events that said "
    "something of this scorer; mean reward: how well it did there, from 0 to 1"
)


def models(
    url: Url,
    store: Annotated[str | None, store_option(variable=False)] = None,
    data_dir: Annotated[
        Path | None, typer.Option(help="No gateway, but the store in this directory (or --store): what a log says.")
    ] = None,
    run: Annotated[str | None, typer.Option(help="The run whose posterior is shown.")] = None,
    api_key: Annotated[str | None, key_option()] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Show each reward model of a running gateway: its workers, feedbacks so far, mean reward.

    With --store or --data-dir: what a run's log says of each, without a gateway.
    """
    if store is not None or data_dir is not None:
        _show_log(read_settings(store_url=store, data_dir=data_dir, run=run), as_json)
        return
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
    console.print(FEEDBACKS, highlight=False, soft_wrap=True)


def _show_log(settings: Settings, as_json: bool) -> None:
    """Feedbacks and mean reward of each scorer, counted in the log of the settings' run."""
    with tempfile.TemporaryDirectory() as folder, running_store(settings) as url:
        out = Path(folder) / "log.jsonl"
        asyncio.run(export_run(url, settings, settings.run, out))
        log = load_log(out)
    told: dict[int, list[float]] = {arm: [] for arm in range(len(log.header.pool))}
    for event in log.events:
        for arm, reward in event.learned:
            told[arm].append(reward)
    found = [
        {
            "model": name,
            "feedbacks": len(told[arm]),
            "mean_reward": sum(told[arm]) / len(told[arm]) if told[arm] else None,
        }
        for arm, name in enumerate(log.header.pool)
    ]
    if as_json:
        typer.echo(json.dumps({"run": settings.run, "events": len(log.events), "models": found}))
        return
    rows = [
        (str(one["model"]), str(one["feedbacks"]), "–" if one["mean_reward"] is None else f"{one['mean_reward']:.3f}")
        for one in found
    ]
    console = Console()
    title = f"run {settings.run}: {len(log.events)} events in the log, prior {log.header.form}"
    console.print(fitting_table(console, ("model", "feedbacks", "mean reward"), rows, title=title))
    console.print(FEEDBACKS, highlight=False, soft_wrap=True)


async def _ask(url: str, run: str | None, api_key: str | None) -> tuple[list[dict], dict]:  # type: ignore[type-arg]
    async with GatewayClient(url, api_key=api_key) as client:
        query = f"?run={run}" if run else ""
        return await client.get("/models"), await client.get(f"/posterior{query}")

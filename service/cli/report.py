"""`reward-router report`: what the audits of a run say of who is right, as a table, JSON or a picture."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import urlencode

import typer
from rich.console import Console
from rich.table import Table

from service.cli.key_option import key_option
from service.errors import ConfigurationError
from service.lab.client import GatewayClient
from service.usecases.report import LENGTH, Estimate, RunReport, ScorerRecord


def report(
    run: Annotated[str, typer.Argument(help="Name of the run.")],
    url: Annotated[str, typer.Option(help="Origin of the gateway.")] = "http://127.0.0.1:8080",
    api_key: Annotated[str | None, key_option()] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")] = False,
    plot: Annotated[Path | None, typer.Option(help="Picture of the accuracies over time (PNG).")] = None,
) -> None:
    """Show what the audits of a run say: how often each scorer is right, how far the referee is, what rewards follow.

    Bounds hold however often one looks (docs/audits.md).
    """
    found = asyncio.run(_fetch(run, url, api_key))
    if plot is not None:
        draw(found, plot)
    if as_json:
        typer.echo(found.model_dump_json(indent=2))
    else:
        show(found, Console())


async def _fetch(run: str, url: str, api_key: str | None) -> RunReport:
    async with GatewayClient(url, api_key=api_key) as gateway:
        document: Any = await gateway.get("/report?" + urlencode({"run": run}))
    return RunReport.model_validate(document)


def show(found: RunReport, console: Console) -> None:
    """Print the report as tables."""
    console.print(f"run {found.run}: {found.audits} audits, {found.waiting} wait for a referee", highlight=False)
    if not found.audits:
        console.print("Nothing was audited yet: see `audit` in the pool file, docs/audits.md", highlight=False)
        return
    scorers = Table(title="How often each is right, by the referee")
    for column in ("scorer", "accuracy", "against gold", "over time", "fall", "length, partial", "more than referee"):
        scorers.add_column(column, justify="left" if column == "scorer" else "right")
    for record in [*found.scorers, found.router]:
        length = record.follows.get(LENGTH)
        scorers.add_row(
            record.model,
            _shown(record.accuracy),
            _shown(record.against_gold),
            " ".join("–" if part is None else f"{part:.2f}"[1:] if part < 1 else "1.0" for part in record.over_time),
            f"{record.fall:.2f}" + (" ALARM" if record.fall >= 1 else ""),
            _shown(length.partial if length else None),
            _shown(length.more if length else None),
        )
    console.print(scorers)
    if len(found.kinds) > 1:
        kinds = Table(title="By kind of text")
        kinds.add_column("kind")
        kinds.add_column("share", justify="right")
        for record in found.scorers:
            kinds.add_column(record.model, justify="right")
        for kind in found.kinds:
            cells = [_shown(record.kinds.get(kind.kind)) for record in found.scorers]
            kinds.add_row(kind.kind, f"{kind.share:.0%}", *cells)
        console.print(kinds)
    referees = Table(title="Referees against gold")
    for column in ("referee", "audits", "ties", "trust", "judged", "accuracy", "scorers there", "teaches"):
        referees.add_column(column, justify="left" if column == "referee" else "right")
    for one in found.referees:
        scorers_there = "–" if one.scorers is None else f"{one.scorers:.3f}"
        counts = (str(one.audits), str(one.ties), f"{one.trust:g}", str(one.judged))
        referees.add_row(one.referee, *counts, _shown(one.accuracy), scorers_there, "yes" if one.teaches else "NO")
    console.print(referees)
    for record in found.scorers:
        if record.liked is not None and record.liked.gamed:
            console.print(
                f"{record.model}: its best rewards rose by {record.liked.reward_change:.1f} sd, and it was right about "
                f"what it liked best {record.liked.before:.2f} of the time before, {record.liked.after:.2f} after",
                highlight=False,
                soft_wrap=True,
            )


def _shown(estimate: Estimate | None) -> str:
    return "–" if estimate is None else f"{estimate.value:.3f} [{estimate.low:.2f}, {estimate.high:.2f}]"


def draw(found: RunReport, path: Path) -> None:
    """Write the accuracies over time as a picture.

    Raises:
        ConfigurationError: matplotlib is not installed.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ConfigurationError(f"--plot needs matplotlib ({error}): pip install 'reward-router[train]'") from error
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    records: list[ScorerRecord] = [*found.scorers, found.router]
    for record in records:
        values = [float("nan") if part is None else part for part in record.over_time]
        style = "--" if record is found.router else "-"
        axes.plot(range(1, len(values) + 1), values, style, marker="o", label=record.model)
    axes.set(xlabel="audits, in equal parts", ylabel="share right, by the referee", title=f"run {found.run}")
    axes.set_ylim(0, 1.02)
    axes.legend(fontsize="small")
    figure.savefig(path, dpi=150)

"""`reward-router report`: what the audits of a run say of who is right, as a table, JSON or a picture."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import urlencode

import typer
from rich.console import Console

from service.cli.fitting import fitting_table
from service.cli.key_option import key_option
from service.cli.url_option import Url
from service.errors import ConfigurationError
from service.lab.client import GatewayClient
from service.usecases.report import LENGTH, Estimate, RunReport, ScorerRecord


def report(
    url: Url,
    run: Annotated[str | None, typer.Argument(help="Name of the run. (default: the only one)")] = None,
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


async def _fetch(run: str | None, url: str, api_key: str | None) -> RunReport:
    async with GatewayClient(url, api_key=api_key) as gateway:
        run = run or _only([one["run"] for one in await gateway.get("/runs")], url)
        document: Any = await gateway.get("/report?" + urlencode({"run": run}))
    return RunReport.model_validate(document)


def _only(runs: Sequence[str], url: str) -> str:
    """Return the one run that there is.

    Raises:
        ConfigurationError: there are none, or several; names them.
    """
    if len(runs) != 1:
        known = f"the gateway at {url} has {', '.join(runs)}" if runs else f"the gateway at {url} has no run yet"
        raise ConfigurationError(f"which run? {known}: `reward-router report RUN`")
    return runs[0]


def show(found: RunReport, console: Console) -> None:
    """Print the report as tables."""
    console.print(f"run {found.run}: {found.audits} audits, {found.waiting} wait for a referee", highlight=False)
    if not found.audits:
        console.print("Nothing was audited yet: see `audit` in the pool file, docs/audits.md", highlight=False)
        return
    rows: list[Sequence[str]] = []
    for record in [*found.scorers, found.router]:
        length = record.follows.get(LENGTH)
        rows.append(
            (
                record.model,
                _shown(record.accuracy),
                _shown(record.against_gold),
                _over_time(record.over_time),
                f"{record.fall:.2f}" + (" ALARM" if record.fall >= 1 else ""),
                _shown(length.partial if length else None),
                _shown(length.more if length else None),
            )
        )
    columns: Sequence[str] = (
        "scorer",
        "accuracy",
        "against gold",
        "over time",
        "fall",
        "length, partial",
        "more than referee",
    )
    drop: Sequence[str] = ("length, partial", "more than referee", "against gold", "over time")
    console.print(fitting_table(console, columns, rows, drop=drop, title="How often each is right, by the referee"))
    if len(found.kinds) > 1:
        by_kind: list[Sequence[str] | None] = []
        for kind in found.kinds:
            by_kind += [None, (f"{kind.kind}", f"{kind.share:.0%} of the decisions")]
            by_kind += [(f"  {record.model}", _shown(record.kinds.get(kind.kind))) for record in found.scorers]
        console.print(
            fitting_table(console, ("kind of text, scorer", "accuracy"), by_kind[1:], title="By kind of text")
        )
    rows = []
    for one in found.referees:
        scorers_there = "–" if one.scorers is None else f"{one.scorers:.3f}"
        counts = (str(one.audits), str(one.ties), f"{one.trust:g}", str(one.judged))
        rows.append((one.referee, *counts, _shown(one.accuracy), scorers_there, "yes" if one.teaches else "NO"))
    columns = ("referee", "audits", "ties", "trust", "judged", "accuracy", "scorers there", "teaches")
    drop = ("ties", "trust", "scorers there")
    console.print(fitting_table(console, columns, rows, drop=drop, title="Referees against gold"))
    console.print(
        "over time: accuracy in equal parts of the audits, oldest first; fall: evidence that it became worse, 1 is an "
        "alarm; docs/audits.md explains every column",
        highlight=False,
        soft_wrap=True,
    )
    for record in found.scorers:
        if record.liked is not None and record.liked.gamed:
            console.print(
                f"{record.model}: its best rewards rose by {record.liked.reward_change:.1f} sd, and it was right about "
                f"what it liked best {record.liked.before:.2f} of the time before, {record.liked.after:.2f} after",
                highlight=False,
                soft_wrap=True,
            )


def _over_time(parts: Sequence[float | None]) -> str:
    return " ".join("–" if part is None else f"{part:.2f}"[1:] if part < 1 else "1.0" for part in parts)


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

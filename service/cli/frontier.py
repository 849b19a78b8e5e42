"""`reward-router frontier`: accuracy against calls and price for every policy, before anything is paid."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
import typer
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from router_core.dataset import grouped_folds, pairs_digest, pool_names
from router_core.encoder.registry import load_backbone
from router_core.replay.table import complete_pairs
from service.cli.cache import Cache, UseCache, encodings_directory
from service.cli.data import DataReader, SkipBadRows, parse_pool
from service.cli.json_option import JsonOut, publish
from service.cli.prices import Price, parse_prices
from service.errors import ConfigurationError
from service.lab.eventlog.load import load_log
from service.lab.eventlog.targets import load_checkpoint

if TYPE_CHECKING:
    from router_core.offline.frontier import Point


def frontier(
    data: Annotated[
        Path,
        typer.Argument(
            help="JSONL of labelled pairs (docs/data.md); with --checkpoint, a log that `export` has written.",
            show_default=False,
        ),
    ],
    checkpoint: Annotated[
        Path | None,
        typer.Option(
            help="The checkpoint that a run was served with: DATA is that run's log, and the decisions are judged "
            "about which every RM was asked (shadows).",
            show_default=False,
        ),
    ] = None,
    pool: Annotated[str | None, typer.Option(help="RMs, comma-separated (default: all of the data).")] = None,
    encoder: Annotated[str, typer.Option(help="static, minilm, smollm2-135m or torch:DIR.")] = "static",
    budgets: Annotated[
        str, typer.Option(help="Mean prices per instance, comma-separated, in units of the cheapest RM.")
    ] = "1.2,1.5,2,2.5,3,4",
    price: Price = None,
    seeds: Annotated[int, typer.Option(min=1, help="Fits per fold; figures are their means.")] = 1,
    folds: Annotated[int, typer.Option(min=2, help="Grouped folds.")] = 5,
    cache: Cache = None,
    use_cache: UseCache = True,
    json_out: JsonOut = None,
    plot: Annotated[Path | None, typer.Option(help="Draw the picture: a path that ends in .png, .pdf or .svg.")] = None,
    skip_bad_rows: SkipBadRows = False,
) -> None:
    """What does a budget buy? Single RM, routing, cascades, judge when unsure, majorities, UWO, learned votes.

    Every pair is judged by a fit that has not seen its group. Intervals are 95 %, over groups and seeds. Pairs about
    which an RM of the pool was not asked are left out. From a run's log (--checkpoint): half of the decisions sets
    thresholds for the other half, and each counts with the inverse of its probability of being shadowed.
    """
    try:
        from router_core.offline.frontier import frontier as points_of
        from router_core.offline.frontier import undominated
        from router_core.offline.train import pair_features
    except ImportError as error:
        raise ConfigurationError(f"frontier needs torch ({error}): pip install 'reward-router[train]'") from error
    notes = Console(stderr=True)
    reader = DataReader(notes, skip_bad_rows)
    if checkpoint is not None:
        if pool is not None:
            raise typer.BadParameter("a log has its run's pool: leave it out", param_hint="pool")
        document, points = _of_log(data, checkpoint, parse_budgets(budgets), price)
        _publish(document, points, json_out, plot)
        return
    everything = reader.pairs(data)
    names = parse_pool(pool) or pool_names(everything)
    kept, missing = complete_pairs(everything, names)
    pairs = [everything[i] for i in kept]
    if missing:
        notes.print(f"[yellow]note[/] {len(everything) - len(pairs)} pairs were left out: an RM was not asked")
    wanted, costs = parse_budgets(budgets), parse_prices(price, names)
    backbone = load_backbone(encoder, encodings_directory(cache, use=use_cache))
    splits = {seed: grouped_folds(pairs, folds, np.random.default_rng(seed)) for seed in range(seeds)}
    with Progress(console=notes) as progress:
        features = pair_features(pairs, backbone)
        bar = progress.add_task("fitting", total=seeds * folds)
        points = points_of(
            pairs, names, splits, backbone, features, wanted, costs, on_fit=lambda: progress.advance(bar)
        )
    document = {
        "n": len(pairs),
        "pool": list(names),
        "prices": dict(zip(names, costs.tolist(), strict=True)),
        "points": [dataclasses.asdict(point) for point in points],
        "undominated": undominated(points),
        "folds": folds,
        "seeds": list(range(seeds)),
        "encoder": encoder,
        "digest": pairs_digest(pairs),
    }
    _publish(document, points, json_out, plot)
    reader.tell()


def _of_log(
    path: Path, directory: Path, budgets: Sequence[float], price: Sequence[str] | None
) -> tuple[dict[str, Any], list[Point]]:
    """The document and the points of a run's log."""
    from router_core.offline.frontier import undominated
    from service.lab.eventlog.frontier import logged_frontier

    log = load_log(path)
    checkpoint = load_checkpoint(directory, log.header)
    assert checkpoint is not None
    names = log.header.pool
    found = logged_frontier(log, checkpoint, budgets, parse_prices(price, names) if price else None)
    return {
        "n": found.n,
        "logged": found.logged,
        "run": log.header.run,
        "pool": list(names),
        "prices": dict(zip(names, found.prices.tolist(), strict=True)),
        "points": [dataclasses.asdict(point) for point in found.points],
        "undominated": undominated(found.points),
        "checkpoint": checkpoint.digest,
    }, found.points


def _publish(document: dict[str, Any], points: Sequence[Point], json_out: Path | None, plot: Path | None) -> None:
    """Draw the picture, write the JSON, print the table."""
    from router_core.offline.frontier_plot import plot_frontier

    if plot is not None:
        plot.parent.mkdir(parents=True, exist_ok=True)
        plot_frontier(points, plot, _title(document))
    publish(document, json_out, lambda: Console().print(_table(document)))


def _title(document: dict[str, Any]) -> str:
    rms = len(document["pool"])
    if "run" in document:
        return f"{document['n']} of {document['logged']} decisions of run {document['run']}, {rms} RMs"
    return f"{document['n']} pairs, {rms} RMs, {document['folds']} grouped folds"


def parse_budgets(text: str) -> list[float]:
    """Rising budgets above 1 of a comma-separated list."""
    try:
        budgets = sorted({float(part) for part in parse_pool(text)})
    except ValueError:
        budgets = []
    if not budgets or not all(1.0 < budget < np.inf for budget in budgets):
        raise typer.BadParameter(f"{text!r}: give numbers above 1, for example 1.5,2,3", param_hint="budgets")
    return budgets


def _table(document: dict[str, Any]) -> Table:
    table = Table(title=_title(document))
    table.add_column("policy", overflow="fold")
    for column in ("calls", "price", "accuracy", "95% interval"):
        table.add_column(column, justify="right", no_wrap=True)
    for point in document["points"]:
        best = point["policy"] in document["undominated"]
        shown = f"[bold]{point['policy']}[/]" if best else point["policy"]
        low, high = point["ci95"]
        table.add_row(
            shown,
            f"{point['calls']:.2f}",
            f"{point['price']:.2f}",
            f"{point['accuracy']:.3f}",
            f"{low:.3f} – {high:.3f}",
        )
    table.caption = "bold: no other row is more accurate at no higher a price"
    return table

"""`reward-router evaluate`: the paper's Table 2 for any labelled pairs."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
import typer
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from router_core.checkpoint import Checkpoint
from router_core.combine import wanted_combined
from router_core.dataset import pairs_digest, pool_names
from router_core.encoder.base import Backbone
from router_core.encoder.registry import load_backbone, load_checkpoint_backbone
from router_core.records import LabelledPair
from service.cli.cache import Cache, UseCache, encodings_directory
from service.cli.data import DataReader, SkipBadRows, parse_pool
from service.cli.evaluate_output import print_table
from service.cli.json_option import JsonOut, publish
from service.cli.prices import Price, parse_prices
from service.errors import ConfigurationError

if TYPE_CHECKING:
    from router_core.offline.table import Judged

EMBED_CHUNK = 64
"""Pairs embedded between two steps of the progress bar."""


@dataclass(frozen=True, slots=True)
class Task:
    """What is judged on what.

    Attributes:
        train, test: either may be None; see `evaluate`.
        pool: K names.
        encoders: specs, the default's first.
        seeds: fits per row, with seeds 0, 1, …
        folds: of the cross-validation, where there is no test.
        no_cls, ablations: which rows; see `offline.table.routers`.
        encodings: directory of stored encodings; None: none are stored.
        policies: rows that are wanted; none: all.
        prices: (K,) in units of the cheapest; None: equal.
    """

    train: list[LabelledPair] | None
    test: list[LabelledPair] | None
    pool: tuple[str, ...]
    encoders: tuple[str, ...]
    seeds: int
    folds: int
    no_cls: bool
    ablations: bool
    encodings: Path | None
    policies: tuple[str, ...] = ()
    prices: NDArray[np.float64] | None = None


def evaluate(
    train: Annotated[
        Path | None, typer.Option(help="JSONL of labelled pairs to learn from (docs/data.md).", show_default=False)
    ] = None,
    test: Annotated[
        Path | None,
        typer.Option(help="JSONL to judge on (default: grouped cross-validation on --train).", show_default=False),
    ] = None,
    checkpoint: Annotated[
        Path | None, typer.Option(help="Judge this checkpoint on --test, instead of learning.", show_default=False)
    ] = None,
    pool: Annotated[str | None, typer.Option(help="RMs, comma-separated (default: all of the data).")] = None,
    encoder: Annotated[
        str, typer.Option(help="Comma-separated: static, minilm, smollm2-135m, torch:DIR. The first is `offline`.")
    ] = "static",
    no_cls: Annotated[
        bool, typer.Option("--no-cls", help="Fit without the classification loss (the paper's w/o CLS).")
    ] = False,
    policies: Annotated[
        str | None,
        typer.Option(
            help="Rows, comma-separated: single:NAME, random, majority, uwo, stacked, cascade:B with B calls per "
            "instance on average, offline … (default: all, with cascade:1.5, 2 and 3).",
            show_default=False,
        ),
    ] = None,
    price: Price = None,
    ablations: Annotated[
        bool, typer.Option(help="Also judge each head alone, and the fit without classification loss.")
    ] = True,
    seeds: Annotated[int, typer.Option(min=1, help="Fits per router; its figures are their means.")] = 1,
    folds: Annotated[int, typer.Option(min=2, help="Folds where there is no --test.")] = 5,
    cache: Cache = None,
    use_cache: UseCache = True,
    json_out: JsonOut = None,
    skip_bad_rows: SkipBadRows = False,
) -> None:
    """How often is the asked RM right? Every RM, majority, UWO, random and our offline routers, per subset and in all.

    With 95% intervals, paired differences to the best single RM, and RM calls per instance. Pairs about which an RM
    of the pool was not asked are learned from, but not judged.
    """
    notes = Console(stderr=True)
    reader = DataReader(notes, skip_bad_rows)
    encodings = encodings_directory(cache, use=use_cache)
    wanted = parse_pool(policies) if policies else ()
    if checkpoint is not None:
        document = _judge_checkpoint(checkpoint, train, test, pool, encodings, wanted, reader, price)
    else:
        if train is None:
            raise typer.BadParameter("give FILE to learn from, or --checkpoint DIR to judge", param_hint="train")
        judged = None if test is None else reader.pairs(test)
        task = _task(reader.pairs(train), judged, pool, encoder, seeds, folds, no_cls, ablations, encodings)
        task = dataclasses.replace(task, policies=wanted, prices=parse_prices(price, task.pool))
        document = _judge_fits(task, notes)
    publish(document, json_out, lambda: print_table(document, Console()))
    reader.tell()


def _task(
    train: list[LabelledPair],
    test: list[LabelledPair] | None,
    pool: str | None,
    encoder: str,
    seeds: int,
    folds: int,
    no_cls: bool,
    ablations: bool,
    encodings: Path | None,
) -> Task:
    encoders = tuple(dict.fromkeys(parse_pool(encoder)))
    if not encoders:
        raise typer.BadParameter("name one encoder at least", param_hint="encoder")
    names = parse_pool(pool) or pool_names(train)
    if test is not None and not pool:
        names = tuple(name for name in names if name in set(pool_names(test)))
    if len(set(names)) != len(names) or not names:
        raise typer.BadParameter(f"{list(names)}: needs at least one name, each once", param_hint="pool")
    return Task(train, test, names, encoders, seeds, folds, no_cls, ablations, encodings)


def _judge_fits(task: Task, notes: Console) -> dict[str, Any]:
    """Fit and judge every row; without a test, by cross-validation."""
    try:
        from router_core.offline.figures import figures
        from router_core.offline.table import fits, fold_splits, held_out_split, judge_fitted, routers
        from router_core.offline.train import TrainConfig
    except ImportError as error:
        raise ConfigurationError(f"evaluate needs torch ({error}): pip install 'reward-router[train]'") from error
    assert task.train is not None
    config = TrainConfig(lambda_cls=0.0) if task.no_cls else TrainConfig()
    combined = wanted_combined(task.policies)
    rows = routers(task.encoders, config, ablations=task.ablations)
    pairs = [*task.train, *(task.test or ())]
    if task.test is None:
        splits = {seed: fold_splits(pairs, task.folds, seed) for seed in range(task.seeds)}
    else:
        splits = {seed: [held_out_split(len(task.train), len(task.test))] for seed in range(task.seeds)}
    overlap = None if task.test is None else _overlap(task.train, task.test)
    _warn_of_overlap(overlap, notes)
    backbones = {spec: load_backbone(spec, task.encodings) for spec in task.encoders}
    with _progress(notes) as progress:
        features = {spec: _embed(pairs, backbone, progress) for spec, backbone in backbones.items()}
        total = len(fits(rows)) * sum(len(parts) for parts in splits.values())
        bar = progress.add_task("fitting", total=total)
        judged = judge_fitted(
            pairs,
            task.pool,
            splits,
            rows,
            backbones,
            features,
            on_fit=lambda: progress.advance(bar),
            combined=combined,
            prices=task.prices,
        ).only(task.policies)
    _warn_of_gaps(judged, notes)
    return {
        **figures(judged),
        "scenario": "cross-validation" if task.test is None else "held-out",
        "folds": task.folds if task.test is None else None,
        "train_digest": pairs_digest(task.train),
        "test_digest": pairs_digest(task.train if task.test is None else task.test),
        "overlap": overlap,
        "seeds": list(range(task.seeds)),
        "encoders": list(task.encoders),
        "config": dataclasses.asdict(config),
    }


def _judge_checkpoint(
    directory: Path,
    train: Path | None,
    test: Path | None,
    pool: str | None,
    encodings: Path | None,
    policies: tuple[str, ...],
    reader: DataReader,
    price: Sequence[str] | None,
) -> dict[str, Any]:
    if test is None:
        raise typer.BadParameter("--checkpoint is judged on --test FILE: give it", param_hint="test")
    if train is not None:
        raise typer.BadParameter("--checkpoint is judged as it is: leave --train out", param_hint="train")
    try:
        from router_core.offline.figures import figures
        from router_core.offline.table import judge_checkpoint
    except ImportError as error:
        raise ConfigurationError(f"evaluate needs torch ({error}): pip install 'reward-router[train]'") from error
    combined = wanted_combined(policies)
    checkpoint = Checkpoint.load(directory)
    trained_on = checkpoint.data_digest
    checkpoint = checkpoint.select_pool(parse_pool(pool) or checkpoint.pool)
    prices = parse_prices(price, checkpoint.pool)
    notes = reader.notes
    pairs = reader.pairs(test)
    if pairs_digest(pairs) == trained_on:
        _warn(notes, "the checkpoint was trained on these very pairs: the figures say nothing of other pairs")
    with _progress(notes) as progress:
        features = _embed(pairs, load_checkpoint_backbone(checkpoint, encodings), progress)
    judged = judge_checkpoint(checkpoint, pairs, features, checkpoint.scores, combined, prices).only(policies)
    _warn_of_gaps(judged, notes)
    return {
        **figures(judged),
        "scenario": "checkpoint",
        "train_digest": trained_on,
        "test_digest": pairs_digest(pairs),
        "overlap": None,
        "seeds": [],
        "encoders": [checkpoint.encoder_spec],
        "checkpoint": checkpoint.digest,
    }


def _embed(pairs: Sequence[LabelledPair], backbone: Backbone, progress: Progress) -> NDArray[np.float32]:
    """`pair_features`, a chunk at a time."""
    from router_core.offline.train import pair_features

    bar = progress.add_task(f"embedding ({backbone.spec})", total=len(pairs))
    parts = []
    for start in range(0, len(pairs), EMBED_CHUNK):
        chunk = pairs[start : start + EMBED_CHUNK]
        parts.append(pair_features(chunk, backbone))
        progress.advance(bar, len(chunk))
    return np.concatenate(parts)


def _overlap(train: Sequence[LabelledPair], test: Sequence[LabelledPair]) -> dict[str, int]:
    """Groups and prompts of the test that were learned from, and the test pairs that they touch."""
    groups = {pair.group for pair in train}
    prompts = {pair.instance.prompt for pair in train}
    touched = [pair for pair in test if pair.group in groups or pair.instance.prompt in prompts]
    return {"groups": len({pair.group for pair in touched}), "pairs": len(touched)}


def _warn_of_overlap(overlap: Mapping[str, int] | None, notes: Console) -> None:
    if overlap and overlap["pairs"]:
        _warn(
            notes,
            f"{overlap['pairs']} test pairs, in {overlap['groups']} groups, share a group or a prompt with the "
            "training pairs: the routers have seen them; leave them out of --train for an honest figure",
        )


def _warn_of_gaps(judged: Judged, notes: Console) -> None:
    if judged.left_out:
        _warn(notes, f"{judged.left_out} pairs were not judged: an RM of the pool was not asked about them")
    if np.isnan(judged.table.scores).all(axis=2).any():
        _warn(notes, "no row `uwo`: it combines scores, and RMs of the pool gave verdicts without scores")


def _warn(notes: Console, text: str) -> None:
    notes.print(f"[yellow]note[/] {text}", highlight=False)


def _progress(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), console=console
    )

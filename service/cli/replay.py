"""`reward-router replay`: recorded pairs through the policies, in process or through a running gateway over HTTP."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from router_core.audits.schedule import Schedule
from router_core.checkpoint import Checkpoint
from router_core.dataset import pairs_digest, pool_names
from router_core.records import LabelledPair, Signal
from router_core.replay import (
    Audits,
    Delay,
    Scenario,
    Shift,
    SimulatedLoss,
    Table,
    Trace,
    complete_pairs,
    curve,
    merge,
    report,
    select,
    tabulate,
)
from router_core.replay import replay as replay_in_process
from router_core.replay.plot import plot_curves
from service.cli.cache import Cache, UseCache, encodings_directory
from service.cli.data import DataReader, SkipBadRows, parse_pool
from service.cli.json_option import JsonOut, publish
from service.cli.key_option import key_option
from service.cli.prices import Price, parse_prices
from service.cli.replay_output import curves_json, describe, gaps_sentence, headline, print_report
from service.errors import ConfigurationError
from service.lab.replaying.over_http import replay_over_http
from service.lab.replaying.parts import Options, Part, choose_parts, streamed

DEFAULT_POLICIES = "bayesian,offline,random,majority"

TABLE_POLICIES = ("random", "majority", "uwo", "laser", "bayesian:none", "offline", "bayesian:paper", "bayesian")
"""What `all` adds to the single RMs: every row of the paper's tables."""


class Ask(StrEnum):
    """Which RMs an audit speaks of."""

    ALL = "all"
    DRAWN = "drawn"


def replay(
    data: Annotated[Path, typer.Argument(help="JSONL of labelled pairs with each RM's scores (docs/data.md).")],
    pool: Annotated[
        str | None,
        typer.Option(help="RMs, comma-separated, in arm order (default: the checkpoint's, else all of the data)."),
    ] = None,
    policies: Annotated[
        str,
        typer.Option(
            help="Comma-separated; `singles`: every RM alone; `all`: every row of the paper's tables; `bayesian:FORM` "
            "sets the prior; `bayesian+shadow=0.1` asks every RM for that share and learns from all."
        ),
    ] = DEFAULT_POLICIES,
    price: Price = None,
    signal: Annotated[
        Signal,
        typer.Option(help="Feedback: preference, reward (was the asked RM right), or loss (a simulated DPO loss)."),
    ] = Signal.PREFERENCE,
    seeds: Annotated[int, typer.Option(min=1, help="Passes per policy; a seed fixes the order and the draws.")] = 3,
    checkpoint: Annotated[
        Path | None, typer.Option(help="Checkpoint whose prior is used. Not trained on DATA, please.")
    ] = None,
    train: Annotated[
        Path | None, typer.Option(help="Train the offline stage on this file of labelled pairs, here and now.")
    ] = None,
    encoder: Annotated[str, typer.Option(help="Encoder where there is no checkpoint.")] = "static",
    folds: Annotated[
        int, typer.Option(help="Grouped cross-validation: train on the other folds, stream each fold. 0: off.")
    ] = 0,
    shift: Annotated[
        str | None,
        typer.Option(
            help="DOMAIN[:STREAM[:OFFLINE]]: share of the domain in the stream (.8), in the offline data (.1)."
        ),
    ] = None,
    offline_domains: Annotated[
        str | None, typer.Option(help="Train only on these domains or subsets, comma-separated.")
    ] = None,
    stream_domains: Annotated[
        str | None, typer.Option(help="Stream only these domains or subsets, comma-separated.")
    ] = None,
    drift: Annotated[bool, typer.Option("--drift", help="Domains come in phases, one after another.")] = False,
    repeat: Annotated[int, typer.Option(min=1, help="Go through the stream so often, in new orders.")] = 1,
    delay: Annotated[
        str, typer.Option(help="Feedback arrives so many instances later: N, geometric:MEAN, or batch:SIZE.")
    ] = "0",
    audit: Annotated[
        str | None,
        typer.Option(help="RATE[:SCHEDULE]: no feedback but a referee's verdict on so many; schedule front or even."),
    ] = None,
    referee_accuracy: Annotated[
        float, typer.Option(min=0.5, max=1.0, help="With --audit: how often the referee is right.")
    ] = 1.0,
    audit_ask: Annotated[
        Ask, typer.Option(help="With --audit: RMs that an audited instance teaches, all or the drawn one.")
    ] = Ask.ALL,
    missing: Annotated[float, typer.Option(min=0.0, max=1.0, help="Share that never gets feedback.")] = 0.0,
    batch: Annotated[int, typer.Option(min=1, help="Instances that share one RM under `laser`.")] = Scenario().batch,
    loss_separation: Annotated[
        float, typer.Option(help="Signal loss: how far right and wrong verdicts are apart, in standard deviations.")
    ] = SimulatedLoss().separation,
    cache: Cache = None,
    use_cache: UseCache = True,
    url: Annotated[
        str | None, typer.Option(help="Replay through this running gateway, over HTTP with feedback.")
    ] = None,
    concurrency: Annotated[int, typer.Option(min=1, help="With --url: requests in flight.")] = 4,
    limit: Annotated[int | None, typer.Option(min=1, help="Only the first so many pairs.")] = None,
    api_key: Annotated[str | None, key_option("With --url: API key.")] = None,
    json_out: JsonOut = None,
    curve_out: Annotated[
        Path | None, typer.Option("--curve", help="Draw accuracy and regret along the stream into this .png.")
    ] = None,
    skip_bad_rows: SkipBadRows = False,
) -> None:
    """What would each policy have earned on these recorded pairs?

    Prints accuracy (was the reward's verdict right) with a 95% interval, RM calls per instance, regret, and the paired
    difference to the best single RM. docs/replay.md explains the scenarios and the JSON.
    """
    notes = Console(stderr=True)
    reader = DataReader(notes, skip_bad_rows)
    options = Options(
        checkpoint=checkpoint,
        train=train,
        folds=folds,
        shift=None if shift is None else Shift.parse(shift),
        offline_domains=parse_pool(offline_domains),
        stream_domains=parse_pool(stream_domains),
        encoder=encoder,
        cache=encodings_directory(cache, use=use_cache),
        signal=signal,
    )
    options.check(over_http=url is not None)
    audits = None if audit is None else _audits(audit, referee_accuracy, audit_ask, over_http=url is not None)
    scenario = Scenario(repeat, drift, Delay.parse(delay), missing, batch, SimulatedLoss(loss_separation), audits)
    pairs = reader.pairs(data)[:limit]
    loaded = None if checkpoint is None else Checkpoint.load(checkpoint)
    names = parse_pool(pool) or (pool_names(pairs) if loaded is None else loaded.pool)
    complete, gaps = complete_pairs(pairs, names)
    scored = all(name in pairs[i].scores or name in pairs[i].abstained for i in complete for name in names)
    job = Job(policy_names(policies, names, scored=scored), range(seeds), signal, scenario, parse_prices(price, names))
    if not scored and "all" in parse_pool(policies):
        notes.print("[yellow]note[/] no `uwo`: it combines scores, and the data hold verdicts without scores")
    if gaps:
        notes.print(f"[yellow]note[/] {gaps_sentence(len(pairs), len(complete), gaps)}", highlight=False)
    if url is not None:
        table, traces = _over_http(pairs, names, streamed(pairs, complete, options), job, url, concurrency, api_key)
        origin: dict[str, Any] = {"url": True}
    else:
        parts = choose_parts(
            pairs,
            names,
            complete,
            options,
            None if loaded is None else loaded.select_pool(names),
            lambda text: notes.print(f"[yellow]note[/] {text}", highlight=False),
            reader.pairs,
        )
        table, traces = _in_process(pairs, names, parts, job)
        origin = {"offline": [part.origin for part in parts]}
    curves = {name: curve(trace, table) for name, trace in traces.items()}
    figures = report(traces, table) | {
        "left_out": len(pairs) - len(complete),
        "missing": gaps,
        "data_digest": pairs_digest(pairs),
        "signal": "loss (simulated)" if signal is Signal.LOSS else signal.value,
        "scenario": describe(options, scenario, signal) | origin,
        "curve": curves_json(curves),
    }
    if curve_out is not None:
        plot_curves(curves, curve_out, headline(figures))
    publish(figures, json_out, lambda: print_report(figures))
    reader.tell()


def _audits(text: str, accuracy: float, ask: Ask, *, over_http: bool) -> Audits:
    """Read `--audit` and what belongs to it."""
    if over_http:
        raise ConfigurationError(
            "--audit with --url: a gateway has referees of its own (docs/audits.md); leave --audit out, and send no "
            "feedback with --missing 1"
        )
    schedule = Schedule.parse(text)
    return Audits(schedule.rate, schedule.name, accuracy, ask is Ask.ALL)


@dataclass(frozen=True, slots=True)
class Job:
    """What is replayed: policies, seeds, kind of feedback, what happens to the stream, prices (K,)."""

    policies: Sequence[str]
    seeds: Sequence[int]
    signal: Signal
    scenario: Scenario
    prices: NDArray[np.float64]

    def steps(self, pairs: int) -> int:
        """Instances over all passes: for the progress bar."""
        return pairs * len(self.policies) * len(self.seeds) * self.scenario.repeat


def policy_names(text: str, pool: Sequence[str], *, scored: bool = True) -> list[str]:
    """The policies of a comma-separated list with its shorthands, each once.

    Args:
        scored: scores are recorded for every RM; without them `all` has no `uwo`.

    Raises:
        UnknownPolicyError: one does not exist.
    """
    singles = [f"single:{model}" for model in pool]
    names: list[str] = []
    for name in parse_pool(text):
        if name == "singles":
            names.extend(singles)
        elif name == "all":
            names.extend([*singles, *(name for name in TABLE_POLICIES if scored or name != "uwo")])
        else:
            names.append(name)
    for name in names:
        select(name, pool)
    if not names:
        raise ConfigurationError(f"--policies {text!r} names none: give for example {DEFAULT_POLICIES}")
    return list(dict.fromkeys(names))


def _in_process(
    pairs: Sequence[LabelledPair], pool: Sequence[str], parts: Sequence[Part], job: Job
) -> tuple[Table, dict[str, Trace]]:
    """All parts, each from a fresh start; their traces as one over the pairs that any part streamed."""
    union = np.sort(np.concatenate([part.stream for part in parts]))
    table = tabulate([pairs[i] for i in union], pool)
    merged = []
    with _progress(job.steps(len(table))) as advance:
        for part in parts:
            rows = np.searchsorted(union, part.stream)
            traces = replay_in_process(
                table.rows(rows),
                part.x,
                job.policies,
                priors=part.priors,
                signal=job.signal,
                seeds=job.seeds,
                on_step=advance,
                scenario=job.scenario,
                scale=part.scale,
                combination=part.combination,
                prices=job.prices,
            )
            merged.append((rows, traces))
    return table, merge(merged, len(table))


def _over_http(
    pairs: Sequence[LabelledPair],
    pool: Sequence[str],
    stream: NDArray[np.int64],
    job: Job,
    url: str,
    concurrency: int,
    api_key: str | None,
) -> tuple[Table, dict[str, Trace]]:
    chosen = [pairs[i] for i in stream]
    table = tabulate(chosen, pool)
    with _progress(job.steps(len(table))) as advance:
        traces = asyncio.run(
            replay_over_http(
                chosen,
                table,
                job.policies,
                job.seeds,
                url,
                job.signal,
                concurrency,
                api_key,
                advance,
                scenario=job.scenario,
            )
        )
    return table, traces


@contextmanager
def _progress(total: int) -> Iterator[Callable[[int], None]]:
    """A bar on standard error; yields what to tell it."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task("replay", total=total)
        yield lambda done: progress.advance(task, done)

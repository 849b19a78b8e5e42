"""`reward-router label`: ask every RM of a running pool about labelled pairs, and write the rows that `train` reads."""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
    TimeRemainingColumn,
)
from rich.text import Text

from router_core.records import Instance
from router_core.rows import Row
from service.cli.data import DataReader, SkipBadRows, parse_pool
from service.cli.fitting import fitting_table
from service.cli.json_option import JsonOut, publish
from service.cli.key_option import key_option
from service.cli.processes import interruptible
from service.errors import ConfigurationError, ServiceError
from service.lab.client import GatewayClient
from service.lab.labelling.ask import AskPolicy, ModelAsker, is_failure
from service.lab.labelling.gateway import GatewayScorer
from service.lab.labelling.journal import Answer, Journal, content_key, write_atomically
from service.lab.labelling.rows import Known, earlier_answers, labelled_lines, summarise
from service.pool import PoolFile, load_pool
from service.scorers.protocol import Scorer
from service.scorers.registry import build_scorer
from service.settings import read_settings

FAILED_ROWS = 3
"""Exit status when all was asked, and an RM failed on some rows."""

INTERRUPTED = 130
"""Exit status after SIGINT or SIGTERM."""

Wanted = Mapping[str, Sequence[tuple[str, Instance]]]
"""Per RM, the contents that it is asked about."""

_log = logging.getLogger("service.workers")


def label(
    data: Annotated[Path, typer.Argument(help="JSONL of pairs (docs/data.md); their `rm` may be absent or partial.")],
    out: Annotated[Path, typer.Option(help="File that is written when all have answered; DATA itself is allowed.")],
    pool: Annotated[
        Path | None, typer.Option(help="Pool file (YAML) with the workers' URLs, such as the one that `up` writes.")
    ] = None,
    url: Annotated[str | None, typer.Option(help="A running gateway, whose pool is asked, instead of --pool.")] = None,
    api_key: Annotated[str | None, key_option("API key of that gateway.")] = None,
    models: Annotated[str | None, typer.Option(help="Only these RMs of the pool, comma-separated.")] = None,
    concurrency: Annotated[int, typer.Option(min=1, help="Batches in flight per RM.")] = 4,
    batch: Annotated[int, typer.Option(min=1, help="Pairs per batch, where the rendering takes several.")] = 16,
    timeout: Annotated[float, typer.Option(min=0.1, help="Seconds for one batch.")] = 120.0,
    patience: Annotated[float, typer.Option(min=0.0, help="Seconds that a worker may be away.")] = 120.0,
    retry_missing: Annotated[bool, typer.Option("--retry-missing", help="Ask again what an RM refused.")] = False,
    again: Annotated[bool, typer.Option("--again", help="Ask everything again, also what is known.")] = False,
    json_out: JsonOut = None,
    skip_bad_rows: SkipBadRows = False,
) -> None:
    """Ask the reward models of a running pool for the scores of each pair's responses.

    Answers are kept as they come, in OUT.partial: an interrupted run goes on where it was when the same command is
    given again. What the rows, or an earlier OUT, hold already is not asked, so that adding an RM asks that one alone.

    A row on which an RM fails is noted in its `rm_missing` and passed; the last line and exit status 3 say so.
    """
    interruptible()
    console = Console(stderr=True)
    reader = DataReader(console, skip_bad_rows)
    makers = _chosen(pool, url, api_key, models, concurrency, timeout)
    rows = reader.rows(data)
    _warn_of_unlabelled(rows, console)
    policy = AskPolicy(concurrency, batch, timeout, patience)
    with Journal(out.with_name(out.name + ".partial")) as journal:
        known = Known(rows, [content_key(row.instance) for row in rows], _earlier(rows, out, reader), journal.answers)
        wanted = {name: known.to_ask(name, retry_missing=retry_missing, again=again) for name in makers}
        seconds = _ask_all([makers[name] for name in makers if wanted[name]], wanted, policy, journal, console)
        write_atomically(out, labelled_lines(known, list(wanted)))
        journal.remove()
    summary = {"out": str(out), "seconds": seconds, **summarise(known, {name: len(wanted[name]) for name in wanted})}
    publish(summary, json_out, lambda: _show(summary, Console()))
    reader.tell()
    failed = _failed(summary)
    if failed:
        console.print(
            f"failed: {', '.join(f'{name} on {count} rows' for name, count in failed.items())}; `rm_missing` in {out} "
            "says why, --retry-missing asks again",
            highlight=False,
            soft_wrap=True,
        )
        raise typer.Exit(FAILED_ROWS)


def _failed(summary: Mapping[str, Any]) -> dict[str, int]:
    """Rows on which an RM failed, by RM; without those that it refused."""
    counts = {
        name: sum(count for kind, count in row["missing"].items() if is_failure(kind))
        for name, row in summary["models"].items()
    }
    return {name: count for name, count in counts.items() if count}


def _chosen(
    pool: Path | None, url: str | None, api_key: str | None, models: str | None, concurrency: int, timeout: float
) -> dict[str, Callable[[], Scorer]]:
    """Return what makes each scorer that is to be asked, by name.

    Raises:
        ConfigurationError: not exactly one of `pool` and `url`, or an unknown name among `models`.
        GatewayError: the gateway does not answer.
    """
    if (pool is None) == (url is None):
        raise ConfigurationError(
            "give --url GATEWAY of a running gateway, or --pool FILE of a pool whose workers have `urls` (`up` writes "
            "one: DATA_DIR/pool.yaml)"
        )
    makers = {} if pool is None else _of_pool(load_pool(pool), timeout)
    if url is not None:
        makers = _of_gateway(url, api_key, concurrency)
    names = parse_pool(models)
    unknown = [name for name in names if name not in makers]
    if unknown:
        raise ConfigurationError(f"--models names {', '.join(unknown)}, the pool holds {', '.join(makers)}")
    return {name: make for name, make in makers.items() if not names or name in names}


def _of_pool(pool: PoolFile, timeout: float) -> dict[str, Callable[[], Scorer]]:
    settings = read_settings(worker_timeout_seconds=timeout)
    return {entry.name: partial(build_scorer, entry, settings, pool) for entry in pool.models}


def _of_gateway(url: str, api_key: str | None, concurrency: int) -> dict[str, Callable[[], Scorer]]:
    async def names() -> list[str]:
        async with GatewayClient(url, api_key=api_key) as client:
            return [model["name"] for model in await client.get("/models") if not model["referee"]]

    # A run of its own, so that what is asked here teaches and audits no training run.
    run = f"label-{secrets.token_hex(4)}"
    return {name: partial(GatewayScorer, name, url, api_key, concurrency, run) for name in asyncio.run(names())}


def _earlier(rows: Sequence[Row], out: Path, reader: DataReader) -> dict[tuple[str, str], Answer]:
    """What an earlier output, and the input's own notes of refusals, answer already."""
    answers = {key: answer for key, answer in earlier_answers(rows).items() if answer.scores is None}
    if out.exists():
        earlier = reader.rows(out)
        lost = {row.id for row in earlier} - {row.id for row in rows}
        if lost:
            raise ConfigurationError(
                f"{out} holds {len(lost)} rows that the input has not (such as {sorted(lost)[0]!r}) and would be lost: "
                "choose another --out"
            )
        answers |= earlier_answers(earlier)
    return answers


def _warn_of_unlabelled(rows: Sequence[Row], console: Console) -> None:
    unlabelled = sum(row.label is None for row in rows)
    if unlabelled:
        console.print(
            f"[yellow]note[/] {unlabelled} of {len(rows)} rows have no label: they are scored and passed on; `train` "
            "needs one, `train --consensus` does without",
            highlight=False,
        )


def _ask_all(
    makers: Sequence[Callable[[], Scorer]], wanted: Wanted, policy: AskPolicy, journal: Journal, console: Console
) -> float:
    """Ask all RMs at once; returns the seconds that it took.

    Raises:
        typer.Exit: interrupted.
        ServiceError: an RM stayed away or refuses us; the others have been asked nevertheless.
    """
    if not makers:
        return 0.0
    began = time.monotonic()
    arms = [make() for make in makers]
    try:
        with _progress(console) as progress, _worker_notes(progress.console):
            failures = asyncio.run(_ask_pool(arms, wanted, policy, journal, progress))
    except KeyboardInterrupt:
        console.print(f"interrupted: {_kept(journal)}", highlight=False)
        raise typer.Exit(INTERRUPTED) from None
    if failures:
        raise type(failures[0])("; ".join(error.message for error in failures) + f". {_kept(journal)}")
    return time.monotonic() - began


def _kept(journal: Journal) -> str:
    return f"{len(journal.answers)} answers are kept in {journal.path}; the same command goes on from there"


async def _ask_pool(
    arms: Sequence[Scorer], wanted: Wanted, policy: AskPolicy, journal: Journal, progress: Progress
) -> list[ServiceError]:
    """All RMs at once; returns the errors of those that could not be asked to the end."""
    try:
        await asyncio.gather(*(arm.check() for arm in arms))
        for arm in arms:
            arm.start()
        askers = [_asker(arm, policy, _recorder(arm.name, len(wanted[arm.name]), journal, progress)) for arm in arms]
        outcomes = await asyncio.gather(
            *(_asked(asker, wanted[arm.name]) for arm, asker in zip(arms, askers, strict=True))
        )
    finally:
        await asyncio.gather(*(arm.close() for arm in arms))
    return [outcome for outcome in outcomes if outcome is not None]


async def _asked(asker: ModelAsker, instances: Sequence[tuple[str, Instance]]) -> ServiceError | None:
    try:
        _require_usable(asker.arm)
        await asker.run(instances)
    except ServiceError as error:
        return error
    return None


def _asker(arm: Scorer, policy: AskPolicy, record: Callable[[Sequence[Answer]], None]) -> ModelAsker:
    """Return what asks one scorer: where a request holds one conversation, with one pair a batch."""
    if arm.status().rendering == "messages":
        policy = replace(policy, batch=1)

    def describe() -> str:
        return "; ".join(f"{one.url}: {one.problem or one.state}" for one in arm.status().replicas)

    return ModelAsker(arm, policy, record, describe)


def _require_usable(arm: Scorer) -> None:
    """Raises ConfigurationError if the probe has found every replica unfit: no waiting helps."""
    problems = [one.problem for one in arm.status().replicas]
    if problems and all(problems):
        raise ConfigurationError(f"RM {arm.name!r}: {'; '.join(filter(None, problems))}")


def _recorder(model: str, total: int, journal: Journal, progress: Progress) -> Callable[[Sequence[Answer]], None]:
    task = progress.add_task(model, total=total, missing="")
    missing = 0

    def record(answers: Sequence[Answer]) -> None:
        nonlocal missing
        journal.append(answers)
        missing += sum(answer.scores is None for answer in answers)
        progress.update(task, advance=len(answers), missing=f"{missing} without score" if missing else "")

    return record


class _RateColumn(ProgressColumn):
    """Pairs per second."""

    def render(self, task: Task) -> Text:
        """A dash until there is a speed."""
        return Text("–" if task.speed is None else f"{task.speed:.1f} pairs/s", style="progress.data.speed")


def _progress(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        _RateColumn(),
        TimeRemainingColumn(),
        TextColumn("[yellow]{task.fields[missing]}"),
        console=console,
    )


@contextmanager
def _worker_notes(console: Console) -> Iterator[None]:
    """What the workers' clients log, as lines above the progress bars."""

    class Handler(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            fields = getattr(record, "fields", {})
            console.print(
                f"[yellow]note[/] {record.getMessage()}: "
                + ", ".join(str(value) for value in fields.values() if value is not None),
                highlight=False,
            )

    handler = Handler(logging.WARNING)
    propagate = _log.propagate
    _log.addHandler(handler)
    _log.propagate = False
    try:
        yield
    finally:
        _log.removeHandler(handler)
        _log.propagate = propagate


def _show(summary: Mapping[str, Any], console: Console) -> None:
    rows = []
    for name, row in summary["models"].items():
        missing = ", ".join(f"{count} {reason}" for reason, count in row["missing"].items())
        accuracy = "–" if row["accuracy"] is None else f"{row['accuracy']:.3f}"
        rows.append((name, str(row["asked"]), str(row["scored"]), accuracy, missing))
    columns = ("RM", "asked now", "scored", "right", "without score")
    title = f"{summary['rows']} rows in {summary['out']}, {summary['seconds']:.0f} s"
    console.print(fitting_table(console, columns, rows, drop=("asked now",), title=title))

"""What `up --dry-run` and `serve --dry-run` look at: a line a check, and nothing is started.

A check is a sentence and, where it fails, the reason with its remedy. Servers that the pool file names are probed as
the gateway probes them. Called by `service.cli.up` and `service.cli.serve`.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

import typer

from router_core.errors import RouterCoreError
from service.cli.export import running_store
from service.cli.preflight import Preflight
from service.cli.processes import answers, gateway_port
from service.errors import ServiceError
from service.pool import Entry, ModelEntry, PoolFile
from service.scorers.judge.entry import JudgeEntry
from service.scorers.registry import build_scorer
from service.scorers.rule.entry import RuleEntry
from service.settings import EMBEDDED, Settings, store_directory
from service.stores.embedded import EmbeddedStore

FAILED: Final = 1
"""Exit status where a check fails."""

REMOTE_ENCODER: Final = "vllm:"
"""What `--encoder` begins with where a server has it."""


@dataclass(frozen=True, slots=True)
class Check:
    """One thing that was looked at.

    Attributes:
        sentence: what, and what was found where it is well.
        problem: why it fails, and what to do; None where it does not.
    """

    sentence: str
    problem: str | None = None

    def __str__(self) -> str:
        """Return it as a comment of a shell script."""
        return f"# ok     {self.sentence}" if self.problem is None else f"# FAILS  {self.sentence}: {self.problem}"


def tell(checks: Iterable[Check]) -> None:
    """Print the checks.

    Raises:
        typer.Exit: with status `FAILED` where one fails.
    """
    failed = total = 0
    for check in checks:
        typer.echo(str(check))
        total, failed = total + 1, failed + (check.problem is not None)
    typer.echo(f"# {total - failed} of {total} checks passed; nothing was started")
    if failed:
        raise typer.Exit(FAILED)


def tried(sentence: str, act: Callable[[], object]) -> Check:
    """Return the check that holds if the act raises no error of ours."""
    try:
        act()
    except (ServiceError, RouterCoreError) as error:
        return Check(sentence, str(error))
    return Check(sentence)


def fit_check(start: Callable[[], Preflight]) -> Check:
    """Return the check that a gateway could be built and open its run.

    Nothing is started but, for a moment, an embedded store that is there.

    Args:
        start: settings, pool and checkpoint; raises where they do not fit each other.
    """
    found: list[str] = []

    def act() -> None:
        preflight = start()
        settings = preflight.settings
        kept = EmbeddedStore(store_directory(settings.data_dir))
        if settings.store_url == EMBEDDED and not (kept.data_dir / "appendonlydir").is_dir():
            preflight.check_parts(kept.url)
            found.append(f"run {settings.run!r} will be new")
            return
        with running_store(settings) as url:
            preflight.check_store(url)
        found.append(f"the store takes run {settings.run!r}")

    check = tried("settings, pool file and checkpoint fit each other", act)
    return replace(check, sentence="; ".join([check.sentence, *found]))


def port_check(given: int | None, host: str, *, moves: bool) -> Check:
    """Return the check of the gateway's port.

    Args:
        given: port that was asked for; None for the usual one.
        host: address that it will listen on.
        moves: the gateway takes another port where the usual one is taken.
    """
    try:
        port, warning = gateway_port(given, host)
    except ServiceError as error:
        return Check(f"port {given} of {host}", error.message)
    if warning is None:
        return Check(f"port {port or 'any'} of {host} is free")
    return Check(f"{warning}, or what is free then") if moves else Check(f"port of {host}", f"{warning}: give --port")


def directory_check(path: Path, *, free: bool) -> Check:
    """Return the check that the data directory can be written.

    Args:
        path: the directory.
        free: its embedded store must not be another process's.
    """
    owner = EmbeddedStore(store_directory(path)).owner() if free else None
    if owner is not None:
        return Check(
            f"data directory {path}",
            f"process {owner} has its store: end that process (an earlier `up`?), or give another --data-dir",
        )
    there = next(one for one in (path.absolute(), *path.absolute().parents) if one.exists())
    if there.is_dir() and os.access(there, os.W_OK | os.X_OK):
        return Check(f"data directory {path} can be written")
    return Check(f"data directory {path}", f"{there} cannot be written: give another --data-dir, or change its rights")


def encoder_check(encoder: str) -> Check:
    """Return the check of a running encoder's server."""
    url = encoder.removeprefix(REMOTE_ENCODER).rstrip("/")
    if answers(f"{url}/health"):
        return Check(f"encoder at {url} answers")
    return Check(f"encoder at {url}", "GET /health does not answer 200: start it, or correct --encoder")


def scorer_checks(pool: PoolFile, settings: Settings, *, starts: bool) -> list[Check]:
    """Return a check of each scorer and referee: its servers answer the probe, or what is to be served is there.

    Args:
        pool: the pool file.
        settings: of the gateway.
        starts: scorers without `urls` will be started.
    """
    entries = [*pool.models, *pool.referees]
    probed = asyncio.run(_probed([entry for entry in entries if entry.urls], settings, pool))
    return [probed[entry.name] if entry.urls else _local(entry, starts=starts) for entry in entries]


async def _probed(entries: Iterable[Entry], settings: Settings, pool: PoolFile) -> dict[str, Check]:
    entries = list(entries)
    found = await asyncio.gather(*(_probe(entry, settings, pool) for entry in entries))
    return {entry.name: check for entry, check in zip(entries, found, strict=True)}


async def _probe(entry: Entry, settings: Settings, pool: PoolFile) -> Check:
    sentence = f"{entry.name}: {', '.join(entry.urls)}"
    try:
        scorer = build_scorer(entry, settings, pool)
    except ServiceError as error:
        return Check(sentence, str(error))
    try:
        await scorer.check()
        status = scorer.status()
    finally:
        await scorer.close()
    away = [one for one in status.replicas if one.problem is not None or one.state != "closed"]
    if not away:
        return Check(f"{sentence} answers as a scorer")
    told = "; ".join(f"{one.url} {one.problem or 'does not answer: start it, or correct `urls`'}" for one in away)
    return Check(sentence, told)


def _local(entry: Entry, *, starts: bool) -> Check:
    """Look at what a scorer without `urls` would be started from."""
    if not starts:
        return Check(entry.name, "has no `urls`, and `serve` starts no workers: name its servers, or use `up`")
    files: list[Path] = []
    if isinstance(entry, ModelEntry | JudgeEntry):
        files = [entry.path / "config.json"] if entry.path is not None else []
        if isinstance(entry, ModelEntry) and entry.recorded is not None:
            files = [entry.recorded]
        if not files and entry.model is not None:
            return Check(f"{entry.name}: {entry.model}, from the hub or its cache when it starts (not looked for)")
    elif isinstance(entry, RuleEntry):
        if entry.file is None:
            return Check(f"{entry.name}: the built-in rule {entry.builtin}")
        files = [Path(entry.file.rpartition(":")[0])]
    missing = [file for file in files if not file.is_file()]
    if missing:
        return Check(entry.name, f"{missing[0]}: no such file; correct the pool file's path, relative to that file")
    return Check(f"{entry.name}: {', '.join(map(str, files))} is there")

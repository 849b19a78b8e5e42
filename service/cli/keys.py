"""`reward-router keys`: make, list and end the keys of a keys file. Gateways take a change within a second."""

from __future__ import annotations

import json
import re
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Annotated

import msgspec
import typer
from rich.console import Console

from service.cli.fitting import fitting_table
from service.errors import ConfigurationError
from service.keys.access import Scope
from service.keys.file import KeyEntry, KeyFile, KeyLimits, changing, entry_of, new_key, read_key_file, write_key_file

app = typer.Typer(help="Make, list and end API keys. Gateways take a change within a second.", no_args_is_help=True)

File = Annotated[
    Path, typer.Option("--file", envvar="REWARD_ROUTER_KEYS_FILE", show_envvar=True, help="The keys file.")
]

UNITS = {"m": "minutes", "h": "hours", "d": "days"}


@app.command("new")
def new(
    name: Annotated[str, typer.Argument(help="Who will have it. A name that is taken makes a key beside the first.")],
    file: File,
    scope: Annotated[
        list[Scope] | None,
        typer.Option(help="What it is for; may be repeated. (default: reward and feedback, what a trainer needs)"),
    ] = None,
    run: Annotated[
        list[str] | None,
        typer.Option(help="A run that it may name; * stands for anything. (default: every run)"),
    ] = None,
    expires: Annotated[
        str | None, typer.Option(help="When it ends: 12h, 90d, or a time like 2027-01-31T00:00Z. (default: never)")
    ] = None,
    instances_per_minute: Annotated[int | None, typer.Option(min=1, help="Instances a minute.")] = None,
    max_in_flight: Annotated[int | None, typer.Option(min=1, help="Requests under way at once.")] = None,
) -> None:
    """Make a key. It is printed once, on standard output; the file keeps its hash."""
    key = new_key()
    made = entry_of(
        key,
        name,
        scope or [Scope.REWARD, Scope.FEEDBACK],
        runs=run,
        expires=None if expires is None else _time_of(expires),
        limits=KeyLimits(instances_per_minute, max_in_flight),
    )
    with changing(file):
        standing = read_key_file(file) if file.exists() else KeyFile()
        write_key_file(file, KeyFile([*standing.keys, made]))
    _hand_over(key, made)
    if Scope.READ not in made.scopes:
        Console(stderr=True).print(
            "It reads nothing: `models`, `runs --url`, `report`, `pool show` and the console need a key with "
            "--scope read, which shows prompts and responses of audits",
            highlight=False,
            soft_wrap=True,
        )


@app.command("rotate")
def rotate(
    name: Annotated[str, typer.Argument(help="The key's name.")],
    file: File,
    overlap: Annotated[str, typer.Option(help="How long the old key stays valid: 30m, 24h, 7d.")] = "24h",
) -> None:
    """Make a new key with the rights of the one of that name, which ends after the overlap."""
    key, ends = new_key(), _time_of(overlap)
    with changing(file):
        standing = read_key_file(file)
        newest = _named(standing, name, file)[-1]
        made = entry_of(key, name, newest.scopes, runs=newest.runs, expires=newest.expires, limits=newest.limits)
        kept = [
            msgspec.structs.replace(entry, expires=ends)
            if entry.name == name and (entry.expires is None or entry.expires > ends)
            else entry
            for entry in standing.keys
        ]
        write_key_file(file, KeyFile([*kept, made]))
    _hand_over(key, made)


@app.command("list")
def list_keys(
    file: File, as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False
) -> None:
    """List the keys: names, scopes, runs, limits. A key itself is nowhere."""
    found = read_key_file(file).keys
    if as_json:
        typer.echo(json.dumps([{"id": entry.id, **msgspec.to_builtins(entry)} for entry in found]))
        return
    now = datetime.now(UTC)
    columns = ("name", "id", "scopes", "runs", "a minute", "in flight", "created", "expires")
    rows = [
        (
            entry.name,
            entry.id,
            " ".join(entry.scopes),
            "all" if entry.runs is None else " ".join(entry.runs),
            "–" if entry.limits.instances_per_minute is None else str(entry.limits.instances_per_minute),
            "–" if entry.limits.max_in_flight is None else str(entry.limits.max_in_flight),
            "–" if entry.created is None else f"{entry.created:%Y-%m-%d}",
            "never" if entry.expires is None else _ending(entry.expires, now),
        )
        for entry in found
    ]
    console = Console()
    drop = ("created", "in flight", "a minute", "runs")
    console.print(fitting_table(console, columns, rows, drop=drop, title=f"{len(rows)} keys"))


@app.command("revoke")
def revoke(
    name: Annotated[str, typer.Argument(help="A key's name, or its id where several have the name.")], file: File
) -> None:
    """End every key of that name at once, or the one of that id."""
    with changing(file):
        standing = read_key_file(file)
        gone = [entry for entry in standing.keys if entry.id == name] or _named(standing, name, file)
        write_key_file(file, KeyFile([entry for entry in standing.keys if entry not in gone]))
    Console(stderr=True).print(f"{len(gone)} keys of {gone[0].name} revoked", highlight=False)


def _named(file: KeyFile, name: str, path: Path) -> list[KeyEntry]:
    found = [entry for entry in file.keys if entry.name == name]
    if not found:
        names = ", ".join(sorted({entry.name for entry in file.keys})) or "none"
        raise ConfigurationError(f"no key of {path} has the name or id {name!r}: take one of {names}")
    return found


def _hand_over(key: str, entry: KeyEntry) -> None:
    typer.echo(key)
    runs = "every run" if entry.runs is None else ", ".join(entry.runs)
    Console(stderr=True).print(
        f"key {entry.name} ({entry.id}) for {', '.join(entry.scopes)} on {runs}; it is shown only now",
        highlight=False,
        soft_wrap=True,
    )


def _ending(expires: datetime, now: datetime) -> str:
    return "ended" if expires <= now else f"{expires:%Y-%m-%d %H:%M}Z"


def _time_of(text: str) -> datetime:
    """Return the time that a length from now, or a time, stands for.

    Raises:
        ConfigurationError: it is neither.
    """
    if found := re.fullmatch(r"(\d{1,5})([mhd])", text):
        now = datetime.now(UTC).replace(microsecond=0)
        return now + timedelta(**{UNITS[found[2]]: int(found[1])})
    try:
        time = datetime.fromisoformat(text)
    except ValueError as error:
        raise ConfigurationError(
            f"{text!r} is no time: give a length like 30m, 12h or 90d, or 2027-01-31T00:00Z"
        ) from error
    return time if time.tzinfo is not None else time.replace(tzinfo=UTC)

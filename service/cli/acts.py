"""`reward-router acts`: everything that operators did, in one list.

What was done with runs and their pools stands in the store; requests that may change a gateway, and changed keys
files, stand in the files that gateways write (`acts_file`). Reads both.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

import typer

from service.cli.runs import told, with_store
from service.cli.store_option import store_option
from service.errors import ConfigurationError
from service.stores.redis import RedisStore

ASKED, ANSWERED = "asked", "answered"
"""The two lines of one request: before it is carried out, and with its status."""


def acts(
    run: Annotated[str | None, typer.Option(help="Only what was done with this run. (default: everything)")] = None,
    store: Annotated[str | None, store_option()] = None,
    data_dir: Annotated[
        Path | None, typer.Option(help="Directory of everything that is kept, as of `up` and `serve`. (default: .data)")
    ] = None,
    file: Annotated[
        list[Path] | None,
        typer.Option(
            envvar="REWARD_ROUTER_ACTS_FILE", help="A gateway's log of acts, its setting acts_file; may be repeated."
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of lines.")] = False,
) -> None:
    """List what operators did, oldest first: pools changed, runs archived, exported, imported or deleted, requests to
    /admin, keys files taken.
    """

    async def read(opened: RedisStore) -> list[dict[str, Any]]:
        found = [{"run": entry.decision_id, **told(entry)} for entry in await opened.notes()]
        for name in await opened.list_runs():
            found += [{"run": name, **told(entry)} for entry in await opened.acts(name)]
        return found

    # A request stands before what it did in the same millisecond: sorting keeps this order.
    rows = [] if run is not None else [row for path in file or () for row in requests_in(path)]
    rows += [one for one in with_store(store, data_dir, read) if run in (None, one["run"])]
    rows.sort(key=lambda row: row["time_ms"])
    if as_json:
        typer.echo(json.dumps(rows))
        return
    for row in rows:
        when = datetime.fromtimestamp(row["time_ms"] / 1000, UTC).strftime("%Y-%m-%d %H:%M:%S")
        told_of = [row["act"], row["run"], row["about"], row.get("status", "")]
        by = f"by {row['by']}" if row["by"] else ""
        typer.echo("  ".join(word for word in (when, *told_of, by) if word))


def requests_in(path: Path) -> list[dict[str, Any]]:
    """Return the rows of a gateway's log of acts; a request is one row, with its status or `not answered`.

    Raises:
        ConfigurationError: the file cannot be read, or a line is not an act.
    """
    rows: list[dict[str, Any]] = []
    asked: dict[tuple[object, ...], list[dict[str, Any]]] = {}
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigurationError(f"{path} cannot be read ({error}): give the file that acts_file names") from error
    for number, line in enumerate(lines, 1):
        try:
            record = json.loads(line)
            row = _row(record)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ConfigurationError(
                f"{path}, line {number} is not an act in JSON: give the file that acts_file names"
            ) from error
        who = (record.get("key"), record.get("method"), record.get("path"), record.get("query"))
        if record["act"] == ANSWERED and asked.get(who):
            asked[who].pop(0)["status"] = str(record["status"])
            continue
        if record["act"] == ASKED:
            asked.setdefault(who, []).append(row)
        rows.append(row)
    return rows


def _row(record: dict[str, Any]) -> dict[str, Any]:
    time_ms = int(datetime.fromisoformat(record["time"]).timestamp() * 1000)
    row = {"run": "", "time_ms": time_ms, "by": record.get("key") or ""}
    if record["act"] not in (ASKED, ANSWERED):
        return {**row, "act": record["act"], "about": _words(record.get("changes", ()))}
    query = f"?{record['query']}" if record.get("query") else ""
    status = "not answered" if record["act"] == ASKED else str(record["status"])
    return {**row, "act": f"{record['method']} {record['path']}{query}", "about": "", "status": status}


def _words(changes: Iterable[object]) -> str:
    return "; ".join(map(str, changes))

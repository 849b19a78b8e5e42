"""`reward-router convert`: preference data as people publish it, made into rows that `label` and `train` read."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from service.cli.json_option import JsonOut, publish
from service.errors import ConfigurationError
from service.lab.convert.convert import Account, convert_file
from service.lab.convert.reading import READABLE


def convert(
    data: Annotated[Path, typer.Argument(metavar="FILE", help=f"{READABLE}.", show_default=False)],
    out: Annotated[Path, typer.Option(help="JSON Lines to write; replaced if it exists.", show_default=False)],
    json_out: JsonOut = None,
) -> None:
    """Make labelled pairs of preference data: chosen and rejected, hh-rlhf, UltraFeedback, HelpSteer, Arena and others.

    The columns decide what a record is. Prints what was taken for what, how many records were left out, and why. Then
    `reward-router label` asks the RMs about the pairs.
    """
    if out.exists() and data.exists() and out.samefile(data):
        raise ConfigurationError(f"--out {out}: is the file that is read; choose another")
    if not out.parent.is_dir():
        raise ConfigurationError(f"--out {out}: the directory does not exist; make it, or choose another")
    account = convert_file(data, out)
    document = {
        "out": str(out),
        "records": account.records,
        "rows": account.rows,
        "ties": account.ties,
        "taken": {name: {"rows": rows, "meaning": meaning} for name, (meaning, rows) in account.taken.items()},
        "left_out": dict(account.left_out.most_common()),
    }
    publish(document, json_out, lambda: _tell(account, out))


def _tell(account: Account, out: Path) -> None:
    console = Console()

    def say(text: str) -> None:
        console.print(text, highlight=False, markup=False, soft_wrap=True)

    for name, (meaning, rows) in account.taken.items():
        say(f"{name}, {rows} rows: {meaning}")
    for reason, count in account.left_out.most_common():
        say(f"left out {count}: {reason}")
    ties = f", {account.ties} of them ties" if account.ties else ""
    say(f"{account.rows} rows of {account.records} records{ties} in {out}; next: reward-router label")

"""Files of labelled pairs as the commands read them: what was left out is said, at the start and in the last line.

Knows options and notes for people; the format is `router_core.rows`. Called by the commands that read such files.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from router_core.dataset import MAX_NAMED_ROWS, PairsFile, RowsFile, read_pairs, read_rows
from router_core.errors import BadRowsError
from router_core.records import LabelledPair
from router_core.rows import Row

SkipBadRows = Annotated[
    bool, typer.Option("--skip-bad-rows", help="Leave out rows that break the format, and say how many.")
]


@dataclass(slots=True)
class DataReader:
    """Reads the data files of one command, and counts what it left out.

    Args:
        notes: told what was left out of each file.
        skip_bad_rows: leave out rows that break the format, instead of refusing the file.
    """

    notes: Console
    skip_bad_rows: bool = False
    skipped: int = field(default=0, init=False)
    ties: int = field(default=0, init=False)

    def pairs(self, path: Path) -> list[LabelledPair]:
        """The pairs that have a better response.

        Raises:
            DatasetError: see `router_core.dataset.read_pairs`.
        """
        with _remedy():
            read = read_pairs(path, skip_bad_rows=self.skip_bad_rows)
        self._count(path, read)
        if read.ties:
            self.ties += read.ties
            self._note(f"{path}: {read.ties} pairs are labelled a tie and left out: no RM is right or wrong on them")
        for name in read.unheard:
            self._note(
                f"{path}: scorer {name!r} has no score on any pair (`rm` and `rm_missing` there say why), and is left "
                "out: a checkpoint will know nothing of it, and a gateway starts it as an average one. Pairs to which "
                "it applies, or `reward-router label … --retry-missing`, change that"
            )
        return read.pairs

    def rows(self, path: Path) -> list[Row]:
        """All rows, labelled or not.

        Raises:
            DatasetError: see `router_core.dataset.read_rows`.
        """
        with _remedy():
            read = read_rows(path, skip_bad_rows=self.skip_bad_rows)
        self._count(path, read)
        return read.rows

    def tell(self) -> None:
        """Print, as the command's last line, how many bad rows were left out; nothing where none was."""
        if self.skipped:
            self._note(f"{self.skipped} bad rows were left out (--skip-bad-rows)")

    def _count(self, path: Path, read: PairsFile | RowsFile) -> None:
        self.skipped += len(read.skipped)
        for complaint in read.skipped[:MAX_NAMED_ROWS]:
            self._note(f"left out: {complaint}")
        if len(read.skipped) > MAX_NAMED_ROWS:
            self._note(f"left out: {len(read.skipped) - MAX_NAMED_ROWS} more bad rows of {path}")

    def _note(self, text: str) -> None:
        self.notes.print("[yellow]note[/]", end=" ")
        self.notes.print(text, highlight=False, markup=False, soft_wrap=True)


@contextmanager
def _remedy() -> Iterator[None]:
    """Adds to a complaint about rows how to go on without them."""
    try:
        yield
    except BadRowsError as error:
        rows = "1 bad row" if error.count == 1 else f"{error.count} bad rows"
        raise BadRowsError(f"{error}\n{rows}: correct, or leave out with --skip-bad-rows", error.count) from error


def parse_pool(text: str | None) -> tuple[str, ...]:
    """Names of a comma-separated list; empty for none."""
    return tuple(name.strip() for name in (text or "").split(",") if name.strip())

"""What every experiment of this package takes and gives back. Knows nothing of what is measured."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

DEFAULT_DATA = Path(os.environ.get("RB9_DEV", "../shared/data/rb9_dev.jsonl"))

Cell = str | float
Row = tuple[Cell, ...]


@dataclass(frozen=True, slots=True)
class Options:
    """How large an experiment is.

    Attributes:
        seeds: repetitions; None: the experiment's own number, with which its figures were made.
        data: JSONL of recorded pairs, for the experiments that read them.
        workers: processes, one thread each.
    """

    seeds: int | None = None
    data: Path = DEFAULT_DATA
    workers: int = 2


@dataclass(frozen=True, slots=True)
class Report:
    """What an experiment found.

    Attributes:
        title: what was measured, one line.
        columns: names of the table's columns.
        rows: of the table.
        notes: sentences below the table: what the columns are, what the promise is.
        figures: further figures, for programs.
    """

    title: str
    columns: tuple[str, ...]
    rows: tuple[Row, ...]
    notes: tuple[str, ...] = ()
    figures: Mapping[str, Any] = field(default_factory=dict)

    def as_json(self) -> dict[str, Any]:
        """The same as plain values."""
        return asdict(self)


Experiment = Callable[[Options], Report]

"""Tables of the commands that fit their console: columns are left out, names never cut.

Called by the commands that print a table of policies or models.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from rich.console import Console
from rich.table import Table

UNBOUNDED: Final = 10_000
"""Columns of a console on which everything fits."""


def fits(table: Table, console: Console) -> bool:
    """Return True if the console is wide enough for the table as it is."""
    unbounded = console.options.update(width=UNBOUNDED, max_width=UNBOUNDED)
    return console.measure(table, options=unbounded).maximum <= console.width


def fitting_table(
    console: Console,
    columns: Sequence[str],
    rows: Sequence[Sequence[str] | None],
    *,
    drop: Sequence[str] = (),
    title: str | None = None,
) -> Table:
    """Return a table of one line a row, without the columns for which the console is too narrow.

    Args:
        console: that it will be printed on.
        columns: headers; the first one's cells are names.
        rows: cells of each row; None begins a section.
        drop: columns that may be left out, the first one first; the table's caption names those that were.
        title: above the table.
    """
    for count in range(len(drop) + 1):
        left_out = drop[:count]
        table = _table(columns, rows, left_out, title)
        if fits(table, console):
            return table
    # Too narrow for the names alone: they fold onto the next line rather than lose their ends.
    for column in table.columns:
        column.no_wrap = False
    return table


def _table(
    columns: Sequence[str], rows: Sequence[Sequence[str] | None], left_out: Sequence[str], title: str | None
) -> Table:
    shown = [index for index, column in enumerate(columns) if column not in left_out]
    table = Table(title=title)
    for index in shown:
        table.add_column(columns[index], justify="right" if index else "left", overflow="fold", no_wrap=True)
    for row in rows:
        if row is None:
            table.add_section()
        else:
            table.add_row(*(row[index] for index in shown))
    if left_out:
        table.caption = f"left out for want of width: {', '.join(left_out)}"
    return table

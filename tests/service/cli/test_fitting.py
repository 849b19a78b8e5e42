"""Tables that fit the console."""

from __future__ import annotations

import io

from rich.console import Console

from service.cli.fitting import fitting_table

NAMES = [f"single:rm-with-a-long-name-{index}" for index in range(12)]


def printed(width: int) -> list[str]:
    """Lines of a table of twelve names and two wide columns."""
    console = Console(width=width, file=io.StringIO(), record=True)
    rows = [(name, "0.900", "0.123 – 0.456", "x" * 20) for name in NAMES]
    console.print(fitting_table(console, ("policy", "accuracy", "interval", "more"), rows, drop=("more", "interval")))
    return console.export_text().splitlines()


def test_columns_are_dropped_and_names_kept_on_one_line() -> None:
    lines = printed(50)
    assert [line.split("│")[1].strip() for line in lines if "single" in line] == NAMES
    assert "left out for want of width: more, interval" in " ".join(lines)


def test_everything_is_shown_where_there_is_room() -> None:
    assert all("x" * 20 in line for line in printed(120) if "single" in line)


def test_names_fold_where_even_they_do_not_fit() -> None:
    text = "".join("".join(line.split("│")[1:2]).strip() for line in printed(30))
    assert all(name in text for name in NAMES)

"""A page as values: paragraphs, tables and pictures, that become Markdown for a file and lines for a terminal.

Knows nothing of what the tables say. Called by `page` and the command.
"""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from loadtests.report import table as print_table

WIDTH = 120
"""Columns of prose, in the file and on the terminal."""


@dataclass(frozen=True, slots=True)
class Heading:
    """Title of a section; level 1 is the page's."""

    text: str
    level: int = 2


@dataclass(frozen=True, slots=True)
class Sheet:
    """A table: the first column is words, the others figures."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


@dataclass(frozen=True, slots=True)
class Picture:
    """An image below the page's folder."""

    path: str
    caption: str


Block = str | Heading | Sheet | Picture
"""A string is a paragraph, or a list whose lines start with `* `."""


def markdown(blocks: Sequence[Block]) -> str:
    """The page as a file."""
    return "\n\n".join(_markdown(block) for block in blocks) + "\n"


def show(blocks: Sequence[Block]) -> None:
    """The page on the terminal."""
    for block in blocks:
        if isinstance(block, Sheet):
            print_table(block.title, block.columns, block.rows)
        elif isinstance(block, Heading):
            print(f"\n{'=' * 3 if block.level == 1 else '-' * 3} {block.text}\n")
        elif isinstance(block, Picture):
            print(f"[{block.caption}: {block.path}]\n")
        else:
            print(f"{_filled(block)}\n")


def accuracy(value: float) -> str:
    """Three digits, as accuracies are written here: `.917`."""
    return f"{value:.3f}".replace("0.", ".", 1) if value < 1 else f"{value:.3f}"


def interval(low: float, high: float) -> str:
    """`.900 – .932`."""
    return f"{accuracy(low)} – {accuracy(high)}"


def signed(value: float) -> str:
    """A difference with its sign: `+.012`, `−.004`."""
    digits = f"{abs(value):.3f}".replace("0.", ".", 1)
    return f"{'−' if value < 0 and digits != '.000' else '+'}{digits}"


def difference(found: Mapping[str, Any]) -> str:
    """`+.064 (+.046 … +.082)`, from `difference` and `ci95`."""
    low, high = found["ci95"]
    return f"{signed(found['difference'])} ({signed(low)} … {signed(high)})"


def _markdown(block: Block) -> str:
    if isinstance(block, Heading):
        return f"{'#' * block.level} {block.text}"
    if isinstance(block, Picture):
        return f"![{block.caption}]({block.path})"
    if isinstance(block, Sheet):
        lines = [_row(block.columns), "|---" + "|---:" * (len(block.columns) - 1) + "|", *map(_row, block.rows)]
        return f"**{block.title}**\n\n" + "\n".join(lines)
    return _filled(block)


def _row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _filled(text: str) -> str:
    """Prose broken into lines; each item of a list by itself."""
    lines = text.split("\n")
    if not lines[0].startswith("* "):
        return textwrap.fill(text, WIDTH, break_long_words=False, break_on_hyphens=False)
    return "\n".join(
        textwrap.fill(line, WIDTH, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False)
        for line in lines
    )

"""Make the README's picture of a terminal from what a command really printed.

    FORCE_COLOR=1 COLUMNS=90 .venv/bin/reward-router demo | \
        python -m tests.docs.picture docs/figures/demo.svg "which scorer is asked"

Reads standard input with its colours, takes the lines from the one that begins with these words to the end of the last
table, and draws them with rich. Called by hand.
"""

from __future__ import annotations

import io
import os
import re
import sys
from pathlib import Path

from rich.console import Console
from rich.text import Text

CURSOR = re.compile(r"\x1b\[[0-9?]*[A-HJKhl]|\r")
"""Control sequences that move the cursor: progress lines are full of them."""


def picture(printed: str, first: str, title: str) -> str:
    """Return an SVG of the lines from the one that begins with `first` to the end of the last table."""
    lines = [Text.from_ansi(line) for line in CURSOR.sub("", printed).splitlines()]
    begin = next(number for number, line in enumerate(lines) if line.plain.startswith(first))
    end = max(number for number, line in enumerate(lines) if line.plain.startswith("└"))
    console = Console(record=True, width=int(os.environ.get("COLUMNS", "90")), file=io.StringIO())
    for line in lines[begin : end + 1]:
        console.print(line, soft_wrap=True)
    return console.export_svg(title=title)


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(picture(sys.stdin.read(), sys.argv[2], "make demo"), "utf-8")

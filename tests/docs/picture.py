"""Make the README's picture of a terminal from what a command really printed.

    FORCE_COLOR=1 COLUMNS=90 .venv/bin/reward-router demo | python -m tests.docs.picture docs/figures/demo.svg

Reads standard input with its colours, leaves out progress lines above the first empty one, and draws the rest with
rich. Called by hand.
"""

from __future__ import annotations

import io
import os
import sys
from pathlib import Path

from rich.console import Console
from rich.text import Text

COLUMNS = int(os.environ.get("COLUMNS", "90"))


def picture(printed: str, title: str) -> str:
    """Return an SVG of what was printed, from its first empty line on."""
    shown = printed.partition("\n\n")[2].rstrip()
    console = Console(record=True, width=COLUMNS, file=io.StringIO())
    console.print(Text.from_ansi(shown), soft_wrap=True)
    return console.export_svg(title=title)


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(picture(sys.stdin.read(), "make demo"), "utf-8")

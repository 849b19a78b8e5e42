"""Table 1 at the scale of a laptop: online DPO for every row, rewards from the running service over HTTP.

    python -m loadtests.table1 [--seeds N] [--steps N] [--rows NAMES] [--write-docs] [--json OUT] [--small]

Everything that is made is kept in --folder, each run too: an interrupted table goes on where it was.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from loadtests.report import use_one_blas_thread, write_json
from loadtests.table1.artefacts import make_artefacts
from loadtests.table1.campaign import run_table
from loadtests.table1.recipe import SMALL, Artefacts, Recipe, unseen
from loadtests.table1.report import as_json, as_markdown, plot_curves, print_table
from loadtests.table1.rows import Row, table_rows, unseen_rows
from loadtests.table1.tasks import FAMILIES
from router_core.dataset import load_pairs

BEGIN, END = "<!-- generated: begin -->", "<!-- generated: end -->"
UNSEEN_BEGIN, UNSEEN_END = "<!-- generated: unseen begin -->", "<!-- generated: unseen end -->"
"""What --write-docs writes stands between these lines; the rest of the page is written by hand."""

PAGE = Path("docs/table1.md")
CURVES = Path("docs/table1.png")
UNSEEN_CURVES = Path("docs/table1_unseen.png")


def main(words: Sequence[str] | None = None) -> None:
    """The command."""
    arguments = _parse(words)
    began = time.perf_counter()

    def tell(line: str) -> None:
        print(f"{time.perf_counter() - began:7.0f} s  {line}", file=sys.stderr, flush=True)

    recipe = _recipe(arguments)
    rows = _rows(arguments.rows, unseen_rows() if arguments.unseen else table_rows(recipe.pool()))
    artefacts = make_artefacts(recipe, arguments.folder, tell, processes=arguments.processes)
    results = run_table(
        recipe, artefacts, rows, range(1, arguments.seeds + 1), arguments.folder, tell,
        processes=arguments.processes, again=arguments.again,
    )  # fmt: skip
    print_table(results, f"Online DPO, {arguments.seeds} seeds, signal {recipe.signal}: right responses, per cent")
    plot_curves(results, arguments.folder / "curves.png")
    write_json(arguments.json, as_json(results, recipe, artefacts.checkpoint_digest))
    if arguments.write_docs:
        marks = (UNSEEN_BEGIN, UNSEEN_END) if arguments.unseen else (BEGIN, END)
        write_page(PAGE, as_markdown(results, recipe, pool_accuracy(artefacts)), marks)
        plot_curves(results, UNSEEN_CURVES if arguments.unseen else CURVES)
    tell("done")


def pool_accuracy(artefacts: Artefacts) -> dict[str, dict[str, float]]:
    """RM to family to accuracy on the offline pairs."""
    pairs = load_pairs(artefacts.offline)
    out: dict[str, dict[str, float]] = {}
    for name in artefacts.models:
        out[name] = {}
        for family in FAMILIES:
            right = [pair.correctness(name) for pair in pairs if pair.domain == family]
            out[name][family] = sum(right) / len(right) if right else float("nan")
    return out


def write_page(page: Path, generated: str, marks: tuple[str, str] = (BEGIN, END)) -> None:
    """Put the generated part between the page's two marks.

    Raises:
        ValueError: the page lacks them.
    """
    text, (first, last) = page.read_text("utf-8"), marks
    head, begin, rest = text.partition(first)
    _, end, tail = rest.partition(last)
    if not begin or not end:
        raise ValueError(f"{page} lacks the lines {first} and {last}: put them where the table belongs")
    page.write_text(f"{head}{first}\n\n{generated}\n{last}{tail}", "utf-8")


def _parse(words: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m loadtests.table1", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, default=5, help="seeds 1 … N, the same for all rows; 0 is for tuning [5]")
    parser.add_argument("--rows", help="policies, comma-separated [all: sft, single:NAME, majority, …]")
    parser.add_argument("--steps", type=int, help="steps of online DPO, for a shorter table")
    parser.add_argument(
        "--signal", choices=("loss", "preference"), default="loss",
        help="what the router learns from: the paper's loss, or (for analysis) the checker's preference",
    )  # fmt: skip
    parser.add_argument(
        "--unseen", action="store_true",
        help="the second table: offline pairs of two benchmarks only, audits of 5 %% by the checker",
    )  # fmt: skip
    parser.add_argument("--small", action="store_true", help="tiny models and a few steps: proves that it works")
    parser.add_argument("--again", action="store_true", help="make runs anew that are kept")
    parser.add_argument("--processes", type=int, default=2, help="runs at once, each on one thread [2]")
    parser.add_argument("--folder", type=Path, default=Path(".data/table1"), help="where everything is kept")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    parser.add_argument("--write-docs", action="store_true", help=f"write {PAGE} and {CURVES}")
    return parser.parse_args(words)


def _recipe(arguments: argparse.Namespace) -> Recipe:
    recipe = SMALL if arguments.small else Recipe()
    dpo = recipe.dpo if arguments.steps is None else replace(recipe.dpo, steps=arguments.steps)
    recipe = replace(recipe, dpo=dpo, signal=arguments.signal)
    return unseen(recipe) if arguments.unseen else recipe


def _rows(names: str | None, rows: Sequence[Row]) -> list[Row]:
    if names is None:
        return list(rows)
    wanted = names.split(",")
    unknown = sorted(set(wanted) - {row.policy for row in rows})
    if unknown:
        known = ", ".join(row.policy for row in rows)
        raise SystemExit(f"--rows: {', '.join(unknown)} unknown; choose from {known}")
    return [row for row in rows if row.policy in wanted]


if __name__ == "__main__":
    use_one_blas_thread()
    main()

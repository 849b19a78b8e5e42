"""The command `python -m loadtests.soundness`: run all experiments or the named ones, print tables, write JSON."""

from __future__ import annotations

import argparse
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

from loadtests.report import describe, machine, table, use_one_blas_thread, write_json
from loadtests.soundness.adaptation import adaptation
from loadtests.soundness.calibration import calibration
from loadtests.soundness.changes import changes
from loadtests.soundness.coverage import coverage
from loadtests.soundness.exploration import exploration
from loadtests.soundness.intervals import intervals
from loadtests.soundness.losses import losses
from loadtests.soundness.published import published
from loadtests.soundness.refitting import refitting
from loadtests.soundness.report import DEFAULT_DATA, Experiment, Options
from loadtests.soundness.responses import responses
from loadtests.soundness.singles import singles
from loadtests.soundness.tuning import tuning

EXPERIMENTS: Mapping[str, Experiment] = MappingProxyType(
    {
        "adaptation": adaptation,
        "calibration": calibration,
        "changes": changes,
        "coverage": coverage,
        "exploration": exploration,
        "intervals": intervals,
        "losses": losses,
        "published": published,
        "refitting": refitting,
        "responses": responses,
        "singles": singles,
        "tuning": tuning,
    }
)
"""Every experiment by its name. To add one: a module with a function, and a line here."""


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m loadtests.soundness", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(EXPERIMENTS)} [all]")
    parser.add_argument("--seeds", type=int, help="repetitions [each experiment's own number]")
    parser.add_argument("--data", type=Path, default=DEFAULT_DATA, help="JSONL of recorded pairs [RB9_DEV]")
    parser.add_argument("--workers", type=int, default=2, help="processes, one thread each [2]")
    parser.add_argument("--json", type=Path, metavar="OUT", help="write the figures to this file")
    options = parser.parse_args(arguments)
    unknown = [name for name in options.names if name not in EXPERIMENTS]
    if unknown:
        parser.error(f"unknown experiment {', '.join(unknown)}: choose from {', '.join(EXPERIMENTS)}")
    return options


def main(arguments: Sequence[str] | None = None) -> None:
    """Run, print, write."""
    given = parse(arguments)
    use_one_blas_thread()
    facts = machine()
    print(describe(facts))
    options = Options(given.seeds, given.data, given.workers)
    found = {}
    for name in given.names or EXPERIMENTS:
        began = time.perf_counter()
        report = EXPERIMENTS[name](options)
        seconds = time.perf_counter() - began
        table(f"{name}: {report.title} ({seconds:.0f} s)", report.columns, report.rows)
        for note in report.notes:
            print(f"  {note}")
        found[name] = {**report.as_json(), "seconds": round(seconds, 1)}
    write_json(given.json, {"machine": facts, "experiments": found})


if __name__ == "__main__":
    main()

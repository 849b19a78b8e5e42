"""Is an arm found that is better than said, while another one keeps its promise?

Arm A is said to be right .85 of the time and is; arm B is said to be right .70 of the time and is right .97 of it. The
feedback on A confirms the offline stage; on B there is none until it is asked.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from loadtests.soundness.report import Options, Report
from loadtests.soundness.streams import Simulated, all_asked, found_after
from router_core.prior import CALIBRATED_HYPERPARAMETERS as DEFAULT

SAID, TRUE = (0.85, 0.70), (0.85, 0.97)
STEPS, SEEDS, GOAL = 8000, 6, 1000

VARIANTS = {
    "default": DEFAULT,
    "no floor": replace(DEFAULT, floor=0.0),
    "no floor, v = 1": replace(DEFAULT, floor=0.0, v=1.0),
    "no floor, λ₀ = 30 fixed": replace(DEFAULT, floor=0.0, lambda0=30.0, adapt=False),
}


def exploration(options: Options) -> Report:
    """When B is found, and how often it is asked, with and without a floor."""
    seeds = options.seeds or SEEDS
    runs = [Simulated(SAID, ((STEPS, TRUE),), hyper) for hyper in VARIANTS.values()]
    runs.append(Simulated(SAID, ((STEPS, TRUE),), VARIANTS["no floor"], shadow=0.05))
    names = [*VARIANTS, "no floor, 5 % shadowed"]
    figures = {name: _figures(arms) for name, arms in zip(names, all_asked(runs, seeds, options.workers), strict=True)}
    rows = [
        (name, f"{found['within goal']} of {seeds}", _steps(found["found after"]), _range(found["share"]))
        for name, found in figures.items()
    ]
    return Report(
        title=f"a better arm of which nothing is known, {STEPS} steps, {seeds} seeds",
        columns=("variant", f"B found within {GOAL} steps", "after steps", "share of B"),
        rows=tuple(rows),
        notes=(
            "Found: more than half of the next 100 steps ask B.",
            f"Promise: the default finds B within {GOAL} steps in all seeds.",
        ),
        figures=figures,
    )


def _figures(arms: Sequence[NDArray[np.int64]]) -> dict[str, Any]:
    found = [found_after(one, 1) for one in arms]
    return {
        "found after": found,
        "within goal": sum(step is not None and step <= GOAL for step in found),
        "share": [float((one == 1).mean()) for one in arms],
    }


def _steps(found: Sequence[int | None]) -> str:
    return ", ".join("never" if step is None else str(step) for step in found)


def _range(shares: Sequence[float]) -> str:
    return f"{min(shares):.2f} – {max(shares):.2f}"

"""Is a change of an arm noticed, how soon, and how often is one noticed that never was?

Whole runs: arm A is right .9 of the time and B .8, as said, until A falls to .5. And what watches one arm alone, over a
million events: with predictions that are right, that are wrong by as much as is allowed, and that are wrong by text.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from loadtests.soundness.report import Options, Report
from loadtests.soundness.streams import Simulated, all_asked, found_after
from router_core.changes import MARGIN, Watch
from router_core.prior import CALIBRATED_HYPERPARAMETERS as DEFAULT

SAID, FALLEN = (0.9, 0.8), (0.5, 0.8)
STEPS, SEEDS, GOAL = 8000, 6, 300
"""Steps before the change, and after it."""

EVENTS = 1_000_000

VARIANTS = {"default": DEFAULT, "not watched": replace(DEFAULT, alarm_rate=0.0)}

Array = NDArray[np.float64]
Truth = Callable[[np.random.Generator], Array]

PREDICTED = 0.8
"""Probability that the arm is right which is watched alone."""

STREAMS: dict[str, Truth] = {
    "right": lambda rng: np.full(EVENTS, PREDICTED),
    "too high by the margin": lambda rng: np.full(EVENTS, PREDICTED - MARGIN),
    "too low by the margin": lambda rng: np.full(EVENTS, PREDICTED + MARGIN),
    "wrong by text, ±.2": lambda rng: PREDICTED + 0.2 * rng.choice([-1.0, 1.0], EVENTS),
}

DELAYS = {"falls by .3": PREDICTED - 0.3, "falls by .2": PREDICTED - 0.2}


def changes(options: Options) -> Report:
    """Steps until B is asked after A has fallen; false alarms per event; events until an alarm."""
    seeds = options.seeds or SEEDS
    runs = [Simulated(SAID, ((STEPS, SAID), (STEPS, FALLEN)), hyper) for hyper in VARIANTS.values()]
    figures: dict[str, Any] = {}
    rows: list[tuple[str, str]] = []
    for name, arms in zip(VARIANTS, all_asked(runs, seeds, options.workers), strict=True):
        found = [found_after(one[STEPS:], 1) for one in arms]
        within = sum(step is not None and step <= GOAL for step in found)
        figures[name] = {"found after": found, "within goal": within}
        told = ", ".join("never" if step is None else str(step) for step in found)
        rows.append((f"{name}: B found within {GOAL} steps", f"{within} of {seeds} ({told})"))
    for name, truth in STREAMS.items():
        alarms = _alarms(truth(np.random.default_rng(0)), DEFAULT.alarm_rate)
        figures[f"prediction {name}"] = {"alarms": alarms, "events": EVENTS}
        rows.append((f"prediction {name}: false alarms in {EVENTS:,} events", str(alarms)))
    for name, truth_after in DELAYS.items():
        delays = [_delay(truth_after, np.random.default_rng(seed)) for seed in range(200)]
        figures[name] = {"events until an alarm": float(np.mean(delays)), "95 %": float(np.quantile(delays, 0.95))}
        rows.append(
            (
                f"{name}: events until an alarm, mean (95 % quantile)",
                f"{np.mean(delays):.0f} ({np.quantile(delays, 0.95):.0f})",
            )
        )
    return Report(
        title=f"an arm that falls from .9 to .5 after {STEPS} steps, {seeds} seeds",
        columns=("what", "found"),
        rows=tuple(rows),
        notes=(
            f"Promise: B is found within {GOAL} steps in all seeds; at most {DEFAULT.alarm_rate * EVENTS:.0f} false "
            "alarms in a million events while predictions are wrong by no more than the margin.",
        ),
        figures=figures,
    )


def _alarms(truth: Array, rate: float) -> int:
    """False alarms over events (N,) that are right with these probabilities."""
    watch = Watch()
    for reward in (np.random.default_rng(1).random(len(truth)) < truth).astype(np.float64).tolist():
        watch = watch.after(PREDICTED, reward, rate)
    return int(watch.alarms)


def _delay(truth: float, rng: np.random.Generator) -> int:
    """Events until an alarm after a change to this probability, of an arm that was as predicted for 500 events."""
    watch, events = Watch(), 0
    for right in rng.random(500) < PREDICTED:
        watch = watch.after(PREDICTED, float(right), DEFAULT.alarm_rate)
    before = watch.alarms
    while watch.alarms == before:
        watch, events = watch.after(PREDICTED, float(rng.random() < truth), DEFAULT.alarm_rate), events + 1
    return events

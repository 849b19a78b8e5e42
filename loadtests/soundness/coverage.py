"""Off-policy intervals where the target's value moves along the log, and where rows share a draw.

Synthetic logs of two arms, asked evenly; the target asks the first. Its reward is 1 with a probability that stands
still (.775), falls in the middle of the log (.95, then .60), or differs by prompt, six single responses of which share
a draw. The truth is the mean of that probability over the log's rows. `one constant` is a bet against every constant
value: valid where nothing moves, and here to show what happens where something does.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from loadtests.soundness.report import Options, Report
from router_core.ope import LoggedData, doubly_robust, one_reward_per_row, safe_interval, sequential_ridge, snips

Array = NDArray[np.float64]
Bounds = tuple[float, float]

SIZES = (300, 1000, 3000)
LOGS = 300
SHARE = 6
"""Single responses of one prompt."""

HIGH, LOW = 0.95, 0.60

CASES = ("stands still", "falls", "sticky, told", "sticky, not told")
"""`told`: the log names the draws, so that the intervals can count them."""

STAKE = 0.75
"""Largest share of the capital that one row may cost the bet against a constant."""


def coverage(options: Options) -> Report:
    """Coverage of every interval per case and length of the log."""
    logs, names = options.seeds or LOGS, list(_intervals())
    figures = {case: {str(n): _figures(case, n, logs) for n in SIZES} for case in CASES}
    rows = [
        (case, n, *(_cell(found[name]) for name in names))
        for case, by_size in figures.items()
        for n, found in by_size.items()
    ]
    return Report(
        title=f"coverage of off-policy intervals, {logs} logs each",
        columns=("value", "n", *names),
        rows=tuple(rows),
        notes=(
            "Coverage of the 95 % interval (mean width; share of intervals whose low end lay above the high one).",
            "Promise: safe95 covers at least .95 in every case whose draws are told, and never crosses.",
        ),
        figures=figures,
    )


def _cell(found: Mapping[str, float]) -> str:
    crossed = f"; {found['crossed']:.2f} crossed" if found["crossed"] else ""
    return f"{found['coverage']:.3f} ({found['width']:.3f}{crossed})"


def _figures(case: str, n: int, logs: int) -> dict[str, dict[str, float]]:
    found: dict[str, list[tuple[bool, float, bool]]] = {name: [] for name in _intervals()}
    for seed in range(logs):
        log, truth = _log(case, n, np.random.default_rng((seed, n)))
        for name, interval in _intervals().items():
            low, high = interval(log)
            found[name].append((low <= truth <= high, high - low, low > high))
    return {
        name: dict(zip(("coverage", "width", "crossed"), np.mean(values, axis=0).tolist(), strict=True))
        for name, values in found.items()
    }


def _log(case: str, n: int, rng: np.random.Generator) -> tuple[LoggedData, float]:
    """A log, and the mean value of its first arm over its rows."""
    rows = np.arange(n)
    draw = rows // SHARE if case.startswith("sticky") else rows
    arm = rng.integers(2, size=n)[draw]
    if case.startswith("sticky"):
        value = np.where(rng.random(n) < 0.5, HIGH, LOW)[draw]
    else:
        value = np.where(rows < n // 2, HIGH, LOW) if case == "falls" else np.full(n, 0.5 * (HIGH + LOW))
    reward = (rng.random(n) < value).astype(np.float64)
    log = LoggedData(
        ("a", "b"),
        np.ones((n, 1), np.float32),
        arm,
        np.full((n, 2), 0.5),
        np.ones((n, 2), np.bool_),
        one_reward_per_row(arm, reward, 2),
    )
    return (replace(log, draws=draw) if case == "sticky, told" else log), float(value.mean())


def _intervals() -> dict[str, Callable[[LoggedData], Bounds]]:
    return {
        "safe95": lambda log: safe_interval(log, _target(log)),
        "one constant": _against_a_constant,
        "snips": lambda log: snips(log, _target(log)).ci95,
        "dr": lambda log: doubly_robust(log, _target(log), sequential_ridge(log)).ci95,
    }


def _target(log: LoggedData) -> Array:
    return np.tile([1.0, 0.0], (len(log), 1))


def _against_a_constant(log: LoggedData) -> Bounds:
    """Bounds of bets λ_t on ξ_t > ν, one ν for the whole log (Waudby-Smith & Ramdas 2024, arXiv 2010.09686)."""
    weight = np.where(log.arm == 0, 2.0, 0.0)
    low = _refuted(weight * log.reward)
    return low, 1.0 - _refuted(weight * (1.0 - log.reward))


def _refuted(xi: Array) -> float:
    """The largest constant mean of ξ that the bets refute, at .975."""
    n, threshold = len(xi), math.log(40.0)
    mean = (0.5 + np.cumsum(xi)) / np.arange(2, n + 2)
    variance = (0.25 + np.cumsum(np.square(xi - mean))) / np.arange(2, n + 2)
    bets = np.sqrt(2.0 * threshold / (n * np.concatenate([[0.25], variance[:-1]])))
    low, high = 0.0, 1.0
    for _ in range(30):
        nu = 0.5 * (low + high)
        capital = np.cumsum(np.log1p(np.minimum(bets, STAKE / nu) * (xi - nu)))
        low, high = (nu, high) if float(capital.max()) >= threshold else (low, nu)
    return low

"""The frontier of a run's own instances: decisions of an exported log about which every RM was asked.

Shadows, and policies that ask everyone, show what every policy would have done there. Each such decision counts with
the inverse of the probability that it is one. Called by the command `frontier`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from router_core.attempts import Attempt
from router_core.checkpoint import Checkpoint
from router_core.intervals import Z95
from router_core.offline.frontier import Play, Point, Side, by_price, plays_of
from router_core.records import Signal
from service.errors import ConfigurationError
from service.lab.eventlog.load import EventLog, sequence_log
from service.lab.eventlog.targets import logged_prices

Array = NDArray[np.float64]

FEWEST = 40
"""Decisions about which every RM was asked, without which there is no frontier."""


@dataclass(frozen=True, slots=True)
class LoggedFrontier:
    """Points, how many decisions they are made of, of how many in the log, and the prices of the RMs (K,)."""

    points: list[Point]
    n: int
    logged: int
    prices: Array


def logged_frontier(
    log: EventLog, checkpoint: Checkpoint, budgets: Sequence[float], prices: Array | None = None, seed: int = 0
) -> LoggedFrontier:
    """Every row of `offline.frontier` on the decisions of a log.

    Offsets are those that were logged. Thresholds and multipliers come from one half of the decisions, by time, and are
    judged on the other; then the other way round.

    Args:
        log: of a run with preferences.
        checkpoint: the run's, of its pool.
        budgets: B of the rows that have one.
        prices: (K,) in units of the cheapest; None: as logged.
        seed: of the random cascades.

    Raises:
        ConfigurationError: another signal, no learned votes, or too few decisions about which every RM was asked.
    """
    if log.header.signal is not Signal.PREFERENCE:
        raise ConfigurationError(
            f"the log's signal is {log.header.signal.value!r}: a frontier needs preferences, which say who was right"
        )
    if checkpoint.votes is None:
        raise ConfigurationError("the checkpoint holds no learned votes: train with more pairs")
    found, kept = sequence_log(log)
    rows = np.flatnonzero(found.complete & found.there.all(axis=1))
    if len(rows) < FEWEST:
        raise ConfigurationError(
            f"every RM was asked about {len(rows)} of {len(found)} decisions, and a frontier needs {FEWEST}: serve "
            "with a shadow rate (REWARD_ROUTER_SHADOW_RATE), wait for feedback, export again"
        )
    decisions = [log.events[index].decision for index in kept[rows]]
    offsets = np.array([decision.offsets for decision in decisions], dtype=np.float64)
    n = int(found.answers.responses[rows].max())
    scores = np.array([_scores(decision.heard, offsets.shape[1], n) for decision in decisions])
    side = Side(offsets, found.answers.rows(rows), scores, found.labels[rows], offsets.argmax(axis=1))
    costs = logged_prices(log) if prices is None else prices
    halves = np.array_split(np.arange(len(rows)), 2)
    rng = np.random.default_rng(seed)
    plays: dict[str, Array] = {}
    for past, future in (halves, halves[::-1]):
        played = plays_of(checkpoint.votes, _part(side, past), _part(side, future), budgets, costs, rng)
        for name, play in played.items():
            _note(plays.setdefault(name, np.full((3, len(rows)), np.nan)), future, play)
    weights = 1.0 / found.inclusion[rows]
    points = [_point(name, values, weights) for name, values in plays.items() if not np.isnan(values).any()]
    return LoggedFrontier(by_price(points), len(rows), len(found), costs)


def _part(side: Side, index: NDArray[np.int64]) -> Side:
    return Side(
        side.offsets[index], side.answers.rows(index), side.scores[index], side.labels[index], side.first[index]
    )


def _note(values: Array, rows: NDArray[np.int64], play: Play) -> None:
    values[:, rows] = np.stack([play.right, play.calls, play.price])


def _point(name: str, values: Array, weights: Array) -> Point:
    """Weighted means, and the normal interval of the ratio Σ w r / Σ w."""
    right, calls, price = (float(np.average(row, weights=weights)) for row in values)
    deviation = float(np.sqrt(np.square(weights * (values[0] - right)).sum()) / weights.sum())
    return Point(name, calls, price, right, (right - Z95 * deviation, right + Z95 * deviation))


def _scores(heard: Sequence[Attempt], K: int, n: int) -> Array:
    """(K, n) rewards of those who answered, NaN elsewhere."""
    scores = np.full((K, n), np.nan)
    for answer in heard:
        scores[answer.arm, : len(answer.rewards)] = answer.rewards
    return scores

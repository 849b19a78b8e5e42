"""A file of events as arrays for off-policy evaluation, and as events for a fold.

Knows files of this package and the arrays of `router_core.ope`. Called by the command `ope`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from router_core.attempts import Attempt, Outcome, excluded, first_choice
from router_core.ope import LoggedData, available_propensities, numbered, one_reward_per_row, with_shadows
from router_core.records import Event
from service.errors import ConfigurationError
from service.lab.eventlog.export import read_events, read_header
from service.lab.eventlog.record import Header, LoggedEvent
from service.usecases.decisions import event_from


@dataclass(frozen=True, slots=True)
class EventLog:
    """A whole file in memory.

    Attributes:
        header: what it says about itself.
        events: in log order.
    """

    header: Header
    events: tuple[LoggedEvent, ...]

    @property
    def usable(self) -> NDArray[np.bool_]:
        """(N,) whether the event has a first choice, and a reward of it."""
        usable = [event.first_reward is not None for event in self.events]
        return np.array(usable, dtype=np.bool_)


def load_log(path: Path) -> EventLog:
    """Read a file that `export` has written.

    Raises:
        ConfigurationError: it is none.
    """
    if not path.is_file():
        raise ConfigurationError(f"{path} does not exist: write it with `reward-router export RUN --out {path}`")
    header = read_header(path)
    return EventLog(header, tuple(read_events(path)))


def logged_data(log: EventLog, rows: slice = slice(None)) -> LoggedData:
    """The usable events of a part of the log, as arrays.

    The action of a row is the arm that was asked first, its reward what came back in the end, also where that arm
    failed and another one answered. Propensities are of that first choice, among the arms that were not known to be
    away; and where instances were shadowed, the probability that the arm's reward is in the log at all.

    Args:
        log: the file.
        rows: which events of it.
    """
    chosen = [event for event, usable in zip(log.events[rows], log.usable[rows], strict=True) if usable]
    k = len(log.header.pool)
    decisions = [event.decision for event in chosen]
    arm = np.array([_first_arm(decision.attempts) for decision in decisions], dtype=np.int64)
    available = np.ones((len(chosen), k), dtype=np.bool_)
    for row, decision in enumerate(decisions):
        available[row, excluded(decision.attempts, 0)] = False
    rewards = one_reward_per_row(arm, np.array([event.first_reward for event in chosen], dtype=np.float64), k)
    for row, event in enumerate(chosen):
        _tell_shadows(event, available[row], rewards[row])
    asked = available_propensities(
        _matrix([decision.propensities for decision in decisions], k),
        _matrix([decision.means for decision in decisions], k),
        _matrix([decision.sds for decision in decisions], k),
        _matrix([decision.floors or [0.0] * k for decision in decisions], k),
        available,
    )
    # Single responses are never shadowed: there, only being asked puts a reward into the log.
    compared = np.array([decision.n > 1 for decision in decisions], dtype=np.bool_)
    asked[compared] = with_shadows(asked[compared], arm[compared], available[compared], rewards[compared])
    contexts = np.frombuffer(b"".join([decision.x for decision in decisions]), "<f4")
    return LoggedData(
        log.header.pool,
        contexts.reshape(len(chosen), log.header.dim),
        arm,
        asked,
        available,
        rewards,
        numbered(decision.sticky or row for row, decision in enumerate(decisions)),
    )


def fold_events(log: EventLog, rows: slice = slice(None)) -> list[Event]:
    """A part of the log as the fold takes it."""
    return [event_from(event.decision_id, event.decision, event.feedback) for event in log.events[rows]]


def _tell_shadows(event: LoggedEvent, available: NDArray[np.bool_], rewards: NDArray[np.float64]) -> None:
    """Add to a row's rewards (K,) what each available arm would have given, had it been asked first.

    That is what it said in the shadow; and for an arm that failed, there or before, what the arm gave that was asked
    instead of it in the end: the best draw that could answer is the same, whichever failing arm comes before it. What
    left before anybody asked it has told nothing.
    """
    decision = event.decision
    if decision.shadows is None:
        return
    for arm, reward in event.learned:
        rewards[arm] = reward
    failed = available & np.isnan(rewards)
    failed[_untold(decision.attempts, decision.shadows)] = False
    rewards[failed] = event.first_reward


def _first_arm(attempts: Sequence[Attempt]) -> int:
    first = first_choice(attempts)
    assert first is not None, "a usable event has an answer"
    return first.arm


def _untold(attempts: Sequence[Attempt], shadows: Sequence[Attempt]) -> list[int]:
    """Return the arms that the first one was chosen among, and that left before anybody asked them."""
    left = [attempt for attempt in attempts if attempt.turn > 0] + [*shadows]
    return [attempt.arm for attempt in left if attempt.outcome in (Outcome.AWAY, Outcome.ABSENT)]


def _matrix(rows: Sequence[Sequence[float]], k: int) -> NDArray[np.float64]:
    return np.array(rows, dtype=np.float64).reshape(len(rows), k)

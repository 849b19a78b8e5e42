"""A file of events as arrays for off-policy evaluation, and as events for a fold.

Knows files of this package and the arrays of `router_core.ope`. Called by the command `ope`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from router_core.ope import LoggedData, available_propensities, one_reward_per_row, with_shadows
from router_core.posterior import NO_ARM
from router_core.records import Event, Shadow
from service.errors import ConfigurationError
from service.eventlog.export import read_events, read_header
from service.eventlog.record import Header, LoggedEvent


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
        """(N,) whether the event asked one RM and has a reward."""
        usable = [event.decision.arm != NO_ARM and event.reward is not None for event in self.events]
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

    Propensities are those among the arms that could answer, and where instances were shadowed the probability that the
    arm's reward is in the log at all. With shadows, an arm that said nothing counts as available all the same.

    Args:
        log: the file.
        rows: which events of it.
    """
    chosen = [event for event, usable in zip(log.events[rows], log.usable[rows], strict=True) if usable]
    k = len(log.header.pool)
    decisions = [event.decision for event in chosen]
    arm = np.array([decision.arm for decision in decisions], dtype=np.int64)
    available = np.ones((len(chosen), k), dtype=np.bool_)
    for row, decision in enumerate(decisions):
        available[row, decision.gone] = False
    rewards = one_reward_per_row(arm, np.array([event.reward for event in chosen], dtype=np.float64), k)
    for row, event in enumerate(chosen):
        for (other, _, _), reward in zip(event.decision.shadows, event.shadow_rewards, strict=True):
            rewards[row, other] = reward
    asked = available_propensities(
        _matrix([decision.propensities for decision in decisions], k),
        _matrix([decision.means for decision in decisions], k),
        _matrix([decision.sds for decision in decisions], k),
        available,
    )
    # An arm that answered in a shadow could answer, whatever was noted when another one was asked.
    available |= ~np.isnan(rewards)
    contexts = np.frombuffer(b"".join([decision.x for decision in decisions]), "<f4")
    return LoggedData(
        log.header.pool,
        contexts.reshape(len(chosen), log.header.dim),
        arm,
        with_shadows(asked, arm, available, rewards),
        available,
        rewards,
    )


def fold_events(log: EventLog, rows: slice = slice(None)) -> list[Event]:
    """A part of the log as the fold takes it."""
    return [
        Event(
            event.decision.arm,
            event.decision.x,
            event.decision.offset,
            event.decision.verdict,
            event.feedback,
            event.decision_id,
            tuple(Shadow(*shadow) for shadow in event.decision.shadows),
        )
        for event in log.events[rows]
    ]


def _matrix(rows: Sequence[Sequence[float]], k: int) -> NDArray[np.float64]:
    return np.array(rows, dtype=np.float64).reshape(len(rows), k)

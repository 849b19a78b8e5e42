"""Audits along a stream: no feedback but what a referee says of some steps.

Knows schedules and tables; no policies. Called by `passes` and `run`.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from router_core.audits.schedule import Schedule
from router_core.errors import AuditError
from router_core.records import Audit, credit
from router_core.replay.table import Table

Array = NDArray[np.float64]

REFEREE = "referee"
"""Name of the simulated one."""


@dataclass(frozen=True, slots=True)
class Audits:
    """Which steps are audited, and by whom.

    Attributes:
        rate: share of the stream.
        schedule: name of a schedule; its horizon is the stream's length.
        accuracy: with which probability the referee is right, in [1/2, 1]; else it prefers another response at random.
        ask_all: True: every RM is asked about an audited step and learned from; False: the asked one alone.
        trust: what the run believes of the referee, in [1/2, 1].
    """

    rate: float
    schedule: str = "front"
    accuracy: float = 1.0
    ask_all: bool = True
    trust: float = 0.9

    def __post_init__(self) -> None:
        """Raises AuditError if a value is outside its domain."""
        Schedule(self.rate, self.schedule)
        for name, value in (("accuracy", self.accuracy), ("trust", self.trust)):
            if not 0.5 <= value <= 1.0:
                raise AuditError(f"referee's {name} {value}: give a probability in [0.5, 1]")

    def over(self, length: int) -> Schedule:
        """Return the schedule of a stream of this length."""
        return Schedule(self.rate, self.schedule, length)

    def verdict(self, label: int, responses: int, uniform: float) -> int:
        """Return what the referee prefers.

        Args:
            label: the best response.
            responses: n.
            uniform: in [0, 1): below `accuracy` it is right.
        """
        if uniform < self.accuracy or responses < 2:
            return label
        other = int((uniform - self.accuracy) / (1.0 - self.accuracy) * (responses - 1))
        return other + (other >= label)

    def record(self, verdict: int, probability: float) -> Audit:
        """Return the audit as the log would hold it."""
        return Audit(REFEREE, verdict, probability, self.trust)


def credits_against(table: Table, pair: int, preferred: int) -> Array:
    """Return every RM's credit (K,), were this response the best one; one half where it says nothing."""
    n = int(table.responses[pair])
    earned = np.empty(len(table.pool))
    for k, verdict in enumerate(table.verdicts[pair].tolist()):
        scores = table.scores[pair, k, :n].tolist()
        rewards = scores if n > 2 and np.isfinite(scores).all() else [float(i == verdict) for i in range(n)]
        share = credit(rewards, preferred)
        earned[k] = 0.5 if share is None else share
    return earned

"""Which decisions are audited: a random share, with a probability that is known (docs/audits.md).

A schedule says how probable it is that the t-th instance is chosen; the hash of a decision's id decides. So every
gateway that sees a decision chooses alike, nobody can choose by what the answer was, and accuracies can be estimated
without bias. Choosing by doubt, leverage or knowledge gradient was no better than chance; when to audit matters
(docs/experiments.md).

Knows numbers; nothing of referees or logs. `Schedule.advance` is the one way along a
schedule: the gateway (`audit_choice`) and `replay` both take it.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType

import numpy as np
from numpy.typing import NDArray

from router_core.errors import AuditError

Array = NDArray[np.float64]

HORIZON = 2000
"""Instances over which `front` spends more than it does later. A stream whose length is known has that length."""

TAIL = 0.5
"""Share of the rate at which `front` goes on once its horizon is passed."""

NOVEL_SHIFT = 0.25
"""Part of the texts that were not novel which must become novel to be a change."""

WARM_UP = 64
"""Instances since the beginning or a restart that only tell what share of the texts is novel."""

FALSE_RESTARTS = 1e-3
"""Restarts per instance, at most, of a stream whose texts do not change."""


def even(t: Array, rate: float, horizon: float) -> Array:
    """Return the rate, whenever.

    Args:
        t: (n,) numbers of instances, the first is 1.
        rate: share to be audited.
        horizon: not read.
    """
    return np.full(np.shape(t), rate)


def front(t: Array, rate: float, horizon: float) -> Array:
    """Return probabilities with which √(t/T) of the T-instance budget is spent after t instances.

    p_t = min(1, rate·T·(√(t/T) − √((t − 1)/T))) up to t = T, about rate/2·√(T/t); after that rate/2. What is cut off at
    1 at the beginning is not spent later.

    Args:
        t: (n,) numbers of instances, the first is 1.
        rate: share of the first T instances to be audited.
        horizon: T.

    >>> front(np.array([1.0, 4.0, 100.0, 101.0]), 0.05, 100.0).round(3).tolist()
    [0.5, 0.134, 0.025, 0.025]
    """
    t = np.asarray(t, dtype=np.float64)
    early = rate * math.sqrt(horizon) * (np.sqrt(t) - np.sqrt(np.maximum(t - 1.0, 0.0)))
    return np.where(t <= horizon, np.minimum(early, 1.0), TAIL * rate)


Probabilities = Callable[[Array, float, float], Array]

SCHEDULES: Mapping[str, Probabilities] = MappingProxyType({"front": front, "even": even})
"""By name: (t, rate, horizon) to probabilities."""


@dataclass(frozen=True, slots=True)
class Schedule:
    """How many decisions are audited, and when.

    Attributes:
        rate: share, in [0, 1].
        name: of `SCHEDULES`.
        horizon: T of `front`, in instances.

    >>> Schedule.parse("0.05:even")
    Schedule(rate=0.05, name='even', horizon=2000)
    """

    rate: float
    name: str = "front"
    horizon: int = HORIZON

    def __post_init__(self) -> None:
        """Raises AuditError if a value is outside its domain."""
        if not 0.0 <= self.rate <= 1.0:
            raise AuditError(f"audit rate {self.rate}: give a share of the decisions, in [0, 1]")
        if self.name not in SCHEDULES:
            raise AuditError(f"audit schedule {self.name!r}: give one of {', '.join(SCHEDULES)}")
        if self.horizon < 1:
            raise AuditError(f"audit horizon {self.horizon}: give a positive number of instances")

    @classmethod
    def parse(cls, text: str, horizon: int = HORIZON) -> Schedule:
        """Read `RATE` or `RATE:SCHEDULE`.

        Raises:
            AuditError: it is neither.
        """
        number, _, name = text.strip().partition(":")
        try:
            rate = float(number)
        except ValueError:
            raise AuditError(f"audits {text!r}: give RATE or RATE:SCHEDULE, for example 0.05:front") from None
        return cls(rate, name or "front", horizon)

    def probabilities(self, t: Array) -> Array:
        """Return inclusion probabilities (n,) of the t-th instances since the beginning or the last restart, t >= 1."""
        return SCHEDULES[self.name](np.asarray(t, dtype=np.float64), self.rate, float(self.horizon))

    def probability(self, t: int) -> float:
        """Return the inclusion probability of the t-th instance, t >= 1."""
        return float(self.probabilities(np.array([t]))[0])

    def advance(
        self, progress: Progress, novel: Sequence[bool | None], alarms: float = 0.0
    ) -> tuple[Progress, list[float]]:
        """Return the progress after the next instances, and the inclusion probability of each.

        Args:
            progress: before them.
            novel: per instance: `Landmarks.is_novel` of its context; None where nobody can tell.
            alarms: Σ of the alarms of the posterior's watches.
        """
        numbers = []
        for each in novel:
            progress = progress.next(each, alarms)
            numbers.append(progress.t)
        found: list[float] = self.probabilities(np.array(numbers, dtype=np.float64)).tolist()
        return progress, found


def is_chosen(decision_id: str, probability: float) -> bool:
    """Return True if the decision is audited: the first 64 bits of SHA-256 of its id lie below the probability.

    >>> [is_chosen(str(i), 0.5) for i in range(3, 7)], is_chosen("x", 1.0), is_chosen("x", 0.0)
    ([True, True, False, False], True, False)
    """
    digest = hashlib.sha256(b"audit\0" + decision_id.encode("utf-8", "surrogatepass")).digest()
    return int.from_bytes(digest[:8]) / 2.0**64 < probability


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a run has come on its schedule. An instance's number is `t` after `next`.

    The schedule starts again when an arm has changed (`Posterior.watches`), and when novel texts become more frequent:
    a cumulative sum, after `WARM_UP` texts, of how much better the novel indicator is explained by a higher share
    (`NOVEL_SHIFT`) than by the share so far. While that share holds, the sum passes log(1/α) once in 1/α instances or
    less (Lorden 1971).

    Attributes:
        t: instances of the run since the beginning or the last restart.
        restarts: how many there were.
        alarms: of the posterior, so far.
        met: texts seen here since the last restart: of the t, those that did not pass another gateway.
        novel: how many of them were novel.
        rise: the cumulative sum.

    >>> progress = Progress()
    >>> for _ in range(200):
    ...     progress = progress.next(novel=False)
    >>> for _ in range(12):
    ...     progress = progress.next(novel=True)
    >>> progress.restarts, Progress(t=40).next(alarms=1.0).t
    (1, 1)
    """

    t: int = 0
    restarts: int = 0
    alarms: float = 0.0
    met: float = 0.0
    novel: float = 0.0
    rise: float = 0.0

    def next(self, novel: bool | None = None, alarms: float = 0.0) -> Progress:
        """Return the progress with one instance more.

        Args:
            novel: `Landmarks.is_novel` of the instance's context; None where nobody can tell.
            alarms: Σ of the alarms of the posterior's watches.
        """
        if alarms > self.alarms:
            return Progress(1, self.restarts + 1, alarms)
        if novel is None:
            return replace(self, t=self.t + 1)
        rise = 0.0
        if self.met >= WARM_UP:
            usual = (self.novel + 1.0) / (self.met + 2.0)
            changed = usual + NOVEL_SHIFT * (1.0 - usual)
            step = math.log(changed / usual) if novel else math.log((1.0 - changed) / (1.0 - usual))
            rise = max(0.0, self.rise + step)
            if rise >= math.log(1.0 / FALSE_RESTARTS):
                return Progress(1, self.restarts + 1, self.alarms)
        return Progress(self.t + 1, self.restarts, self.alarms, self.met + 1.0, self.novel + float(novel), rise)

"""How the pairs come and when their feedback does: order, domain drift, repeats, delays, missing feedback.

A `Scenario` says what shall happen, a `Plan` is what does happen under one seed. A plan knows nothing of policies, so
that all policies of a seed meet the same order, the same gaps and the same noise: their difference is theirs. Called by
`run`, and by the replay over HTTP.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from router_core.errors import DatasetError, FeedbackError
from router_core.replay.audits import Audits
from router_core.replay.loss import SimulatedLoss
from router_core.replay.table import Table

Array = NDArray[np.float64]

DRIFT_SOFTNESS = 0.04
"""Standard deviation, as a share of the stream, by which a pair strays from its domain's phase: about a tenth of the
stream around each border mixes both domains."""

LASER_BATCH = 16
"""Pairs that share one RM under `laser`: the training batch size in LASER's released configuration
(github.com/duykhuongnguyen/LASeR-MAB, scripts/config.yaml)."""

# One generator per purpose, so that switching one on does not change what another gives.
_ORDERS, _DELAYS, _MISSING, _LOSSES, _SHADOWS, _FLOORS, _AUDITS = range(1, 8)


@dataclass(frozen=True, slots=True)
class Delay:
    """When the feedback of the pair at step t arrives: before the draw of step t + 1 + delay.

    Attributes:
        kind: `constant`, `geometric` (random, mean `steps`), or `batch` (all of a batch of `steps` at its end).
        steps: see `kind`.
    """

    kind: str = "constant"
    steps: int = 0

    @classmethod
    def parse(cls, text: str) -> Delay:
        """`N`, `geometric:MEAN` or `batch:SIZE`.

        Raises:
            FeedbackError: it is neither.

        >>> Delay.parse("32"), Delay.parse("batch:64").kind
        (Delay(kind='constant', steps=32), 'batch')
        """
        kind, _, number = text.strip().rpartition(":")
        kind = kind or "constant"
        smallest = 1 if kind == "batch" else 0
        if kind not in ("constant", "geometric", "batch") or not number.isdecimal() or int(number) < smallest:
            raise FeedbackError(f"delay {text!r}: give a number of instances, `geometric:MEAN` or `batch:SIZE`")
        return cls(kind, int(number))

    def due(self, length: int, rng: np.random.Generator) -> NDArray[np.int64]:
        """(T,) the last step that is drawn without the feedback of step t; at least t."""
        steps = np.arange(length)
        if self.kind == "geometric":
            return steps + rng.geometric(1.0 / (1.0 + self.steps), size=length) - 1
        if self.kind == "batch":
            return (steps // self.steps + 1) * self.steps - 1
        return steps + self.steps

    def __str__(self) -> str:
        return str(self.steps) if self.kind == "constant" else f"{self.kind}:{self.steps}"


@dataclass(frozen=True, slots=True)
class Scenario:
    """What happens to a stream.

    Attributes:
        repeat: how often all pairs are met, each time in a new order.
        drift: pairs come in phases, one domain after another, with soft borders; the domains' order is the seed's.
        delay: when feedback arrives.
        missing: share of the steps whose feedback never does, in [0, 1].
        batch: pairs that share one RM under policies with one RM per batch.
        loss: the simulated loss, for the loss signal.
        audits: of which steps a referee speaks; None: there is feedback instead.
    """

    repeat: int = 1
    drift: bool = False
    delay: Delay = field(default_factory=Delay)
    missing: float = 0.0
    batch: int = LASER_BATCH
    loss: SimulatedLoss = field(default_factory=SimulatedLoss)
    audits: Audits | None = None

    def __post_init__(self) -> None:
        if self.repeat < 1 or self.batch < 1:
            raise DatasetError(f"repeat {self.repeat} and batch {self.batch}: give positive integers")
        if not 0.0 <= self.missing <= 1.0:
            raise FeedbackError(f"missing {self.missing}: give a share in [0, 1]")


@dataclass(frozen=True, slots=True, eq=False)
class Plan:
    """One seed's stream of T steps.

    Attributes:
        seed: of the plan.
        order: (T,) int64, index of the pair met at each step.
        due: (T,) int64, last step drawn without this step's feedback; T or more: it never arrives.
        noise: (T, K) standard normals of the draws.
        loss_noise: (T,) standard normals of the simulated loss.
        shadow_rank: (T,) int64, a permutation: with rate ρ the steps of rank below ρT are shadowed.
        uniforms: (T, 1 + K) in [0, 1), of the choices that fall to the floors (`policies.floor_draws`).
        audit_uniforms: (T, 2) in [0, 1): a step is audited where the first lies below its probability, and the referee
            right where the second lies below its accuracy.
    """

    seed: int
    order: NDArray[np.int64]
    due: NDArray[np.int64]
    noise: Array
    loss_noise: Array
    shadow_rank: NDArray[np.int64]
    uniforms: Array
    audit_uniforms: Array

    def __len__(self) -> int:
        return len(self.order)

    def shadowed(self, rate: float) -> NDArray[np.bool_]:
        """(T,) which steps every RM is asked about: exactly round(ρT), nested for growing rates."""
        return self.shadow_rank < round(rate * len(self))

    def arrivals(self) -> NDArray[np.int64]:
        """Steps whose feedback arrives at all, in the order in which it does; among equals the earlier step first."""
        arriving = np.flatnonzero(self.due < len(self))
        order: NDArray[np.int64] = arriving[np.argsort(self.due[arriving], kind="stable")]
        return order


def make_plan(table: Table, scenario: Scenario, seed: int) -> Plan:
    """What happens under this seed.

    Raises:
        DatasetError: drift is asked for and the pairs have no two domains or subsets.
    """
    size, n_arms = len(table), len(table.pool)
    rng = np.random.default_rng(seed)
    first = rng.permutation(size)
    orders = _generator(seed, _ORDERS)
    rounds = [first, *(orders.permutation(size) for _ in range(scenario.repeat - 1))]
    if scenario.drift:
        kinds = _kinds(table)
        rounds = [_in_phases(order, kinds, orders) for order in rounds]
    order = np.concatenate(rounds)
    length = len(order)
    due = scenario.delay.due(length, _generator(seed, _DELAYS))
    lost = _generator(seed, _MISSING).permutation(length)[: round(scenario.missing * length)]
    due[lost] = length
    return Plan(
        seed,
        order,
        due,
        rng.standard_normal((length, n_arms)),
        _generator(seed, _LOSSES).standard_normal(length),
        _generator(seed, _SHADOWS).permutation(length),
        _generator(seed, _FLOORS).random((length, 1 + n_arms)),
        _generator(seed, _AUDITS).random((length, 2)),
    )


def _generator(seed: int, purpose: int) -> np.random.Generator:
    return np.random.default_rng((seed, purpose))


def _kinds(table: Table) -> Sequence[str]:
    """What drifts: domains if there are several, else subsets."""
    for names in (table.domains, table.subsets):
        if len(set(names)) > 1:
            return names
    raise DatasetError(
        "drift: the pairs have no two different values of 'domain' or 'subset'; give them, or do not drift"
    )


def _in_phases(order: NDArray[np.int64], kinds: Sequence[str], rng: np.random.Generator) -> NDArray[np.int64]:
    """The same pairs, one kind after another; inside a kind in the given order, but for the strayed."""
    of_pair = np.array(kinds)
    place = np.empty(len(order))
    begin = 0
    for kind in rng.permutation(np.unique(of_pair)):
        members = order[of_pair[order] == kind]
        place[members] = np.arange(begin, begin + len(members))
        begin += len(members)
    place += rng.normal(0.0, DRIFT_SOFTNESS * len(order), size=len(order))
    return np.argsort(place, kind="stable")

"""`stacked` and `cascade:B` along a stream: the posterior draws the first arm, learned votes say who else is asked.

Knows the loop of `passes`, votes and a pacer. Called by `run`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from router_core.combine import Answers, Combination, Pacer, follow, margins_of, right_of, surcharges
from router_core.errors import DatasetError
from router_core.policies import Beliefs
from router_core.posterior import Posterior
from router_core.records import Signal
from router_core.replay.passes import Loop, Stage, Steps
from router_core.replay.stream import Plan
from router_core.replay.trace import Pass

Array = NDArray[np.float64]


@dataclass(frozen=True, slots=True, eq=False)
class Played:
    """One pass, and its calls and its price per instance."""

    trace: Pass
    calls: float
    price: float


def combining_pass(stage: Stage, plan: Plan, name: str, combination: Combination | None, on_step: Steps) -> Played:
    """One pass of `stacked` or `cascade:B`; a preference teaches every arm that was asked.

    The posterior's residual enters the offsets that the votes read. Instances drawn between two arrivals of feedback
    have the same multiplier; it moves after them, by what each of them cost.

    Raises:
        DatasetError: the checkpoint holds no learned votes.
    """
    if combination is None:
        raise DatasetError(
            f"policy {name!r} needs learned votes: give a checkpoint that holds them, --train or --folds"
        )
    loop = _CombiningLoop(stage, plan, combination, combination.pacer(name))
    while loop.step < len(plan):
        on_step(loop.advance())
    return Played(
        Pass(plan.seed, plan.order, loop.correct, loop.asked, int(loop.audited.sum())),
        float(loop.calls.mean()),
        float(loop.price.mean()),
    )


class _CombiningLoop(Loop):
    """The loop with further arms behind the drawn one."""

    def __init__(self, stage: Stage, plan: Plan, combination: Combination, pacer: Pacer | None) -> None:
        super().__init__(stage, plan)
        table = stage.table
        self._answers = Answers(table.verdicts, table.answered, margins_of(table.scores), table.responses)
        self._combination, self._pacer = combination, pacer
        self._sequences: list[list[int]] = []
        self.calls, self.price = np.empty(len(plan)), np.empty(len(plan))

    def _beliefs(self, x: NDArray[np.float32], offsets: Array, state: Posterior) -> Beliefs:
        """Those of the draw: less what each arm costs beyond the cheapest."""
        beliefs = super()._beliefs(x, offsets, state)
        multiplier = 0.0 if self._pacer is None else self._pacer.multiplier
        return Beliefs(beliefs.means - surcharges(self._combination.costs, multiplier), beliefs.sds, beliefs.floors)

    def _earned(self, begin: int, end: int) -> Array:
        stage, pairs = self._stage, self._plan.order[begin:end]
        offsets = stage.policy.beliefs(stage.x[pairs], stage.offsets[pairs], self._state).means
        multiplier = None if self._pacer is None else self._pacer.multiplier
        answers = self._answers.rows(pairs)
        first, costs = self.asked[begin:end], self._combination.costs
        paths = follow(self._combination.votes, offsets, answers, first, costs, multiplier=multiplier)
        self._sequences += [[arm for arm in arms if arm >= 0] for arms in paths.arms.tolist()]
        spent = paths.spent[:, -1]
        full = self.audited[begin:end] & (stage.scenario.audits is not None and stage.scenario.audits.ask_all)
        self.calls[begin:end] = np.where(full, len(costs), (paths.arms >= 0).sum(axis=1))
        self.price[begin:end] = np.where(full, costs.sum(), spent)
        if self._pacer is not None:
            for price in spent.tolist():
                self._pacer = self._pacer.spent(price)
        preferred = paths.preferred[:, -1]
        return right_of(preferred, stage.table.labels[pairs], stage.table.responses[pairs])

    def _heard(self, step: int) -> Sequence[int]:
        return self._sequences[step] if self._stage.signal is Signal.PREFERENCE else ()

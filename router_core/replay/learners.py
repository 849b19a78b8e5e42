"""Online learners with a state of their own, as rows beside the policies of the service: how one meets a stream.

| name | file | RM calls | source |
|---|---|---|---|
| `neural`, `neural:none` | `neural` | 1 | Neural Thompson sampling, arXiv 2010.00827 |
| `dueling`, `dueling:none` | `dueling` | 2 | Feel-good Thompson sampling for dueling bandits, arXiv 2404.06013 |

The first of two names starts at the offsets of the run's prior, the second knows nothing. They exist in replays alone:
a run's posterior is a pure function of its log, and these are not. Called by `run`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from router_core.errors import DatasetError, FeedbackError
from router_core.prior import PriorForm
from router_core.records import Signal
from router_core.replay.dueling import DuelingBandit
from router_core.replay.neural import NeuralThompson
from router_core.replay.passes import Stage, Steps
from router_core.replay.stream import Plan
from router_core.replay.trace import Pass

Array = NDArray[np.float64]

_DRAWS = 7
"""Distinguishes the generator of these draws from those of `stream`."""


class Learner(Protocol):
    """Chooses arms one instance at a time, and is told how right they were when that is known."""

    @property
    def calls(self) -> int:
        """RMs asked per instance; where two disagree, an even coin decides the verdict."""

    def choose(self, x: Array, offsets: Array) -> tuple[int, ...]:
        """Return the arms to ask, `calls` of them, perhaps one twice.

        Args:
            x: (W,) the columns of a context that the prior's posterior reads.
            offsets: (K,) of the prior.
        """

    def learn(self, x: Array, offsets: Array, arms: tuple[int, ...], rewards: Array) -> None:
        """Take in how right the asked arms were: rewards (calls,) in [0, 1]."""


LEARNERS: Mapping[str, Callable[[int, int, np.random.Generator], Learner]] = MappingProxyType(
    {"neural": NeuralThompson, "dueling": DuelingBandit}
)
"""By name, from W, K and a generator."""

FORMS: Mapping[str, PriorForm | None] = MappingProxyType({"": None, "none": PriorForm.NONE})


def is_learner(name: str) -> bool:
    """Return True if this names a learner of this module."""
    base, _, form = name.partition(":")
    return base in LEARNERS and form in FORMS


def learner_pass(name: str, stage: Stage, plan: Plan, on_step: Steps) -> tuple[Pass, int]:
    """One learner once through one stream; the pass (whose `asked` are the first arms), and its calls per instance.

    Raises:
        FeedbackError: the signal is not `preference` or `reward`.
        DatasetError: an RM abstains on a pair.
    """
    if stage.signal is Signal.LOSS:
        raise FeedbackError(f"policy {name!r} with signal 'loss': use --signal preference or reward")
    if not stage.table.answered.all():
        raise DatasetError(f"policy {name!r} cannot leave an RM out, and some abstain: leave these out with --pool")
    table, x = stage.table, stage.prior.learned(stage.x).astype(np.float64)
    rng = np.random.default_rng((plan.seed, _DRAWS))
    learner = LEARNERS[name.partition(":")[0]](x.shape[1], len(table.pool), rng)
    asked = np.empty((len(plan), learner.calls), np.int64)
    correct = np.empty(len(plan))
    arrivals = iter(plan.arrivals().tolist())
    waiting = next(arrivals, None)
    for step, pair in enumerate(plan.order.tolist()):
        asked[step] = learner.choose(x[pair], stage.offsets[pair])
        correct[step] = table.correctness[pair, asked[step]].mean()
        while waiting is not None and plan.due[waiting] <= step:
            known, arms = int(plan.order[waiting]), tuple(asked[waiting].tolist())
            learner.learn(x[known], stage.offsets[known], arms, table.credit[known, asked[waiting]])
            waiting = next(arrivals, None)
    on_step(len(plan))
    return Pass(plan.seed, plan.order, correct, asked[:, 0]), learner.calls

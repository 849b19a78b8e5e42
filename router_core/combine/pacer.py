"""The price of a call in units of P(right), paced so that spending keeps to a budget; state in, state out.

Knows what instances cost; nothing of arms or answers.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from router_core.errors import HyperparameterError

HIGHEST = 1.0
"""No call is worth this much per unit of price: with it only the first arm is asked."""
LOWEST = 1e-6
"""With it nearly every call is made."""


RATE = 0.05
"""η where all prices are 1."""


@dataclass(frozen=True, slots=True)
class Pacer:
    """Dual ascent on the budget constraint E[price] ≤ B: after an instance that cost c, ln μ ← ln μ + η(c − B).

    The exponentiated form (mirror descent, as in ParetoBandit, arXiv 2604.00136), because gains differ by orders of
    magnitude. As long as μ lies inside its bounds, the sum of all overspending is (ln μ_T − ln μ_0)/η exactly: at most
    ln(`HIGHEST`/μ_0)/η, however long the run, and then by one instance at most for each instance under way.

    Attributes:
        budget: B, the mean price of an instance, first call included; in units of the cheapest arm, at least 1.
        multiplier: μ, from the offline stage (`Multipliers.at`) at the start.
        rate: η.

    >>> pacer = Pacer(budget=1.5, multiplier=0.01)
    >>> pacer.spent(3.0).multiplier > pacer.multiplier > pacer.spent(1.0).multiplier
    True
    """

    budget: float
    multiplier: float
    rate: float = RATE

    def __post_init__(self) -> None:
        if not (math.isfinite(self.budget) and self.budget >= 1.0):
            raise HyperparameterError(f"budget = {self.budget}: give the mean price per instance, at least 1")
        if not 0.0 < self.rate <= 1.0:
            raise HyperparameterError(f"rate = {self.rate}: must be inside (0, 1]")
        if not LOWEST <= self.multiplier <= HIGHEST:
            raise HyperparameterError(f"multiplier = {self.multiplier}: must be from {LOWEST:g} to {HIGHEST:g}")

    @staticmethod
    def rate_at(dearest: float) -> float:
        """Return η where the dearest arm costs so much: μ moves as far for its call as for one of price 1."""
        return RATE / dearest

    def spent(self, price: float) -> Pacer:
        """After one more instance that cost `price` in all."""
        logarithm = math.log(self.multiplier) + self.rate * (price - self.budget)
        return replace(self, multiplier=math.exp(min(max(logarithm, math.log(LOWEST)), math.log(HIGHEST))))

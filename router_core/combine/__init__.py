"""Learned votes: what the answers of any asked arms say together, what one more answer is worth, and a budget's pace.

Numbers in, numbers out; numpy only. The mathematics is in docs/math/combination.md. Fitted by `router_core.offline`,
stored in the checkpoint, called by plans, by `evaluate` and by `frontier`.
"""

from router_core.combine.answers import Answers, margins_of, right_of
from router_core.combine.cascade import (
    Multipliers,
    Paths,
    Practice,
    first_arms,
    follow,
    multiplier_for,
    relative_prices,
    surcharges,
)
from router_core.combine.combination import Combination
from router_core.combine.names import CASCADE, COMBINED, STACKED, budget_of, is_combined, wanted_combined
from router_core.combine.pacer import Pacer
from router_core.combine.value import call_values, next_call
from router_core.combine.votes import Verdicts, Votes, verdicts_of

__all__ = [
    "CASCADE",
    "COMBINED",
    "STACKED",
    "Answers",
    "Combination",
    "Multipliers",
    "Pacer",
    "Paths",
    "Practice",
    "Verdicts",
    "Votes",
    "budget_of",
    "call_values",
    "first_arms",
    "follow",
    "is_combined",
    "margins_of",
    "multiplier_for",
    "next_call",
    "relative_prices",
    "right_of",
    "surcharges",
    "verdicts_of",
    "wanted_combined",
]

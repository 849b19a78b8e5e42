"""Off-policy evaluation: what would another policy have earned on this log? (docs/off-policy.md)"""

from __future__ import annotations

from router_core.ope.data import (
    Estimate,
    LoggedData,
    NoSupportError,
    among_available,
    available_propensities,
    numbered,
    one_reward_per_row,
    with_shadows,
)
from router_core.ope.estimators import doubly_robust, ips, snips, stabilising_weights
from router_core.ope.reward_model import sequential_ridge
from router_core.ope.safe import safe_interval
from router_core.ope.sequences import SequenceLog, Sequencer, SequenceValue, evaluate_sequences, weigh_sequences
from router_core.ope.targets import fixed_policy, softmax_policy
from router_core.ope.weights import MAX_LOST, PROPENSITY_FLOOR, weigh

__all__ = [
    "MAX_LOST",
    "PROPENSITY_FLOOR",
    "Estimate",
    "LoggedData",
    "NoSupportError",
    "SequenceLog",
    "SequenceValue",
    "Sequencer",
    "among_available",
    "available_propensities",
    "doubly_robust",
    "evaluate_sequences",
    "fixed_policy",
    "ips",
    "numbered",
    "one_reward_per_row",
    "safe_interval",
    "sequential_ridge",
    "snips",
    "softmax_policy",
    "stabilising_weights",
    "weigh",
    "weigh_sequences",
    "with_shadows",
]

"""The systems of the paper's tables, one small file each, selected by name.

| name | file | RM calls | prior form |
|---|---|---|---|
| `single:<model>` | `single` | 1 | the run's |
| `random` | `random` | 1 | the run's |
| `majority` | `majority` | K | the run's |
| `uwo` | `uwo` | K | the run's |
| `sum`, `sum:A=2,B=0.5` | `several` | those named, or K | the run's |
| `min`, `min:A,B` | `several` | those named, or K | the run's |
| `gate:RULE,RM` | `several` | 1 or 2 | the run's |
| `within:RULE,RM` | `several` | 2 | the run's |
| `laser` | `laser` | 1 | `linucb` |
| `bayesian` | `bayesian` | 1 | the run's |
| `bayesian:paper`, `bayesian:calibrated`, `bayesian:none` | `bayesian` | 1 | as named |
| `offline` | `bayesian` | 1 | the run's |
| `offline:paper`, `offline:calibrated` | `bayesian` | 1 | as named |
| `stacked` | `combined` | K | the run's |
| `cascade:B` | `combined` | B on average | the run's |

To add one: a file with a frozen dataclass that keeps `base.Policy`, a line in `_BY_NAME`, a row above.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from types import MappingProxyType

from router_core.combine import STACKED, Combination, budget_of, is_combined
from router_core.errors import UnknownPolicyError
from router_core.policies.base import (
    AllCalls,
    Beliefs,
    Choices,
    OneCall,
    Policy,
    combined_verdict,
    draw,
    draw_batch,
    floor_draws,
    propensity_without,
)
from router_core.policies.bayesian import BayesianPolicy, OfflinePolicy, floors_of
from router_core.policies.combined import CombinedPolicy, answers_of
from router_core.policies.laser import LaserPolicy
from router_core.policies.majority import MajorityPolicy, majority_verdict, vote_shares
from router_core.policies.plan import AskRest, Given, Plan, ScaleOf, View
from router_core.policies.random import RandomPolicy
from router_core.policies.scale import ScoreScale
from router_core.policies.several import GatePolicy, MinPolicy, SumPolicy, WithinPolicy
from router_core.policies.single import SinglePolicy
from router_core.policies.uwo import UWO_CHOICE_LAMBDA, UWO_REWARD_LAMBDA, UwoPolicy
from router_core.prior import PriorForm

_SINGLE = "single:"


_FORMS_OF_BAYESIAN = (PriorForm.PAPER, PriorForm.CALIBRATED, PriorForm.NONE)
_FORMS_OF_OFFLINE = (PriorForm.PAPER, PriorForm.CALIBRATED)

_BY_NAME: Mapping[str, Callable[[], Policy]] = MappingProxyType(
    {
        "bayesian": BayesianPolicy,
        "offline": OfflinePolicy,
        "laser": LaserPolicy,
        "random": RandomPolicy,
        "majority": MajorityPolicy,
        "uwo": UwoPolicy,
        **{f"bayesian:{form}": partial(BayesianPolicy, f"bayesian:{form}", form) for form in _FORMS_OF_BAYESIAN},
        **{f"offline:{form}": partial(OfflinePolicy, f"offline:{form}", form) for form in _FORMS_OF_OFFLINE},
    }
)


_SEVERAL = ("sum", "min", "gate", "within")


def make_policy(
    name: str, pool: Sequence[str], combination: Combination | None = None, asked: Sequence[int] | None = None
) -> Policy:
    """The policy of that name.

    Args:
        name: one of the table above.
        pool: model names, in arm order.
        combination: what a checkpoint learned about votes, which `stacked` and `cascade:B` need.
        asked: arms that may be asked, the others are retired; None: all.

    Raises:
        UnknownPolicyError: no such policy, or `single:` of a model that is not in the pool.
    """
    arms = {pool[k]: k for k in (range(len(pool)) if asked is None else asked)}
    if name.startswith(_SINGLE):
        model = name.removeprefix(_SINGLE)
        if model not in arms:
            raise UnknownPolicyError(
                f"policy {name!r}: no model {model!r} in the pool; choose one of {', '.join(arms)}"
            )
        return SinglePolicy(name, arms[model])
    if name.partition(":")[0] in _SEVERAL:
        return _several(name, arms)
    if is_combined(name):
        if combination is None:
            raise UnknownPolicyError(
                f"policy {name!r} needs learned votes: use a checkpoint that `reward-router train` made of enough pairs"
            )
        if name != STACKED:
            budget_of(name)
        return CombinedPolicy(name, combination)
    if name not in _BY_NAME:
        known = ", ".join([*_BY_NAME, *(f"{_SINGLE}{model}" for model in arms)])
        raise UnknownPolicyError(f"policy {name!r} is unknown: choose one of {known}")
    return _BY_NAME[name]()


def _several(name: str, pool: Mapping[str, int]) -> Policy:
    kind, _, words = name.partition(":")
    named = [word.strip() for word in words.split(",")] if words else [] if kind in ("gate", "within") else [*pool]
    weights = [1.0] * len(named)
    if kind == "sum":
        pairs = [word.rpartition("=") for word in named]
        named = [left if equals else right for left, equals, right in pairs]
        weights = [_weight(name, right) if equals else 1.0 for _, equals, right in pairs]
    unknown = [model for model in named if model not in pool]
    if unknown or len(set(named)) != len(named):
        raise UnknownPolicyError(
            f"policy {name!r}: no model {unknown[0]!r} in the pool; choose of {', '.join(pool)}"
            if unknown
            else f"policy {name!r} names a model twice: name each once"
        )
    arms = tuple(pool[model] for model in named)
    if kind == "sum":
        return SumPolicy(name, arms, tuple(weights))
    if kind == "min":
        return MinPolicy(name, arms)
    if len(arms) != 2:
        raise UnknownPolicyError(f"policy {name!r} names {len(arms)} models: use {kind}:RULE,RM, two of the pool")
    return GatePolicy(name, arms) if kind == "gate" else WithinPolicy(name, arms)


def _weight(name: str, word: str) -> float:
    try:
        weight = float(word)
    except ValueError:
        weight = math.nan
    if not math.isfinite(weight):
        raise UnknownPolicyError(f"policy {name!r}: {word!r} is no weight; use a number, as in sum:A=0.7,B=0.3")
    return weight


__all__ = [
    "UWO_CHOICE_LAMBDA",
    "UWO_REWARD_LAMBDA",
    "AllCalls",
    "AskRest",
    "BayesianPolicy",
    "Beliefs",
    "Choices",
    "CombinedPolicy",
    "Given",
    "LaserPolicy",
    "MajorityPolicy",
    "OfflinePolicy",
    "OneCall",
    "Plan",
    "Policy",
    "RandomPolicy",
    "ScaleOf",
    "ScoreScale",
    "SinglePolicy",
    "UwoPolicy",
    "View",
    "answers_of",
    "combined_verdict",
    "draw",
    "draw_batch",
    "floor_draws",
    "floors_of",
    "majority_verdict",
    "make_policy",
    "propensity_without",
    "vote_shares",
]

"""The systems of the paper's tables, one small file each, selected by name.

| name | file | RM calls |
|---|---|---|
| `single:<model>` | `single` | 1 |
| `random` | `random` | 1 |
| `majority` | `majority` | K |
| `bayesian` | `bayesian` | 1 |
| `offline` | `bayesian` | 1 |

To add one: a file with a frozen dataclass that keeps `base.Policy`, a line in `_BY_NAME`, a row above.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType

from router_core.errors import UnknownPolicyError
from router_core.policies.base import Beliefs, Choices, Policy, draw, propensity_without
from router_core.policies.bayesian import BayesianPolicy, OfflinePolicy
from router_core.policies.majority import MajorityPolicy, majority_verdict, vote_shares
from router_core.policies.random import RandomPolicy
from router_core.policies.single import SinglePolicy

_BY_NAME: Mapping[str, Callable[[], Policy]] = MappingProxyType(
    {"bayesian": BayesianPolicy, "offline": OfflinePolicy, "random": RandomPolicy, "majority": MajorityPolicy}
)

_SINGLE = "single:"


def make_policy(name: str, pool: Sequence[str]) -> Policy:
    """The policy of that name.

    Args:
        name: one of the table above.
        pool: model names, in arm order.

    Raises:
        UnknownPolicyError: no such policy, or `single:` of a model that is not in the pool.
    """
    if name.startswith(_SINGLE):
        model = name.removeprefix(_SINGLE)
        if model not in pool:
            raise UnknownPolicyError(
                f"policy {name!r}: no model {model!r} in the pool; choose one of {', '.join(pool)}"
            )
        return SinglePolicy(name, list(pool).index(model))
    if name not in _BY_NAME:
        known = ", ".join([*_BY_NAME, *(f"{_SINGLE}{model}" for model in pool)])
        raise UnknownPolicyError(f"policy {name!r} is unknown: choose one of {known}")
    return _BY_NAME[name]()


__all__ = [
    "BayesianPolicy",
    "Beliefs",
    "Choices",
    "MajorityPolicy",
    "OfflinePolicy",
    "Policy",
    "RandomPolicy",
    "SinglePolicy",
    "draw",
    "majority_verdict",
    "make_policy",
    "propensity_without",
    "vote_shares",
]

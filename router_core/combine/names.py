"""Names of the policies that combine answers: `stacked`, `cascade:B`."""

from __future__ import annotations

import math
from collections.abc import Sequence

from router_core.errors import UnknownPolicyError

STACKED = "stacked"
CASCADE = "cascade:"
COMBINED = (STACKED, "cascade:1.5", "cascade:2", "cascade:3")
"""What is judged unless somebody says otherwise."""


def is_combined(name: str) -> bool:
    """True for `stacked` and `cascade:B`."""
    return name == STACKED or name.startswith(CASCADE)


def budget_of(name: str) -> float:
    """B of `cascade:B`: mean calls, or mean price, per instance.

    Raises:
        UnknownPolicyError: B is not a number of at least 1.

    >>> budget_of("cascade:1.5")
    1.5
    """
    try:
        budget = float(name.removeprefix(CASCADE))
    except ValueError:
        budget = math.nan
    if not 1.0 <= budget < math.inf:
        raise UnknownPolicyError(f"policy {name!r}: give the mean calls per instance, at least 1: cascade:1.5")
    return budget


def wanted_combined(policies: Sequence[str]) -> tuple[str, ...]:
    """Those of the policies that combine answers; `COMBINED` where no policies are named.

    Raises:
        UnknownPolicyError: a budget that cannot be.
    """
    if not policies:
        return COMBINED
    for name in policies:
        if name.startswith(CASCADE):
            budget_of(name)
    return tuple(name for name in policies if is_combined(name))

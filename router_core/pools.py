"""A pool that changes while its run goes on: who is asked from a position of the log on (docs/pools-live.md).

Arms are never renumbered: an arm that is added comes last, one that is retired keeps its place, its posterior and its
name, so that an index means the same scorer in every decision of the log. Knows no names, addresses or files: what the
service calls its specification is bytes here, which a snapshot keeps. Called by `posterior.fold` and `policies`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from router_core.prior import Prior

PROBATION_EVENTS = 32.0
"""Events until an arm of which nothing was known takes part in the draw: the level of its accuracy is then known to
about 0.08."""

PROBATION_SHARE = 0.05
"""Share of the instances that all arms on probation together are asked about, at most."""


@dataclass(frozen=True, slots=True)
class PoolState:
    """Who is asked.

    Attributes:
        retired: (K,) True for arms that are asked no more; empty where none is.
        probation: (K,) events that an arm must have before it takes part in the draw, 0 for none; until then it is
            asked about a bounded share of the instances. Empty where nobody is.
        specification: the service's words for it; empty until the pool is changed.
    """

    retired: tuple[bool, ...] = ()
    probation: tuple[float, ...] = ()
    specification: bytes = b""


@dataclass(frozen=True, slots=True)
class PoolChange:
    """An event of the log: the pool from here on.

    Attributes:
        prior: of all arms, those that are added last; its offsets and hyper-parameters hold from here on.
        state: who is asked.
    """

    prior: Prior
    state: PoolState


class Mark(NamedTuple):
    """An event of the log that teaches nothing and changes nothing, but has a place in it."""

    note: str = ""

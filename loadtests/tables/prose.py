"""Sentences that follow from figures: which side of an interval a difference lies on, in words.

Every sentence is computed, so that a page never says what its own tables do not. Called by `page`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from loadtests.tables.sheets import accuracy, signed

BEATS, EQUALS, LOSES = "beats", "cannot be told apart from", "loses to"


def standing(difference: Mapping[str, Any]) -> str:
    """Ours against another: `BEATS` if the 95 % interval of the difference lies above 0, `LOSES` if below."""
    low, high = difference["ci95"]
    if low > 0:
        return BEATS
    return LOSES if high < 0 else EQUALS


def listed(names: Sequence[str]) -> str:
    """`a`, `a and b`, `a, b and c`.

    >>> listed(["a", "b", "c"])
    'a, b and c'
    """
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def by_standing(what: str, differences: Mapping[str, Mapping[str, Any]]) -> str:
    """One clause: where ours beats, equals, loses to `what`; with the differences.

    Args:
        what: the other system.
        differences: by place, ours minus the other.
    """
    clauses = []
    for verb in (BEATS, EQUALS, LOSES):
        places = [f"{place} ({signed(d['difference'])})" for place, d in differences.items() if standing(d) == verb]
        if places:
            clauses.append(f"{verb} {what if not clauses else 'it'} on {listed(places)}")
    return "; ".join(clauses)


def against(differences: Mapping[str, Mapping[str, Any]]) -> str:
    """Which systems ours beats, equals, loses to, in one sentence without its subject."""
    clauses = []
    for verb in (BEATS, EQUALS, LOSES):
        names = [f"{name} ({signed(d['difference'])})" for name, d in differences.items() if standing(d) == verb]
        if names:
            clauses.append(f"{verb} {listed(names)}")
    return "; ".join(clauses)


def reached(value: float, target: float) -> str:
    """`yes`, or how much is missing, at three digits."""
    missing = round(target - round(value, 3), 3)
    return "yes" if missing <= 0 else f"no, {accuracy(missing)} short"


def against_zero(difference: Mapping[str, Any]) -> str:
    """Is ours at least as good: `yes`, `not told apart`, `no`."""
    return {BEATS: "yes", EQUALS: "not told apart", LOSES: "no"}[standing(difference)]

"""Sentences that follow from figures: which side of an interval a difference lies on, in words.

Every sentence is computed, so that a page never says what its own tables do not. Called by `page`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from loadtests.tables.sheets import accuracy, signed

BEATS, EQUALS, LOSES = "better", "not told apart", "worse"
_THAN = {BEATS: "than", EQUALS: "from", LOSES: "than"}


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


def by_place(differences: Mapping[str, Mapping[str, Any]]) -> str:
    """Where ours is better, equal, worse, with the differences.

    >>> by_place({"K4": {"difference": 0.05, "ci95": [0.03, 0.07]}, "K9": {"difference": 0.0, "ci95": [-0.01, 0.01]}})
    'better on K4 (+.050); not told apart on K9 (+.000)'
    """
    return "; ".join(f"{verb} on {listed(names)}" for verb, names in _sorted(differences).items())


def against(differences: Mapping[str, Mapping[str, Any]]) -> str:
    """Which systems ours is better than, equal to, worse than, with the differences."""
    return "; ".join(f"{verb} {_THAN[verb]} {listed(names)}" for verb, names in _sorted(differences).items())


def _sorted(differences: Mapping[str, Mapping[str, Any]]) -> dict[str, list[str]]:
    """Names with their differences, by standing; no empty ones."""
    found: dict[str, list[str]] = {verb: [] for verb in (BEATS, EQUALS, LOSES)}
    for name, difference in differences.items():
        found[standing(difference)].append(f"{name} ({signed(difference['difference'])})")
    return {verb: names for verb, names in found.items() if names}


def reached(value: float, target: float) -> str:
    """`yes`, or how much is missing, at three digits."""
    missing = round(target - round(value, 3), 3)
    return "yes" if missing <= 0 else f"no, {accuracy(missing)} short"


def decided(difference: Mapping[str, Any], p: float) -> str:
    """`BEATS` or `LOSES` where the adjusted p-value is below .05, else `EQUALS`."""
    if p >= 0.05:
        return EQUALS
    return BEATS if difference["difference"] > 0 else LOSES


def against_zero(difference: Mapping[str, Any]) -> str:
    """Is ours at least as good: `yes`, `not told apart`, `no`."""
    return {BEATS: "yes", EQUALS: EQUALS, LOSES: "no"}[standing(difference)]

"""What happened to an instance: whom a plan asked, in which order, and what came of it.

A decision is a list of these records. Everything that is derived from it (who answered, what the first choice was made
among, what a reply lists as fallbacks) is a function here, so that requests, the log and off-policy evaluation read one
story. Plain values; knows no scorer and no store. Used by `router_core.policies`, `service.usecases` and
`service.lab.eventlog`.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import StrEnum
from typing import NamedTuple

from router_core.records import TIE


class Outcome(StrEnum):
    """How an attempt ended."""

    ANSWERED = "answered"
    """The scorer gave a reward for every response, or for some of them."""
    FAILED = "failed"
    """The scorer was asked and gave no reward."""
    ABSTAINED = "abstained"
    """The scorer was asked and does not apply to the instance: no failure, and no reward."""
    AWAY = "away"
    """The plan wanted this scorer, and it could not be asked."""
    ABSENT = "absent"
    """The scorer could not have been asked in this turn; the plan wanted another one. Propensities exclude it."""


TOO_LONG = "too_long"
"""Code of an abstention, or of one response's failure: the scorer cannot read so long a text."""

ASKED = frozenset({Outcome.ANSWERED, Outcome.FAILED, Outcome.ABSTAINED})
"""Outcomes of scorers that were asked."""


class Attempt(NamedTuple):
    """One asking of one scorer about one instance, or the finding that it could not be asked.

    Attributes:
        arm: index of the scorer in the pool.
        turn: 0 for the plan's first choice, one more after each asking.
        outcome: how it ended.
        reason: stable code of what brought nothing, such as `worker_timeout` or `TOO_LONG`; empty where it answered.
        rewards: raw reward per response (n,), NaN for one that has none; empty unless answered.
        verdict: the scorer's preferred response; TIE for a tie, a single response, or no answer.
        seconds: time it took.
        price: what it cost, in units of the cheapest scorer; 0 where nobody was asked.
        prompt_tokens_cut: tokens of the prompt that the scorer did not read.
        chance: probability with which the plan named it in this turn, given the turns before; 1 for the first choice,
            whose propensity is the draw's, and for a fallback.
        components: parts of the rewards by name, each (n,); empty for a scorer that gives one number.
        failures: stable code per response (n,), "" where there is a reward; empty where all have one.
    """

    arm: int
    turn: int
    outcome: Outcome
    reason: str = ""
    rewards: list[float] = []  # noqa: RUF012 - msgspec reads the default; nobody appends to it
    verdict: int = TIE
    seconds: float = 0.0
    price: float = 0.0
    prompt_tokens_cut: int = 0
    chance: float = 1.0
    components: dict[str, list[float]] = {}  # noqa: RUF012
    failures: list[str] = []  # noqa: RUF012


def answers(attempts: Sequence[Attempt]) -> list[Attempt]:
    """Return the attempts that were answered, in order."""
    return [attempt for attempt in attempts if attempt.outcome is Outcome.ANSWERED]


def first_choice(attempts: Sequence[Attempt]) -> Attempt | None:
    """Return the attempt that was asked first; None where nobody could be asked."""
    for attempt in attempts:
        if attempt.outcome in ASKED:
            return attempt
    return None


def excluded(attempts: Sequence[Attempt], turn: int) -> list[int]:
    """Return the arms that a choice was not made among, in the order of the attempts.

    They were asked in an earlier turn, were wanted and away before, or could not have been asked in that turn.

    Args:
        attempts: of one instance.
        turn: whose choice.

    >>> story = [Attempt(2, 0, Outcome.AWAY), Attempt(0, 0, Outcome.FAILED), Attempt(1, 1, Outcome.ANSWERED)]
    >>> excluded(story, 0), excluded(story, 1)
    ([2], [2, 0])
    """
    return [
        arm
        for arm, when, outcome, *_ in attempts
        if (when < turn and outcome is not Outcome.ABSENT)
        or (when == turn and outcome in (Outcome.AWAY, Outcome.ABSENT))
    ]


def reads_all(answer: Attempt) -> bool:
    """Return False if an answer lacks the reward of a response that another scorer may be able to read."""
    return TOO_LONG not in answer.failures


def passed_over(attempts: Sequence[Attempt]) -> list[Attempt]:
    """Return the attempts that a plan wanted and that brought nothing: failed, abstained, or away."""
    return [attempt for attempt in attempts if attempt.outcome in (Outcome.FAILED, Outcome.ABSTAINED, Outcome.AWAY)]


def waited_seconds(attempts: Sequence[Attempt]) -> float:
    """Return the time that was spent on asking, in seconds: scorers of one turn were asked side by side.

    >>> waited_seconds([Attempt(0, 0, Outcome.FAILED, seconds=2.0), Attempt(1, 1, Outcome.ANSWERED, seconds=1.0)])
    3.0
    """
    if len(attempts) == 1:
        return attempts[0].seconds
    longest: dict[int, float] = {}
    for attempt in attempts:
        longest[attempt.turn] = max(longest.get(attempt.turn, 0.0), attempt.seconds)
    return sum(longest.values())

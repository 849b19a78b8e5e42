"""What a stored decision's attempts tell, in the words of the tests."""

from __future__ import annotations

from router_core.attempts import Outcome, answers, excluded, first_choice
from service.usecases.decisions import StoredDecision


def first_arm(decision: StoredDecision) -> int:
    """The arm that was asked first."""
    first = first_choice(decision.attempts)
    assert first is not None
    return first.arm


def failed(decision: StoredDecision) -> list[int]:
    """Arms that were asked before the reply and gave no reward, in that order."""
    return [attempt.arm for attempt in decision.attempts if attempt.outcome is Outcome.FAILED]


def away_first(decision: StoredDecision) -> list[int]:
    """Arms that the first choice was not made among."""
    return excluded(decision.attempts, 0)


def gone(decision: StoredDecision) -> list[int]:
    """Arms that the last choice was not made among."""
    return excluded(decision.attempts, decision.attempts[-1].turn)


def shadowed(decision: StoredDecision) -> list[tuple[int, int]]:
    """(arm, verdict) of the answers after the reply."""
    return [(attempt.arm, attempt.verdict) for attempt in answers(decision.shadows or [])]


def unasked(decision: StoredDecision) -> list[int]:
    """Arms that could not be asked after the reply."""
    return [attempt.arm for attempt in decision.shadows or [] if attempt.outcome is Outcome.AWAY]

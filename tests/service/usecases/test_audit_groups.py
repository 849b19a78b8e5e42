"""Single responses as one audited decision."""

from __future__ import annotations

import math
from typing import Any

from router_core.attempts import Attempt, Outcome
from router_core.records import TIE, Instance
from service.usecases.audit_choice import decode_task, encode_task
from service.usecases.audit_groups import Part, grouped
from service.usecases.decisions import StoredDecision


def part(text: str, reward: float, arm: int = 0, **fields: Any) -> Part:
    attempts = [Attempt(arm, 0, Outcome.ANSWERED, rewards=[reward], price=1.0)]
    if arm:
        attempts.insert(0, Attempt(0, 0, Outcome.FAILED, "worker_timeout", price=1.0))
    decision = StoredDecision(
        1, b"", [0.5, 0.5], [0.5, 0.5], [0.1, 0.1], [0.5, 0.5], "bayesian", 0, 0, attempts, arm, [reward], TIE, 0.5
    )
    return decision, Instance("q", (text,), **fields)


def test_responses_and_rewards_stand_side_by_side() -> None:
    found = grouped([part("a", 0.1), part("b", 0.9), part("c", 0.5)])
    assert found is not None
    decision, instance = found
    assert (instance.responses, decision.n, decision.rewards, decision.verdict) == (
        ("a", "b", "c"),
        3,
        [0.1, 0.9, 0.5],
        1,
    )
    assert [(it.arm, it.rewards, it.price) for it in decision.attempts] == [(0, [0.1, 0.9, 0.5], 3.0)]


def test_another_scorer_in_the_place_of_one_that_failed() -> None:
    found = grouped([part("a", 0.1), part("b", 7.0, arm=1), part("c", 0.5)])
    assert found is not None
    decision, _ = found
    assert (decision.arm, decision.verdict) == (None, TIE)
    first, second = decision.attempts
    assert (first.arm, first.rewards[::2], math.isnan(first.rewards[1]), first.verdict) == (0, [0.1, 0.5], True, 2)
    assert (second.arm, second.verdict, [math.isnan(it) for it in second.rewards]) == (1, TIE, [True, False, True])


def test_what_cannot_be_compared_is_left_out() -> None:
    assert grouped([part("a", 0.1)]) is None
    assert grouped([part("a", 0.1), part("a", 0.1)]) is None
    assert grouped([part("a", 0.1), part("b", 0.2, reference="r")]) is None


def test_parts_are_read_back_in_order() -> None:
    parts = [part("a", 0.1), part("b", 0.9)]
    assert decode_task(b"".join(encode_task(*each) for each in parts)) == parts

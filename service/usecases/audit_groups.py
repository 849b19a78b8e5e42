"""Single responses of one prompt as one audited decision: collected one by one, compared once the group is there.

They share a draw (`sticky`) and so an RM, and its group has one id and one inclusion probability, which travel with the
draw. The decision that the log holds has every response, and the context and offsets of the first. Called by `audit`;
asks nobody and knows no store.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import msgspec

from router_core.attempts import Attempt, Outcome
from router_core.records import TIE, Instance, verdict_of
from service.usecases.decisions import StoredDecision

MAX_PARTS = 16
"""Responses of a group that are compared; later ones are left out."""

GRACE_SECONDS = 30.0
"""Added to the time that a draw sticks: a response may be asked for at its end and be answered later."""

Part = tuple[StoredDecision, Instance]
"""A decision and its texts."""


def grouped(parts: Sequence[Part]) -> Part | None:
    """Return the parts as one decision about all their responses; None where no two can be compared.

    Parts whose conversation, reference or metadata are not those of the first are left out, and so are equal texts. The
    rewards are those of the scorer that answered all; where there is no such scorer, the caller got no verdict.

    Args:
        parts: of one draw, in the order in which they were saved; at least one.
    """
    (decision, first), kept = parts[0], list[Part]()
    for part in parts:
        about, said = _about(part[1]), part[1].items()[0][1]
        if about == _about(first) and all(said != other.items()[0][1] for _, other in kept):
            kept.append(part)
    if len(kept) < 2:
        return None
    decisions, instances = [one for one, _ in kept], [one for _, one in kept]
    answers = tuple([None if one.answers is None else one.answers[0] for one in instances])
    instance = Instance(
        first.prompt,
        tuple([one.responses[0] for one in instances]),
        first.reference,
        first.metadata,
        first.turns,
        None if all(answer is None for answer in answers) else answers,
    )
    alike = len({one.arm for one in decisions}) == 1
    rewards = [one.rewards[0] for one in decisions]
    together = msgspec.structs.replace(
        decision,
        n=len(kept),
        attempts=_attempts([one.attempts for one in decisions]),
        arm=decision.arm if alike else None,
        rewards=rewards,
        verdict=verdict_of(rewards) if alike else TIE,
        p_right=None,
        shadows=None,
    )
    return together, instance


def _about(instance: Instance) -> tuple[object, ...]:
    return instance.prompt, instance.turns, instance.reference, dict(instance.metadata)


def _attempts(stories: Sequence[Sequence[Attempt]]) -> list[Attempt]:
    """Return each scorer's answers as one attempt, NaN where it gave none; failures are the first part's."""
    arms = dict.fromkeys([it.arm for story in stories for it in story if it.outcome is Outcome.ANSWERED])
    out = [it for it in stories[0] if it.arm not in arms]
    for arm in arms:
        found = [
            next((it for it in story if it.arm == arm and it.outcome is Outcome.ANSWERED), None) for story in stories
        ]
        told = [it for it in found if it is not None]
        rewards = [math.nan if it is None else it.rewards[0] for it in found]
        out.append(
            told[0]._replace(
                rewards=rewards,
                verdict=verdict_of(rewards),
                seconds=max(it.seconds for it in told),
                price=sum(it.price for it in told),
                components={},
                failures=[],
            )
        )
    return sorted(out, key=lambda it: it.turn)

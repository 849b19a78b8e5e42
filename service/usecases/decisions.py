"""The decision as it is stored, and the events that feedback, audits and people make of it.

msgpack on the wire; the numbers a fold needs are exact (float64, float32 bytes). Called by `score`, `learn`, `audit`
and `follow`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from typing import NamedTuple

import msgspec

from router_core.attempts import Attempt, answers
from router_core.errors import FeedbackError
from router_core.feedback import validate
from router_core.posterior import NO_ARM
from router_core.records import TIE, Audit, Event, Fact, Feedback, Instance, Said, Shadow, Signal, Source, credit

AUDITED = b"audit"
"""Value of an audit's event: the payload holds what the referee said."""

_PERSON = b"person:"


class StoredAudit(msgspec.Struct, omit_defaults=True):
    """What a referee made of a decision.

    Attributes:
        referee: its name.
        verdict: the response that it prefers; TIE where it prefers none.
        trust: how often the operator expects it to be right.
        rewards: its rewards (n,).
        price: what the audit cost, in units of the cheapest scorer.
        judged: True once a person has judged the decision as well.
        signs: by name, what can be counted in each response (n,), for example its length.
        words: typical words of the prompt, by which kinds of text are named.
    """

    referee: str
    verdict: int
    trust: float
    rewards: list[float]
    price: float = 0.0
    judged: bool = False
    signs: dict[str, list[float]] = {}
    words: list[str] = []


class StoredDecision(msgspec.Struct, omit_defaults=True):
    """One decision: what was believed, what was asked, and what the caller got. The log carries the whole of it.

    Attributes:
        n: number of responses.
        x: context, little-endian float32 bytes (d,).
        offsets: o_k(x) of every arm (K,).
        means: of the draws (K,); −inf for arms that the policy never asks.
        sds: of the draws (K,).
        propensities: of every arm, as drawn (K,).
        policy: name of the policy that drew.
        version: events the posterior had learned from.
        time_ms: Unix time in milliseconds.
        attempts: whom the plan asked before the reply, in order.
        arm: index of the scorer whose answer the caller got; None where the plan combined several.
        rewards: what the caller got, raw, per response (n,).
        verdict: the preferred response that the caller got, or TIE.
        propensity: probability of `arm` among those that could answer; of the whole sequence where further arms were
            drawn; 1 where everyone is asked.
        sticky: key of the draw that this decision shares with other singles of its prompt; "" for a draw of its own.
            `means`, `sds`, `floors`, `propensities` and `version` are those of the shared draw.
        multiplier: price of a call, in units of P(right), that further draws were made with; 0 where price did not
            matter.
        p_right: probability that the verdict is right; None where nothing says.
        floors: probability with which each arm is asked whatever is drawn (K,); empty where there are none.
        shadows: attempts after the reply, at the scorers that the plan had not asked; None where the decision was not
            chosen for that.
        reference: of the instance, as it was sent.
        metadata: of the instance, as it was sent.
        inclusion: probability with which it was chosen for an audit; None where audits were off.
        group: id of the audit that compares this single response with others of its prompt; "" where there is none.
            `inclusion` is the group's then.
        audit: what a referee made of it; None until one has.
    """

    n: int
    x: bytes
    offsets: list[float]
    means: list[float]
    sds: list[float]
    propensities: list[float]
    policy: str
    version: int
    time_ms: int
    attempts: list[Attempt]
    arm: int | None
    rewards: list[float]
    verdict: int
    propensity: float
    sticky: str = ""
    multiplier: float = 0.0
    p_right: float | None = None
    floors: list[float] = []
    shadows: list[Attempt] | None = None
    reference: str | None = None
    metadata: dict[str, Fact] = {}
    inclusion: float | None = None
    group: str = ""
    audit: StoredAudit | None = None

    @property
    def heard(self) -> list[Attempt]:
        """Every answer to this instance, those of the shadow included, in order."""
        return answers([*self.attempts, *(self.shadows or ())])

    def known_of(self, arms: Iterable[int]) -> list[int]:
        """Return those of the arms that were in the pool when this was decided."""
        return [arm for arm in arms if arm < len(self.offsets)]


_ENCODER = msgspec.msgpack.Encoder()
_DECODER = msgspec.msgpack.Decoder(StoredDecision)


def encode_decision(decision: StoredDecision) -> bytes:
    """The payload that `Store.save_decisions` takes."""
    return _ENCODER.encode(decision)


def decode_decision(payload: bytes) -> StoredDecision:
    """Read a payload back.

    Raises:
        msgspec.ValidationError: it is not a decision.
    """
    return _DECODER.decode(payload)


def encode_feedback(feedback: Feedback) -> bytes:
    """Canonical bytes of a value: equal bytes mean the same feedback.

    >>> encode_feedback(Feedback(Signal.PREFERENCE, 1.0))
    b'preference:1.0'
    """
    return f"{feedback.signal}:{feedback.value!r}".encode()


def decode_feedback(value: bytes) -> Feedback:
    """Read `encode_feedback`'s bytes back.

    Raises:
        FeedbackError: they are not.
    """
    signal, _, number = value.decode().partition(":")
    try:
        return validate(Feedback(Signal(signal), float(number)))
    except ValueError as error:
        raise FeedbackError(f"log holds the feedback value {value!r}, which this version cannot read") from error


class Told(NamedTuple):
    """What an entry of the log says of its decision.

    Attributes:
        source: who says it.
        feedback: gold where there is any, else the referee's preference.
        after_gold: True if gold was there before: a trainer's preference, for a referee or a person who came later. A
            trainer's reward is not: it speaks of one answer, and does not name the better response.
    """

    source: Source
    feedback: Feedback
    after_gold: bool = False


def encode_person(preferred: int) -> bytes:
    """Return the value of a person's event.

    Args:
        preferred: index of the response, or TIE.
    """
    return b"%bpreference:%d" % (_PERSON, preferred)


def told_by(decision: StoredDecision, value: bytes) -> Told:
    """Return what an entry of the log says.

    Args:
        decision: of its payload.
        value: of the entry.

    Raises:
        FeedbackError: it cannot be read.
    """
    head, _, before = value.partition(b"\n")
    if head == AUDITED and decision.audit is not None:
        if before and (gold := decode_feedback(before)).signal is Signal.PREFERENCE:
            return Told(Source.AUDIT, gold, after_gold=True)
        return Told(Source.AUDIT, Feedback(Signal.PREFERENCE, float(decision.audit.verdict)))
    if head.startswith(_PERSON):
        preferred = head.rpartition(b":")[2]
        if preferred.removeprefix(b"-").isdigit() and TIE <= int(preferred) < decision.n:
            after_gold = bool(before) and decode_feedback(before).signal is Signal.PREFERENCE
            return Told(Source.PERSON, Feedback(Signal.PREFERENCE, float(int(preferred))), after_gold)
    return Told(Source.TRAINER, decode_feedback(value))


def event_of(decision_id: str, payload: bytes, value: bytes) -> Event:
    """Return the event that a log entry stands for.

    A preference teaches every scorer that answered, and nothing where there is one response; a loss or a reward speaks
    of the answer that the caller got. Of the trainer and a person only the first teaches.
    """
    decision = decode_decision(payload)
    return event_from(decision_id, decision, told_by(decision, value))


def event_from(decision_id: str, decision: StoredDecision, told: Told) -> Event:
    """Return the event of a decision and what was said of it; see `event_of` and `router_core.records.Event`."""
    source, feedback, after_gold = told
    audit = decision.audit
    twice = (after_gold and source is Source.PERSON) or (
        source is Source.TRAINER and audit is not None and audit.judged
    )
    if twice or (source is Source.PERSON and feedback.value == TIE):
        return Event(NO_ARM, decision.x, 0.0, None, feedback, decision_id, (), source)
    earned = _credits(decision, int(feedback.value)) if feedback.signal is Signal.PREFERENCE else {}
    # Of an arm that came to the pool after the decision its offset is not known, and it teaches nothing.
    earned = {other: credit for other, credit in earned.items() if other < len(decision.offsets)}
    arm = NO_ARM if decision.arm is None else decision.arm
    first = earned.get(answers(decision.attempts)[0].arm)
    if after_gold:
        # Gold has taught those who were asked before the reply.
        asked, arm = {answer.arm for answer in answers(decision.shadows or ())}, NO_ARM
        earned = {other: credit for other, credit in earned.items() if other in asked}
    own = earned.pop(arm, None)
    return Event(
        arm,
        decision.x,
        0.0 if arm == NO_ARM else decision.offsets[arm],
        own,
        feedback,
        decision_id,
        tuple([Shadow(other, decision.offsets[other], value) for other, value in earned.items()]),
        source,
        None if audit is None else _audit(decision, audit, told, first),
    )


def _audit(decision: StoredDecision, audit: StoredAudit, told: Told, first: float | None) -> Audit:
    later = told.source is not Source.AUDIT
    return Audit(
        audit.referee,
        audit.verdict,
        1.0 if decision.inclusion is None else decision.inclusion,
        audit.trust,
        told.after_gold,
        first if later or told.after_gold else None,
        tuple(_credits(decision, audit.verdict).items()) if later else (),
    )


def _credits(decision: StoredDecision, preferred: int) -> dict[int, float]:
    """Return what a preference says of every scorer that answered, by arm; nothing for a single response or a tie."""
    if decision.n < 2 or preferred == TIE:
        return {}
    earned = {answer.arm: credit(answer.rewards, preferred) for answer in decision.heard}
    return {arm: value for arm, value in earned.items() if value is not None}


def content_key(run: str, instance: Instance) -> str:
    """Return a hash of run, prompt and responses (in order): it names a decision for callers that carry no id."""
    h = hashlib.blake2b(digest_size=16)
    parts: list[Said] = [instance.turns or instance.prompt, *[response for _, response in instance.items()]]
    for part in (run, *parts):
        data = part.encode("utf-8", "surrogatepass") if isinstance(part, str) else json.dumps(part).encode()
        # A text and messages of the same bytes differ in the sign of their length.
        h.update((len(data) if isinstance(part, str) else -len(data)).to_bytes(8, "little", signed=True))
        h.update(data)
    return h.hexdigest()

"""The decision as it is stored, and what of it comes back as an event when feedback arrives.

msgpack on the wire; the numbers a fold needs are exact (float64, float32 bytes). Called by `score` and `learn`.
"""

from __future__ import annotations

import hashlib
import json

import msgspec

from router_core.attempts import Attempt, answers
from router_core.errors import FeedbackError
from router_core.feedback import validate
from router_core.posterior import NO_ARM
from router_core.records import Event, Fact, Feedback, Instance, Said, Shadow, Signal, credit


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

    @property
    def heard(self) -> list[Attempt]:
        """Every answer to this instance, those of the shadow included, in order."""
        return answers([*self.attempts, *(self.shadows or ())])


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


def event_of(decision_id: str, payload: bytes, value: bytes) -> Event:
    """Return the event that a log entry stands for.

    A preference teaches every scorer that answered, and nothing where there is one response; a loss or a reward speaks
    of the answer that the caller got.
    """
    return event_from(decision_id, decode_decision(payload), decode_feedback(value))


def event_from(decision_id: str, decision: StoredDecision, feedback: Feedback) -> Event:
    """Return the event of a decision and its feedback; see `event_of`."""
    earned = _credits(decision, int(feedback.value)) if feedback.signal is Signal.PREFERENCE else {}
    arm = NO_ARM if decision.arm is None else decision.arm
    own = earned.pop(arm, None)
    return Event(
        arm,
        decision.x,
        0.0 if decision.arm is None else decision.offsets[decision.arm],
        own,
        feedback,
        decision_id,
        tuple([Shadow(other, decision.offsets[other], value) for other, value in earned.items()]),
    )


def _credits(decision: StoredDecision, preferred: int) -> dict[int, float]:
    """Return what a preference says of every scorer that answered, by arm; nothing for a single response."""
    if decision.n < 2:
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

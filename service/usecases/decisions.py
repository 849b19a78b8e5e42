"""The decision as it is stored, and what of it comes back as an event when feedback arrives.

msgpack on the wire; the numbers a fold needs are exact (float64, float32 bytes). Called by `score` and `learn`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import msgspec

from router_core.errors import FeedbackError
from router_core.feedback import validate
from router_core.records import Event, Feedback, Shadow, Signal


class StoredDecision(msgspec.Struct, omit_defaults=True):
    """One decision. The store reads only `n`; the log carries the whole of it.

    Attributes:
        n: number of responses.
        arm: index of the asked RM; −1 where all were asked.
        x: context, little-endian float32 bytes (d,).
        offset: o_k(x) of the asked arm.
        verdict: the asked RM's verdict, −1 for a tie.
        propensity: probability of the asked arm among those that could answer.
        propensities: of every arm, as drawn.
        means: of the draws, per arm.
        sds: of the draws, per arm.
        rewards: raw reward per response.
        policy: name of the policy that drew.
        version: events the posterior had learned from.
        fallback: whether the drawn arm gave no reward.
        time_ms: Unix time.
        gone: arms that were unavailable or failed before `arm` answered, or unavailable then; `propensity` is among the
            others.
        shadows: (arm, o_k(x), verdict) of the other RMs that were asked after the reply.
        sticky: key of the draw that this decision shares with other singles of its prompt; "" for a draw of its own.
            `means`, `sds`, `propensities` and `version` are those of the shared draw.
        failed: arms that were asked before `arm` and gave no reward, in that order; the first of them is what the
            policy chose. Empty where every RM was asked.
        away: arms that were unavailable when the first one was asked: the choice was among the others.
        shadowed: whether the RMs that are in neither `gone` nor `arm` were asked after the reply, but for `unasked`;
            those that are not in `shadows` then gave no reward.
        unasked: arms that should have been asked after the reply and were unavailable then.
        prompt_tokens_cut: tokens of the prompt that the asked RM did not read.
    """

    n: int
    arm: int
    x: bytes
    offset: float
    verdict: int
    propensity: float
    propensities: list[float]
    means: list[float]
    sds: list[float]
    rewards: list[float]
    policy: str
    version: int
    time_ms: int
    fallback: bool = False
    gone: list[int] = []
    shadows: list[tuple[int, float, int]] = []
    sticky: str = ""
    failed: list[int] = []
    away: list[int] = []
    shadowed: bool = False
    unasked: list[int] = []
    prompt_tokens_cut: int = 0

    @property
    def first_arm(self) -> int:
        """The arm that was asked first: the choice. `arm` where that one answered."""
        return self.failed[0] if self.failed else self.arm

    @property
    def out_of_choice(self) -> list[int]:
        """Arms that the first one was not chosen among; all of `gone` where an earlier version stored nothing else."""
        return self.away if self.failed or self.away else self.gone

    @property
    def untold(self) -> list[int]:
        """Arms that the first one was chosen among, and that then left before they were asked, or shadowed: nobody
        knows what they would have given.
        """
        if not (self.failed or self.away):
            return self.unasked
        return [*self.unasked, *(arm for arm in self.gone if arm not in self.failed and arm not in self.away)]

    @property
    def hides_failures(self) -> bool:
        """Whether an earlier version stored it, which did not tell an arm that failed from one that was unavailable."""
        return self.fallback and bool(self.gone) and not (self.failed or self.away)


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
    """The event that a log entry stands for."""
    decision = decode_decision(payload)
    return Event(
        decision.arm,
        decision.x,
        decision.offset,
        decision.verdict,
        decode_feedback(value),
        decision_id,
        tuple(Shadow(*shadow) for shadow in decision.shadows) if decision.shadows else (),
    )


def content_key(run: str, prompt: str, responses: Sequence[str]) -> str:
    """Hash of run, prompt and responses (in order): names a decision for callers that cannot carry its id."""
    h = hashlib.blake2b(digest_size=16)
    for part in (run, prompt, *responses):
        data = part.encode("utf-8", "surrogatepass")
        h.update(len(data).to_bytes(8, "little"))
        h.update(data)
    return h.hexdigest()

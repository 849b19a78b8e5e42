"""What the shims share: what a URL may say, one sample as it is scored, and what became of it.

Trainers whose reward server is a URL say the rest in its query: `…/get_reward?run=NAME&normalize=true`. Knows no
trainer. Called by the wire formats beside it and by `service.handlers.trainers`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal
from urllib.parse import parse_qsl

from service.trainers.conversation import Said
from service.trainers.templated import Templates

_BOOLEANS = {"true": True, "1": True, "false": False, "0": False}


@dataclass(frozen=True, slots=True)
class ShimOptions:
    """The query of a shim's URL.

    Attributes:
        run: the training run; None: the gateway's default.
        policy: see docs/api.md; None: the gateway's.
        signal: kind of feedback of a new run: preference, reward or loss; None: the gateway's.
        normalize: rewards on the scale of their RM; None: the gateway's setting.
        text: `auto`: known chat templates are taken apart; `raw`: every text is scored as it came.
        reward_key: slime: answer an object with the reward under this key, instead of a bare number.
    """

    run: str | None = None
    policy: str | None = None
    signal: str | None = None
    normalize: bool | None = None
    text: Literal["auto", "raw"] = "auto"
    reward_key: str | None = None

    @classmethod
    def parse(cls, query: bytes) -> ShimOptions:
        """Read a query string.

        >>> ShimOptions.parse(b"run=r1&normalize=true").normalize
        True

        Raises:
            ValueError: a parameter that there is not, twice the same, or a value that it cannot have.
        """
        given: dict[str, str] = {}
        for name, value in parse_qsl(query.decode("latin-1"), keep_blank_values=True):
            if name not in cls.__slots__:
                raise ValueError(f"the URL's query has {name!r}: known are {', '.join(cls.__slots__)}")
            if name in given or not value:
                raise ValueError(f"the URL's query has {name!r} twice, or empty: give it once, with a value")
            given[name] = value
        normalize, text = given.get("normalize"), given.get("text", "auto")
        if normalize is not None and normalize.lower() not in _BOOLEANS:
            raise ValueError(f"normalize is {normalize!r} in the URL's query: give true or false")
        if given.get("signal", "reward") not in ("preference", "reward", "loss"):
            raise ValueError(f"signal is {given['signal']!r} in the URL's query: give preference, reward or loss")
        if text not in ("auto", "raw"):
            raise ValueError(f"text is {text!r} in the URL's query: give auto or raw")
        return cls(
            run=given.get("run"),
            policy=given.get("policy"),
            signal=given.get("signal"),
            normalize=None if normalize is None else _BOOLEANS[normalize.lower()],
            text="raw" if text == "raw" else "auto",
            reward_key=given.get("reward_key"),
        )


@dataclass(frozen=True, slots=True)
class Sample:
    """One response as it is scored, and as feedback names it.

    Attributes:
        prompt: text or messages; "" where it is not known.
        response: its text.
        template: the chat template that was taken off, or a word of `templated` in its place.
        reference: the trainer's label, where it is a text.
    """

    prompt: Said
    response: str
    template: str
    reference: str | None = None


@dataclass(frozen=True, slots=True)
class ScoredSample:
    """What a sample got.

    Attributes:
        reward: what the trainer learns from.
        raw_reward: what the RM said; equal unless rewards are normalised.
        model: the RM's name, or the policy's where all were asked.
        index: the RM's place in the pool; -1 where all were asked.
        propensity: probability that this RM would be asked.
        fallback: whether another RM had been drawn and gave nothing.
        decision_id: for feedback.
        components: what each scorer said of the sample, by name.
    """

    reward: float
    raw_reward: float
    model: str
    index: int
    propensity: float
    fallback: bool
    decision_id: str
    components: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class UrlProtocol:
    """How one trainer asks its reward server.

    Attributes:
        trainer: its name, for people.
        path: where it asks; feedback goes to `path` + `/feedback`.
        request: msgspec struct of the body.
        reply: msgspec struct of the answer; None where `reply_schema` says it.
        read: request, options and known chat templates to samples. Raises ValueError for what does not fit.
        write: samples with their rewards, the pool's names and options to the answer.
        example: of a body.
        recorded: more bodies as the trainer sends them, by what they are; `reward-router check-trainer` replays them.
        reply_schema: JSON schema of an answer that is no struct.
        single: one sample per request; its feedback is one value instead of a list.
        patient: its client does not try again, so that the gateway does in its stead.
        options: further parameters of its URL: name to JSON schema with a description.
    """

    trainer: str
    path: str
    request: type
    read: Callable[[Any, ShimOptions, Templates], list[Sample]]
    write: Callable[[Sequence[ScoredSample], Sequence[str], ShimOptions], Any]
    example: Mapping[str, Any]
    recorded: Mapping[str, Mapping[str, Any]]
    reply: type | None = None
    reply_schema: Mapping[str, Any] | None = None
    single: bool = False
    patient: bool = False
    options: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)


def reference_of(label: object) -> str | None:
    """Return a trainer's label where it is a text: what a right answer looks like."""
    return label if isinstance(label, str) and label else None

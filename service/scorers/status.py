"""What operators see of a scorer: the answer of `GET /models`, and what the metrics of workers are made of."""

from __future__ import annotations

from pydantic import BaseModel, Field


class ReplicaStatus(BaseModel):
    """One server of a scorer."""

    url: str
    state: str = Field(description="State of its circuit: closed (asked), half_open (on trial), open (not asked).")
    in_flight: int
    failures: int = Field(description="Failures in a row.")
    latency_ms: float | None = Field(description="Smoothed time of a request; null before the first.")
    problem: str | None = Field(description="Why its answers to the probe rule it out; null while they do not.")
    max_model_len: int | None = Field(
        description="Tokens that this worker says it reads at most; null where it does not say, or was not asked yet."
    )


class JudgingStatus(BaseModel):
    """How a judge judges, seen by this gateway since its start."""

    rubric: str = Field(description="Name or path of its rubric.")
    verdict: str = Field(description="What its verdicts are read from: logprobs or text.")
    comparisons: int = Field(description="Pairs of responses that it compared, each in both orders.")
    position_bias: float | None = Field(
        description="Mean probability that it gives to the response shown first, less one half: 0 means no bias, 0.5 "
        "that it always prefers the first one. Null before the first comparison."
    )
    consistency: float | None = Field(
        description="Share of comparisons in which both orders prefer the same response; null before the first one."
    )


class ScorerStatus(BaseModel):
    """One scorer of the pool."""

    name: str
    kind: str = Field(description="`rm`, a reward model; other kinds as the pool has them.")
    referee: bool = Field(
        default=False, description="True for a scorer that is asked about audits only, and never drawn."
    )
    available: bool
    rendering: str | None = Field(
        description="What requests to it hold: messages, template (texts), tokens (ids); null for other kinds.",
    )
    max_model_len: int | None = Field(
        description="Tokens that it reads at most: the least of what the pool file and the workers that may be asked "
        "say; null where nobody says.",
    )
    over_long: str | None = Field(
        description="What becomes of an instance with more: skip, refuse or cut_prompt; null where nobody counts.",
    )
    replicas: list[ReplicaStatus]
    judging: JudgingStatus | None = Field(default=None, description="Of a judge; null for other kinds.")

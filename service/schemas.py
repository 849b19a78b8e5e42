"""The words of the API's hot routes: msgspec structs that parse, check and document in one place.

`service.handlers.openapi` turns them into the OpenAPI schemas; bounds that an operator sets are checked in the use
cases.
"""

from __future__ import annotations

from typing import Annotated, Any, Final, Literal

import msgspec
from msgspec import Meta

from service.trainers.chat_schema import Said

RUN_SHAPE: Final = "^[A-Za-z0-9._-]{0,64}$"
"""Of a run's name, for the documents; the use cases check it, so that one item is refused and not its batch."""

RunName = Annotated[
    str, Meta(description="The run; by default the gateway's.", extra_json_schema={"pattern": RUN_SHAPE})
]

Index = Annotated[int, Meta(ge=0, le=1_000_000, description="Index of a response, 0 for the first.")]

SignalName = Literal["preference", "loss", "reward"]
"""The words of `router_core.records.Signal`."""


class RewardRequest(msgspec.Struct, omit_defaults=True, forbid_unknown_fields=True):
    """One prompt with its responses; two is the normal case."""

    prompt: Annotated[
        Said,
        Meta(
            description="The prompt's text, or its messages: `role`, `content` (text, or text parts), and `name`, "
            "`tool_calls`, `tool_call_id` where there are any. Images are refused.",
            examples=["What is 7 + 5?"],
        ),
    ]
    responses: Annotated[
        list[Said],
        Meta(
            min_length=1,
            description="The responses to be scored by ONE reward model: texts, or the messages that end the "
            "conversation.",
            examples=[["12", "13"]],
        ),
    ]
    reference: (
        Annotated[str, Meta(description="What a right answer looks like, for scorers that compare.", examples=["12"])]
        | None
    ) = None
    metadata: (
        Annotated[
            dict[Annotated[str, Meta(min_length=1, max_length=100)], str | float | bool | None],
            Meta(
                max_length=32,
                description="Flat facts for scorers that need them, and for `applies` in the pool file: at most 32.",
                examples=[{"task": "math"}],
            ),
        ]
        | None
    ) = None
    run: RunName | None = None
    policy: Annotated[str, Meta(description="Overrides the gateway's policy; the names are in docs/api.md.")] | None = (
        None
    )
    signal: (
        Annotated[
            SignalName,
            Meta(
                description="Kind of feedback of the run, which its first request fixes; by default the gateway's. 409 "
                "where the run has another."
            ),
        ]
        | None
    ) = None
    normalize: (
        Annotated[bool, Meta(description="Rewards on the RM's own scale, (raw - running mean) / running sd.")] | None
    ) = None
    explain: Annotated[bool, Meta(description="Tell in `beliefs` what was believed and drawn, by scorer.")] = False


class RewardBatchRequest(msgspec.Struct, omit_defaults=True, forbid_unknown_fields=True):
    """Many instances at once: one encode batch, one matrix product, one worker call per RM and chunk."""

    items: Annotated[list[RewardRequest], Meta(description="The instances. Empty is allowed.")]
    run: RunName | None = None
    policy: str | None = None
    signal: SignalName | None = None
    normalize: bool | None = None


class Timings(msgspec.Struct):
    """Where the time went, in milliseconds."""

    encode_ms: float
    draw_ms: float
    worker_ms: float
    store_ms: float
    total_ms: float


class Fallback(msgspec.Struct):
    """An RM that was drawn and gave no reward, and why."""

    model: str
    reason: Annotated[
        str,
        Meta(
            description="Stable code: worker_unavailable, worker_timeout, worker_rejected, worker_protocol, "
            "verdict_unreadable, or of who abstained: too_long, abstained."
        ),
    ]


class AttemptReply(msgspec.Struct):
    """One asking of one scorer, or the finding that it could not be asked."""

    model: str
    outcome: Annotated[
        str,
        Meta(
            description="`answered`, `failed`, `abstained` (it does not apply, or the text is too long for it), or "
            "`away`: it could not be asked."
        ),
    ]
    reason: Annotated[str | None, Meta(description="Stable code where there is no answer; see `fallbacks`.")]
    rewards: Annotated[
        list[float | None] | None,
        Meta(description="What it said, raw, per response, null for one without a reward; null without an answer."),
    ]
    ms: Annotated[float, Meta(description="Milliseconds that it took.")]
    price: Annotated[float, Meta(description="In units of the cheapest scorer; 0 where it was not asked.")]


class Truncated(msgspec.Struct):
    """What the RM did not read. Responses are always whole."""

    prompt_tokens_cut: Annotated[
        int, Meta(description="Tokens cut at the left of the prompt, the same for all responses.")
    ]


class Belief(msgspec.Struct):
    """What is believed of one scorer on an instance: a Gaussian, the draw from it, and what follows."""

    model: str
    offset: Annotated[float, Meta(description="What the offline stage expects of it; 0 without.")]
    mean: Annotated[float | None, Meta(description="Of the Gaussian; null for a scorer that the policy never asks.")]
    sd: Annotated[float, Meta(description="Of the Gaussian: how far draws spread.")]
    doubt: Annotated[
        float, Meta(description="Standard deviation of the posterior now, whatever the policy makes of it.")
    ]
    draw: Annotated[
        float | None, Meta(description="The largest is asked; null where `mean` is, and where `sticky` is true.")
    ]
    propensity: Annotated[float, Meta(description="Probability that its draw is the largest.")]


class RewardReply(msgspec.Struct):
    """The reward, which RM gave it, and what is needed to learn from it."""

    decision_id: Annotated[str, Meta(description="Send it back to `/feedback`.")]
    run: str
    model: Annotated[str, Meta(description="The RM that was asked; `majority` or `uwo` where all were.")]
    rewards: Annotated[
        list[float | None],
        Meta(
            description="Reward per response: raw, or normalised where that was asked for and one RM was asked; null "
            "where the RM's scale is not known yet. `majority`: its share of the votes; `uwo`: the careful mean."
        ),
    ]
    preferred: Annotated[
        int | None,
        Meta(
            description="Index of the best response; null on a tie or a single response. `uwo` chooses it with a "
            "stronger penalty than that of `rewards`."
        ),
    ]
    margin: Annotated[float | None, Meta(description="Best reward minus the second best; null for a single response.")]
    propensity: Annotated[float, Meta(description="Probability that this RM would be asked, given what was known.")]
    p_right: Annotated[
        float | None,
        Meta(description="Probability that `preferred` is right; null without a checkpoint that holds learned votes."),
    ]
    price: Annotated[float, Meta(description="What asking cost, in units of the cheapest scorer.")]
    policy: str
    posterior_version: Annotated[int, Meta(description="Events that the posterior had learned from.")]
    fallback: Annotated[bool, Meta(description="True if the drawn RM gave no reward and the next-best draw was asked.")]
    recorded: Annotated[
        bool, Meta(description="False if the decision could not be saved: feedback for it will be 404.")
    ]
    timings: Timings
    components: Annotated[
        dict[str, list[float | None]],
        Meta(
            description="What everyone said who answered, by scorer: raw, per response. Parts of one scorer's rewards "
            "as `SCORER.PART`."
        ),
    ] = {}
    valid: Annotated[
        list[bool], Meta(description="Per response: it has a reward. Mask the others; null is never 0.")
    ] = []
    failure: (
        Annotated[
            list[str | None],
            Meta(
                description="Only where some response is not valid: its stable code, such as `too_long`; null for the "
                "valid ones."
            ),
        ]
        | msgspec.UnsetType
    ) = msgspec.UNSET
    attempts: Annotated[list[AttemptReply], Meta(description="Everyone who was asked, in order.")] = []
    fallbacks: list[Fallback] = []
    truncated: Annotated[
        Truncated | msgspec.UnsetType,
        Meta(description="Only where the prompt was too long for the RM and the pool says `over_long: cut_prompt`."),
    ] = msgspec.UNSET
    sticky: (
        Annotated[bool, Meta(description="True where the RM was drawn by an earlier single response of the prompt.")]
        | msgspec.UnsetType
    ) = msgspec.UNSET
    raw_rewards: (
        Annotated[list[float | None], Meta(description="Where rewards were normalised: what the RM said.")]
        | msgspec.UnsetType
    ) = msgspec.UNSET
    scale_version: (
        Annotated[int, Meta(description="Where rewards were normalised: entries that the scale has learned from.")]
        | msgspec.UnsetType
    ) = msgspec.UNSET
    arm: Annotated[
        int | None,
        Meta(
            description="Index of that RM in decisions and exports, which a change of the pool never moves; null where "
            "several were asked for one answer."
        ),
    ] = None
    beliefs: (
        Annotated[list[Belief], Meta(description="With `explain`: what was believed and drawn, in the pool's order.")]
        | msgspec.UnsetType
    ) = msgspec.UNSET


class BeliefsReply(msgspec.Struct):
    """What is believed of every scorer on one instance now. Nobody was asked, and nothing was saved."""

    run: str
    policy: str
    posterior_version: Annotated[int, Meta(description="Events that the posterior has learned from.")]
    beliefs: Annotated[list[Belief], Meta(description="In the pool's order.")]


class ErrorBody(msgspec.Struct):
    """What went wrong: a stable code, a sentence with the remedy, and details for programs."""

    code: str
    message: str
    details: dict[str, Any] = {}


class ErrorReply(msgspec.Struct):
    """Every error of the API."""

    error: ErrorBody


class NoReward(msgspec.Struct):
    """In the place of an item that has no reward, and why: its rewards are null, never 0."""

    error: ErrorBody
    rewards: None = None
    decision_id: None = None


class RewardBatchReply(msgspec.Struct):
    """One reply or error per item, in order."""

    results: list[RewardReply | NoReward]


class FeedbackRequest(msgspec.Struct, omit_defaults=True, forbid_unknown_fields=True):
    """Feedback on one decision: its id (or run, prompt and responses), and exactly the field of the run's signal."""

    decision_id: str | None = None
    prompt: (
        Annotated[
            Said,
            Meta(description="With `responses`: names the latest decision of that content, as it was sent."),
        ]
        | None
    ) = None
    responses: list[Said] | None = None
    run: RunName | None = None
    preferred: (
        Annotated[Index, Meta(description="Signal `preference`: index of the response that is better.")] | None
    ) = None
    loss: Annotated[float, Meta(description="Signal `loss`: the pair's DPO loss; lower is better.")] | None = None
    reward: (
        Annotated[float, Meta(ge=0, le=1, description="Signal `reward`: how well the asked RM did, in [0, 1].")] | None
    ) = None


class FeedbackBatchRequest(msgspec.Struct, omit_defaults=True, forbid_unknown_fields=True):
    """Many feedbacks at once; each is applied, or refused, on its own."""

    items: list[FeedbackRequest]
    run: RunName | None = None


class SampleValues(msgspec.Struct, omit_defaults=True):
    """What the feedback of a trainer's path holds beside its samples: exactly one list, of the run's signal."""

    reward: list[float] | None = None
    loss: list[float] | None = None
    preferred: list[int] | None = None


class SampleValue(msgspec.Struct, omit_defaults=True):
    """The same of a single sample."""

    reward: float | None = None
    loss: float | None = None
    preferred: int | None = None


class FeedbackReply(msgspec.Struct):
    """An accepted feedback: it is in the run's log, exactly once."""

    decision_id: str
    event_id: Annotated[str, Meta(description="Its id in the run's log.")]
    duplicate: Annotated[bool, Meta(description="True if the same value had been accepted before; nothing changed.")]


class FeedbackBatchReply(msgspec.Struct):
    """One reply or error per item, in order."""

    results: list[FeedbackReply | ErrorReply]


class JudgementRequest(msgspec.Struct, omit_defaults=True, forbid_unknown_fields=True):
    """What a person says of an audited decision."""

    decision_id: str
    preferred: Annotated[Index | None, Meta(description="Index of the better response; null for a tie.")]
    run: RunName | None = None


class JudgementReply(msgspec.Struct):
    """A person's judgement: it is in the run's log, exactly once."""

    decision_id: str
    event_id: Annotated[str, Meta(description="Its id in the run's log.")]
    duplicate: Annotated[bool, Meta(description="True if the same judgement was there before; nothing changed.")]


class PoolRequest(msgspec.Struct, omit_defaults=True, forbid_unknown_fields=True):
    """A change of a run's pool."""

    pool: Annotated[
        dict[str, Any] | None,
        Meta(description="A pool file as JSON: every scorer of the pool to be. Null: the gateway's own."),
    ] = None
    run: str | None = None
    expect: Annotated[
        Annotated[int, Meta(ge=0)] | None, Meta(description="Version that the caller has seen; 409 if it is another.")
    ] = None
    dry_run: Annotated[bool, Meta(description="Answer what would change, and change nothing.")] = False

"""slime's `--rm-type remote_rm`: `{"prompt", "response", "label"}` to a reward that is the whole body.

Read from `slime/rollout/rm_hub/__init__.py`. The prompt is text, templated or not, or a list of messages. The client
tries any failure ten times, with pauses that double up to 30 s, then raises; `null` would become the sample's reward
and stop the trainer at an assertion: 503 instead. `PROTOCOL` is its line in `protocols`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any

import msgspec
from msgspec import Meta

from service.trainers.chat_format import without_tails
from service.trainers.chat_schema import Said
from service.trainers.conversation import as_sent
from service.trainers.recorded import ASKED_AGAIN, TOOLS, TURNS
from service.trainers.shim import Sample, ScoredSample, ShimOptions, UrlProtocol, reference_of
from service.trainers.templated import MESSAGES, RAW, Templates


class SlimeRequest(msgspec.Struct, omit_defaults=True):
    """Body of `/remote_rm`; fields that are not here are ignored."""

    prompt: Annotated[
        Said,
        Meta(description="Text, or messages with `role` and `content` (or ShareGPT's `from` and `value`)."),
    ]
    response: str
    label: Annotated[Any, Meta(description="What a right answer looks like, where it is a text.")] = None


def read(request: SlimeRequest, options: ShimOptions, templates: Templates) -> list[Sample]:
    """Return the one sample.

    Raises:
        ValueError: the messages hold what is not text.
    """
    reference = reference_of(request.label)
    if options.text == "raw":
        return [Sample(as_sent(request.prompt), request.response, RAW, reference)]
    if not isinstance(request.prompt, str):
        return [Sample(as_sent(request.prompt), without_tails(request.response), MESSAGES, reference)]
    split = templates.split_prompt(request.prompt, request.response)
    return [Sample(split.said, split.response, split.template, reference)]


def write(scored: Sequence[ScoredSample], pool: Sequence[str], options: ShimOptions) -> float | dict[str, Any]:
    """Return the reward; with `reward_key` (slime's `--reward-key`) an object with it that says where it is from."""
    (one,) = scored
    if options.reward_key is None:
        return one.reward
    about = {
        "model": one.model,
        "decision_id": one.decision_id,
        "propensity": one.propensity,
        "raw_reward": one.raw_reward,
        "fallback": one.fallback,
        "components": dict(one.components),
    }
    return {**about, options.reward_key: one.reward}


PROTOCOL = UrlProtocol(
    trainer="slime",
    path="/remote_rm",
    request=SlimeRequest,
    reply_schema={"oneOf": [{"type": "number"}, {"type": "object", "description": "With `reward_key`."}]},
    read=read,
    write=write,
    example={"prompt": "What is 7 + 5?", "response": "12", "label": "12"},
    recorded={
        "templated text, several turns": {"prompt": ASKED_AGAIN, "response": "24<|im_end|>", "label": "24"},
        "messages, several turns": {"prompt": TURNS, "response": "24", "label": ""},
        "messages, calls of tools": {
            "prompt": [{"role": "user", "content": "What is 7 + 5?"}, *TOOLS[:2]],
            "response": "It is 12.",
            "label": None,
        },
    },
    single=True,
    options={
        "reward_key": {
            "type": "string",
            "minLength": 1,
            "description": "Answer an object with the reward under this key (slime's --reward-key).",
        }
    },
)

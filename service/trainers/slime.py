"""slime's `--rm-type remote_rm`: `{"prompt", "response", "label"}` to a reward that is the whole body.

Read from `slime/rollout/rm_hub/__init__.py`. The prompt is text, templated or not, or a list of messages. The client
tries any failure ten times, with pauses that double up to 30 s, then raises; `null` would become the sample's reward
and stop the trainer at an assertion: 503 instead. Called by `service.handlers.trainers`.
"""

from __future__ import annotations

from typing import Annotated, Any

import msgspec
from msgspec import Meta

from service.trainers.chat_format import without_tails
from service.trainers.conversation import prompt_text
from service.trainers.shim import Sample, ScoredSample
from service.trainers.templated import MESSAGES, RAW, Templates


class SlimeRequest(msgspec.Struct, omit_defaults=True):
    """Body of `/remote_rm`; fields that are not here are ignored."""

    prompt: Annotated[
        str | list[dict[str, Any]],
        Meta(description="Text, or messages with `role` and `content` (or ShareGPT's `from` and `value`)."),
    ]
    response: str
    label: Any = None


def read(request: SlimeRequest, text: str, templates: Templates) -> Sample:
    """The sample.

    Raises:
        ValueError: the messages hold what is not text.
    """
    if text == "raw":
        return Sample(prompt_text(request.prompt), request.response, RAW)
    if not isinstance(request.prompt, str):
        return Sample(prompt_text(request.prompt), without_tails(request.response), MESSAGES)
    split = templates.split_prompt(request.prompt, request.response)
    return Sample(split.prompt, split.response, split.template)


def write(scored: ScoredSample, reward_key: str | None) -> float | dict[str, Any]:
    """The reward; with `reward_key` (slime's `--reward-key`) an object that holds it and says where it is from."""
    if reward_key is None:
        return scored.reward
    about = {
        "model": scored.model,
        "decision_id": scored.decision_id,
        "propensity": scored.propensity,
        "raw_reward": scored.raw_reward,
        "fallback": scored.fallback,
    }
    return {**about, reward_key: scored.reward}

"""LLaMA-Factory's `reward_model_type: api`: `{"model", "messages": [text]}` to `{"scores": [number]}`.

Read from `llamafactory/train/ppo/ppo_utils.py` 0.9.5. `messages` are whole conversations as text, special tokens
included; there is no prompt beside them. The client has no timeout, never retries, and looks neither at the status nor
for `null`: anything but numbers ends the training with a KeyError or TypeError. So the gateway is patient in its stead
(`trainer_patience_seconds`). `PROTOCOL` is its line in `protocols`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import msgspec
from msgspec import Meta

from service.trainers.recorded import ASKED, ASKED_AGAIN
from service.trainers.shim import Sample, ScoredSample, ShimOptions, UrlProtocol
from service.trainers.templated import RAW, Templates


class LlamaFactoryRequest(msgspec.Struct, omit_defaults=True):
    """Body of `/v1/score/evaluation`; fields that are not here are ignored."""

    messages: Annotated[list[str], Meta(description="Whole conversations as text. May be empty.")]
    model: Annotated[str, Meta(description='Always "model" in this client; not used.')] | None = None


class LlamaFactoryReply(msgspec.Struct):
    """Answer of `/v1/score/evaluation`; the client reads `scores` only."""

    scores: list[float]
    models: Annotated[list[str], Meta(description="The RM that gave each.")]
    components: Annotated[list[dict[str, float]], Meta(description="What each scorer said of each, by name.")]


def read(request: LlamaFactoryRequest, options: ShimOptions, templates: Templates) -> list[Sample]:
    """Return the samples: taken apart by their chat template where it is known, else the raw text."""
    if options.text == "raw":
        return [Sample("", message, RAW) for message in request.messages]
    splits = [templates.split_whole(message) for message in request.messages]
    return [Sample(split.said, split.response, split.template) for split in splits]


def write(scored: Sequence[ScoredSample], pool: Sequence[str], options: ShimOptions) -> LlamaFactoryReply:
    """Return the reply."""
    return LlamaFactoryReply(
        [sample.reward for sample in scored],
        [sample.model for sample in scored],
        [dict(sample.components) for sample in scored],
    )


PROTOCOL = UrlProtocol(
    trainer="LLaMA-Factory",
    path="/v1/score/evaluation",
    request=LlamaFactoryRequest,
    reply=LlamaFactoryReply,
    read=read,
    write=write,
    example={
        "model": "model",
        "messages": ["<|im_start|>user\nWhat is 7 + 5?<|im_end|>\n<|im_start|>assistant\n12"],
    },
    recorded={
        "a batch of two": {"model": "model", "messages": [f"{ASKED}12<|im_end|>\n", f"{ASKED}13<|im_end|>\n"]},
        "templated text, several turns": {"model": "model", "messages": [f"{ASKED_AGAIN}24<|im_end|>\n"]},
    },
    patient=True,
)

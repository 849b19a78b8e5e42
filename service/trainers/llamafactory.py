"""LLaMA-Factory's `reward_model_type: api`: `{"model", "messages": [text]}` to `{"scores": [number]}`.

Read from `llamafactory/train/ppo/ppo_utils.py` 0.9.5. `messages` are whole conversations as text, special tokens
included; there is no prompt beside them. The client has no timeout, never retries, and looks neither at the status nor
for `null`: anything but numbers ends the training with a KeyError or TypeError. So the gateway is patient in its stead
(`trainer_patience_seconds`). Called by `service.handlers.trainers`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import msgspec
from msgspec import Meta

from service.trainers.shim import Sample, ScoredSample
from service.trainers.templated import split_whole


class LlamaFactoryRequest(msgspec.Struct, omit_defaults=True):
    """Body of `/v1/score/evaluation`; fields that are not here are ignored."""

    messages: Annotated[list[str], Meta(description="Whole conversations as text. May be empty.")]
    model: Annotated[str, Meta(description='Always "model" in this client; not used.')] | None = None


class LlamaFactoryReply(msgspec.Struct):
    """Answer of `/v1/score/evaluation`; the client reads `scores` only."""

    scores: list[float]
    models: Annotated[list[str], Meta(description="The RM that gave each.")]


def read(request: LlamaFactoryRequest, text: str) -> list[Sample]:
    """The samples: taken apart by their chat template where it is known, else the raw text."""
    return [Sample(*(split_whole(m) if text == "auto" else ("", m))) for m in request.messages]


def write(scored: Sequence[ScoredSample]) -> LlamaFactoryReply:
    """The reply."""
    return LlamaFactoryReply([sample.reward for sample in scored], [sample.model for sample in scored])

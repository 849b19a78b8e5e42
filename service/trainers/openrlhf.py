"""OpenRLHF's remote reward model: `{"query", "prompts", "labels"}` to `{"rewards", "scores", "extra_logs"}`.

Read from `openrlhf/utils/agent.py` 0.11.2. `query` is prompt and response in one, special tokens included; current
versions send one sample a request, older ones a micro-batch. The client tries any status from 400 up five times, a
second apart; then the sample has no reward and the trainer stops. `null` inside the lists would break it: 503 instead.
Values of `extra_logs` must be numbers. `PROTOCOL` is its line in `protocols`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any

import msgspec
from msgspec import Meta

from service.trainers.recorded import ASKED, ASKED_AGAIN
from service.trainers.shim import Sample, ScoredSample, ShimOptions, UrlProtocol, reference_of
from service.trainers.templated import RAW, Templates, response_start


class OpenRlhfRequest(msgspec.Struct, omit_defaults=True):
    """Body of `/get_reward`; fields that are not here are ignored."""

    query: Annotated[list[str], Meta(description="Prompt and response in one text, per sample. May be empty.")]
    prompts: Annotated[list[str | None], Meta(description="The prompt of each.")] | None = None
    labels: Annotated[Any, Meta(description="What right answers look like, where they are texts.")] = None


class OpenRlhfReply(msgspec.Struct):
    """Answer of `/get_reward`: lists as long as `query`."""

    rewards: list[float]
    scores: list[float]
    extra_logs: Annotated[
        dict[str, list[float]],
        Meta(
            description="`rm_index`, `rm_propensity`, `rm_fallback`, `rm_raw_reward`; per scorer `rm_asked/NAME`, 0 or "
            "1, `rm_answered/NAME`, 0 or 1, and `rm_component/NAME`, what it said; 0 where it was not asked."
        ),
    ]


def read(request: OpenRlhfRequest, options: ShimOptions, templates: Templates) -> list[Sample]:
    """Return the samples of a request.

    The prompt is cut off where the query begins with it, or with its end. Else a known chat template tells where the
    response begins; else the raw text is scored.

    Raises:
        ValueError: `prompts` is not as long as `query`.
    """
    prompts = request.prompts
    if prompts is None:
        prompts = [None] * len(request.query)
    if len(prompts) != len(request.query):
        raise ValueError(
            f"prompts holds {len(prompts)} texts and query {len(request.query)}: send one prompt per query"
        )
    labels = request.labels if isinstance(request.labels, list) else []
    references = [reference_of(label) for label in labels] if len(labels) == len(prompts) else [None] * len(prompts)
    return [
        _sample(query, prompt, reference, options.text, templates)
        for query, prompt, reference in zip(request.query, prompts, references, strict=True)
    ]


def _sample(query: str, prompt: str | None, reference: str | None, text: str, templates: Templates) -> Sample:
    if text == "auto":
        split = templates.split_query(query, prompt)
        return Sample(split.said, split.response, split.template, reference)
    cut = response_start(query, prompt) if prompt else None
    if prompt is None or cut is None:
        return Sample("", query, RAW, reference)
    return Sample(prompt, query[cut:], RAW, reference)


def write(scored: Sequence[ScoredSample], pool: Sequence[str], options: ShimOptions) -> OpenRlhfReply:
    """Return the reply, with the same names of logs for every sample, which OpenRLHF needs.

    Means of the `rm_asked/…` columns over a step are the shares of the RMs; the mean of `rm_component/…` over that of
    `rm_answered/…` is the mean of what a scorer said.
    """
    rewards = [sample.reward for sample in scored]
    if not scored:
        return OpenRlhfReply([], [], {})
    logs = {
        "rm_index": [float(sample.index) for sample in scored],
        "rm_propensity": [sample.propensity for sample in scored],
        "rm_fallback": [float(sample.fallback) for sample in scored],
        "rm_raw_reward": [sample.raw_reward for sample in scored],
        **{f"rm_asked/{name}": [float(sample.index == k) for sample in scored] for k, name in enumerate(pool)},
        **{f"rm_answered/{name}": [float(name in sample.components) for sample in scored] for name in pool},
        **{f"rm_component/{name}": [sample.components.get(name, 0.0) for sample in scored] for name in pool},
    }
    return OpenRlhfReply(rewards, rewards, logs)


PROTOCOL = UrlProtocol(
    trainer="OpenRLHF",
    path="/get_reward",
    request=OpenRlhfRequest,
    reply=OpenRlhfReply,
    read=read,
    write=write,
    example={"query": ["What is 7 + 5? 12"], "prompts": ["What is 7 + 5?"], "labels": ["12"]},
    recorded={
        "templated text, two samples": {
            "query": [f"{ASKED}12<|im_end|>", f"{ASKED}13<|im_end|>"],
            "prompts": [ASKED, ASKED],
            "labels": ["12", "12"],
        },
        "templated text, several turns": {
            "query": [f"{ASKED_AGAIN}24<|im_end|>"],
            "prompts": [ASKED_AGAIN],
            "labels": ["24"],
        },
        "an empty batch": {"query": [], "prompts": [], "labels": []},
    },
)

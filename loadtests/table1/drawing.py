"""Two responses per prompt from a policy. Called by `dpo`, `rewards` and `artefacts`."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from loadtests.table1.judge import Pair
from loadtests.table1.policy import Policy, sample
from loadtests.table1.task import Task
from loadtests.table1.vocabulary import Codec

_TOGETHER = 128
"""Prompts that are sampled at once."""


def sample_pairs(
    policy: Policy, codec: Codec, tasks: Sequence[Task], temperature: float, generator: torch.Generator
) -> list[Pair]:
    """Two responses per prompt; prompts whose two are the same text are left out: there is nothing to prefer.

    Args:
        policy: writes the responses.
        codec: its tokenizer.
        tasks: the prompts.
        temperature: of the sampling.
        generator: of the draws.
    """
    pairs: list[Pair] = []
    for start in range(0, len(tasks), _TOGETHER):
        part = tasks[start : start + _TOGETHER]
        prompts = [codec.prompt(task.prompt) for task in part for _ in range(2)]
        ids = sample(policy, prompts, pad=codec.pad, end=codec.end, temperature=temperature, generator=generator)
        texts = [codec.text(row) for row in ids]
        pairs += [Pair(task, (texts[2 * i], texts[2 * i + 1])) for i, task in enumerate(part)]
    return [pair for pair in pairs if pair.responses[0] != pair.responses[1]]

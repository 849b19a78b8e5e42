"""How often a policy is right on the test prompts, per benchmark. Called by `artefacts` and `dpo`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch

from loadtests.table1.policy import Policy, sample
from loadtests.table1.task import Task
from loadtests.table1.tasks import FAMILIES, Split, check, draw_task
from loadtests.table1.vocabulary import Codec

_CHUNK = 256


def draw_test_tasks(per_family: int, seed: int) -> list[Task]:
    """Test prompts, the same number of each family, in the order of the families."""
    rng = np.random.default_rng([seed, 7])
    return [draw_task(family, rng, Split.TEST) for family in FAMILIES for _ in range(per_family)]


def accuracy(
    policy: Policy, codec: Codec, tasks: Sequence[Task], *, temperature: float, seed: int
) -> Mapping[str, float]:
    """Share of right responses per family, one response a prompt.

    Args:
        policy: what is measured.
        codec: its tokenizer.
        tasks: the prompts.
        temperature: of the sampling; 0 is greedy.
        seed: of the sampling.
    """
    generator = torch.Generator().manual_seed(seed)
    right: dict[str, list[bool]] = {family: [] for family in FAMILIES}
    for start in range(0, len(tasks), _CHUNK):
        part = tasks[start : start + _CHUNK]
        responses = sample(
            policy, [codec.prompt(task.prompt) for task in part], pad=codec.pad, end=codec.end,
            temperature=temperature, generator=generator,
        )  # fmt: skip
        for task, ids in zip(part, responses, strict=True):
            right[task.family].append(check(task, codec.text(ids)))
    return {family: float(np.mean(values)) for family, values in right.items()}

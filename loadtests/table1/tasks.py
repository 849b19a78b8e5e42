"""The five benchmarks, their checkers, and who may see which prompt.

Every prompt belongs to exactly one split by a hash of its text, whatever the seed: the policy's demonstrations, the
reward models' pairs, the router's offline pairs, the prompts of online DPO and the test prompts are disjoint. numpy
only. Called by everything else of this package.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import StrEnum

import numpy as np

from loadtests.table1.coding import CODE
from loadtests.table1.numbers import ARITHMETIC, SORTING
from loadtests.table1.task import Family, Task
from loadtests.table1.words import FORMAT, STRINGS
from router_core.demo.domains import group_of

FAMILIES: dict[str, Family] = {family.name: family for family in (ARITHMETIC, STRINGS, SORTING, CODE, FORMAT)}
"""By name, in the order of the table's columns."""


class Split(StrEnum):
    """Who may see a prompt. Disjoint by construction, for all seeds together."""

    SFT = "sft"
    """30 % of all prompts: demonstrations of the starting policy."""
    MODELS = "models"
    """20 %: preference pairs of the reward models."""
    OFFLINE = "offline"
    """10 %: labelled pairs of the router's offline stage."""
    ONLINE = "online"
    """30 %: the prompts of online DPO."""
    TEST = "test"
    """10 %: the prompts of the table."""


_BUCKETS = (
    [Split.SFT] * 3 + [Split.MODELS] * 2 + [Split.OFFLINE] + [Split.ONLINE] * 3 + [Split.TEST]
)  # one per last digit of the hash


def split_of(prompt: str) -> Split:
    """The one split that the prompt belongs to."""
    return _BUCKETS[int(group_of(prompt), 16) % 10]


def draw_task(family: str, rng: np.random.Generator, split: Split) -> Task:
    """A task of one family whose prompt belongs to the split."""
    while True:
        task = FAMILIES[family].draw(rng)
        if split_of(task.prompt) is split:
            return task


def draw_tasks(n: int, rng: np.random.Generator, split: Split, shares: Sequence[float] | None = None) -> list[Task]:
    """n tasks, families in proportion to `shares` (equal when None), in random order."""
    names = tuple(FAMILIES)
    weights = np.ones(len(names)) if shares is None else np.asarray(shares, dtype=float)
    return [draw_task(names[i], rng, split) for i in rng.choice(len(names), size=n, p=weights / weights.sum())]


def check(task: Task, response: str) -> bool:
    """Return True if the response is right."""
    return FAMILIES[task.family].check(task, response)


def demonstrate(task: Task, rng: np.random.Generator, quality: float) -> str:
    """A demonstration that is right with probability `quality`, and otherwise has one plausible mistake."""
    family = FAMILIES[task.family]
    if rng.random() < quality:
        return family.right(task, rng)
    while True:
        response = family.wrong(task, rng)
        if not family.check(task, response):
            return response

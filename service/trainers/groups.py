"""Rows of a trainer's batch as instances of the gateway, and rewards back into rows.

Scores of different reward models have different scales, so all responses of one prompt must be scored by one of them:
they travel as ONE instance. Knows no client and no trainer; `rowwise` calls it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

MAX_RESPONSES = 64
"""The gateway's default bound of responses per instance."""


@dataclass(frozen=True, slots=True)
class Group:
    """One instance and the rows it came from.

    Args:
        prompt: its text.
        responses: their texts, in order of `rows`.
        rows: indices in the trainer's batch.
    """

    prompt: str
    responses: tuple[str, ...]
    rows: tuple[int, ...]


def by_prompt(prompts: Sequence[str], responses: Sequence[str], max_responses: int = MAX_RESPONSES) -> list[Group]:
    """Rows with the same prompt are one group, wherever they stand; in order of first appearance.

    Args:
        prompts: (n,) texts.
        responses: (n,) texts.
        max_responses: longer groups are cut, so that copies of one prompt in a data set do not add up.

    >>> [group.rows for group in by_prompt(["p", "p", "q", "q"], ["a", "b", "c", "d"])]
    [(0, 1), (2, 3)]
    """
    rows: dict[str, list[int]] = {}
    for row, prompt in enumerate(prompts):
        rows.setdefault(prompt, []).append(row)
    found = [
        tuple(members[start : start + max_responses])
        for members in rows.values()
        for start in range(0, len(members), max_responses)
    ]
    return [_group(prompts, responses, members) for members in found]


def in_pairs(prompts: Sequence[str], responses: Sequence[str]) -> list[Group]:
    """Rows i and i + B are a pair, as in online DPO, even where two prompts of the batch are the same.

    Raises:
        ValueError: the second half does not repeat the prompts of the first.

    >>> [group.rows for group in in_pairs(["p", "q", "p", "q"], ["a", "b", "c", "d"])]
    [(0, 2), (1, 3)]
    """
    half = len(prompts) // 2
    if not repeats(prompts):
        raise ValueError(f"{len(prompts)} rows are no pairs (i, i + {half}): the second half must repeat the prompts")
    return [_group(prompts, responses, (row, row + half)) for row in range(half)]


def repeats(prompts: Sequence[str]) -> bool:
    """The second half of the prompts is the first half once more."""
    half, odd = divmod(len(prompts), 2)
    return not odd and half > 0 and list(prompts[:half]) == list(prompts[half:])


def _group(prompts: Sequence[str], responses: Sequence[str], rows: tuple[int, ...]) -> Group:
    return Group(prompts[rows[0]], tuple(responses[row] for row in rows), rows)

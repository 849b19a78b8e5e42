"""Atropos: scores for the groups of an environment.

    scored = await score_group(scored_group, reference=answer)

Called in an environment's `collect_trajectories`, once a group has its tokens, masks and messages. A group that has no
reward for one of its members is dropped whole: Atropos takes None for "not this group", has no word for "not this
member", and would take a 0 for a bad response. The log names the codes of the reasons. Its `RewardFunction` turns
every exception into zeros, which is why there is none here. Imports nothing of Atropos; called by environments of
users.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import MutableMapping
from typing import Any

from service.trainers.samples import Sample, scorer_from_environment, split_turns

logger = logging.getLogger("reward_router")


async def score_group(
    group: MutableMapping[str, Any],
    reference: str | None = None,
    metrics: MutableMapping[str, list[float]] | None = None,
    **options: Any,
) -> MutableMapping[str, Any] | None:
    """Return the group with its scores; None where a reward is missing.

    Args:
        group: Atropos' `ScoredDataGroup`; `messages` holds a conversation per member, all with the same prompt.
        reference: what a right answer looks like.
        metrics: what each scorer said of each member is added to it, by name, for the environment's `wandb_log`.
        options: of the client; they win over the environment's `REWARD_ROUTER_CLIENT_…`.

    Raises:
        RouterRefusedError: a final refusal.
        ValueError: there are no messages, or the members begin with different prompts.
    """
    samples = await samples_of_group(group, reference, **options)
    if metrics is not None:
        for name, value in (entry for sample in samples for entry in sample.metrics().items()):
            metrics.setdefault(name, []).append(value)
    missing = [sample for sample in samples if sample.reward is None]
    if missing:
        codes = Counter(sample.failure for sample in missing)
        told = ", ".join(f"{code} (x{count})" for code, count in codes.most_common())
        logger.warning(
            "a group of %d is dropped, for %d have no reward: %s; %s",
            len(samples),
            len(missing),
            told,
            missing[0].message,
        )
        return None
    group["scores"] = [sample.require() for sample in samples]
    return group


async def samples_of_group(
    group: MutableMapping[str, Any], reference: str | None = None, **options: Any
) -> list[Sample]:
    """Return a sample per member, with its decision; the arguments and errors are those of `score_group`."""
    conversations = group.get("messages")
    if not conversations:
        raise ValueError("the group holds no messages: give every member's conversation, prompt included")
    turns = [split_turns(messages) for messages in conversations]
    prompt = turns[0][0]
    if any(other != prompt for other, _ in turns):
        raise ValueError("members of the group begin with different prompts: give the responses to one")
    return await scorer_from_environment(**options).group(prompt, [response for _, response in turns], reference)

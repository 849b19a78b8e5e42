"""ROLL: what a reward worker computes from a batch, through the gateway.

    rewards.router.worker_cls: service.trainers.roll_worker.RouterRewardWorker

The worker itself is `service.trainers.roll_worker`, which imports ROLL. ROLL has no word for "no reward": a missing one
raises, and stops the training; it is never a 0. Options come from the environment (`REWARD_ROUTER_CLIENT_…`). Imports
nothing of ROLL.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from service.trainers.conversation import Said, as_sent
from service.trainers.samples import Sample, reference_text, scorer_from_environment
from service.trainers.templated import split_prompt


def samples_of_batch(texts: Sequence[str], columns: Mapping[str, Any]) -> list[Sample]:
    """Return one sample per row; rows with the same prompt are judged together.

    Args:
        texts: (B,) the responses, special tokens included.
        columns: ROLL's `non_tensor_batch`; `messages` or else `prompt` is read, and `ground_truth` as the reference.

    Raises:
        ValueError: there is neither `messages` nor `prompt`.
        RouterRefusedError: a refusal that concerns the training as a whole.
    """
    column = next((name for name in ("messages", "prompt") if name in columns), None)
    if column is None:
        raise ValueError(f"the batch has {', '.join(sorted(columns)) or 'no columns'}: give `messages` or `prompt`")
    truths = columns.get("ground_truth")
    references = [None] * len(texts) if truths is None else [reference_text(_plain(truth)) for truth in truths]
    prompts: list[Said] = []
    responses: list[Said] = []
    for given, text in zip(columns[column], texts, strict=True):
        prompt = _plain(given)
        split = split_prompt(prompt if isinstance(prompt, str) else "", text)
        prompts.append(split.said if isinstance(prompt, str) else as_sent(prompt))
        responses.append(split.response)
    return scorer_from_environment().rows(prompts, responses, references)


def _plain(value: Any) -> Any:
    tolist = getattr(value, "tolist", None)
    return value if tolist is None else tolist()

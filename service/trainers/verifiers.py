"""Rewards for verifiers 0.4 and prime-rl: a reward function by import path, and a whole group's, asynchronously.

    --env.taskset.task.rewards.router.fn service.trainers.verifiers:reward

verifiers plugs the function into any task beside its own rewards; what each scorer said becomes metrics of the trace.
`score_group` is for an environment's `finalize`, where one episode holds several attempts that are judged together.
Where no reward can be had `reward` raises, so that verifiers marks the trace as failed; `score_group` records the error
on that trace alone: never a 0. Options come from the environment (`REWARD_ROUTER_CLIENT_URL`, …). Imports nothing of
verifiers; called by it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from service.trainers.conversation import Said
from service.trainers.samples import Sample, reference_text, scorer_from_environment, split_turns
from service.trainers.values import RouterUnavailableError

REWARD_NAME = "router"
"""Name of the reward that `score_group` records."""


async def reward(task: Any, trace: Any) -> float:
    """Return the reward of one trace, and record its components as metrics.

    Args:
        task: verifiers' `TaskData`; a text in its field `answer` is the reference.
        trace: verifiers' `Trace`; the last branch counts, with all its turns and calls of tools.

    Raises:
        RouterUnavailableError: there is none before the deadline.
        RouterRefusedError: a final refusal.
    """
    prompt, response = split_turns(messages_of(trace))
    sample = await scorer_from_environment().one(prompt, response, reference_text(getattr(task, "answer", None)))
    return _recorded(trace, sample)


async def score_group(task: Any, traces: Sequence[Any], name: str = REWARD_NAME, weight: float = 1.0) -> None:
    """Record the rewards of one prompt's traces, which one reward model judges together.

    A trace without a reward gets the error that `reward` would raise, by verifiers' own `record_error`, and no reward;
    verifiers leaves such a trace out, and the others keep theirs.

    Args:
        task: verifiers' `TaskData`.
        traces: the attempts of one episode.
        name: of the reward on each trace.
        weight: of the reward.

    Raises:
        RouterRefusedError: a refusal that concerns the training as a whole.
        ValueError: the traces do not begin with the same prompt.
    """
    turns = [split_turns(messages_of(trace)) for trace in traces]
    prompt: Said = turns[0][0]
    if any(other != prompt for other, _ in turns):
        raise ValueError("traces of one group begin with different prompts: give the attempts at one task")
    responses = [response for _, response in turns]
    reference = reference_text(getattr(task, "answer", None))
    samples = await scorer_from_environment().group(prompt, responses, reference)
    for trace, sample in zip(traces, samples, strict=True):
        try:
            trace.record_reward(name, _recorded(trace, sample), weight)
        except RouterUnavailableError as error:
            trace.record_error(error)


def messages_of(trace: Any) -> list[Mapping[str, Any]]:
    """Return the messages of verifiers' trace as plain objects."""
    return [_plain(message) for message in trace.messages]


def _plain(message: Any) -> Mapping[str, Any]:
    found: dict[str, Any] = message.model_dump(exclude_none=True)
    return found


def _recorded(trace: Any, sample: Sample) -> float:
    score = sample.require()
    trace.record_metrics(sample.metrics())
    trace.info.setdefault("reward_router", {}).update(decision_id=sample.decision_id, model=sample.model)
    return score

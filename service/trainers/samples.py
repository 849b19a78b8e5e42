"""Rewards of single responses and of groups, for frameworks whose environments score: what these helpers share.

A reward that could not be had is a `Sample` with `reward` None and the reason; each helper says it in its framework's
words. Knows the client; knows no framework. Called by `verifiers`, `skyrl`, `atropos`, `nemo_gym`, `nemo_rl`, `roll`.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

from service.trainers.client import AsyncRouterClient, RouterClient
from service.trainers.coalesce import Coalescer
from service.trainers.conversation import Said, as_sent
from service.trainers.groups import by_prompt
from service.trainers.options import ClientOptions, from_environment
from service.trainers.values import (
    FATAL_CODES,
    NO_REWARD,
    Missing,
    RewardItem,
    RewardResult,
    RouterRefusedError,
    RouterUnavailableError,
)


@dataclass(frozen=True, slots=True)
class Sample:
    """The reward of one response, and where it is from.

    Attributes:
        reward: None where there is none; never a number in its place.
        failure: stable code of the reason, where there is no reward.
        message: the reason in words.
        components: what each scorer said of this response, by name; only numbers.
        model: who gave the reward; "" where nobody answered.
        decision_id: names the decision, for feedback; "" where there is none.
        propensity: probability that this model would be asked; 0 where there is no decision.
    """

    reward: float | None
    failure: str | None = None
    message: str = ""
    components: Mapping[str, float] = field(default_factory=dict)
    model: str = ""
    decision_id: str = ""
    propensity: float = 0.0

    def require(self) -> float:
        """Return the reward.

        Raises:
            RouterUnavailableError: there is none.
        """
        if self.reward is None:
            code = self.failure or NO_REWARD
            raise RouterUnavailableError(f"no reward ({code}): {self.message}", code)
        return self.reward

    def metrics(self) -> dict[str, float]:
        """Return the numbers worth a curve: each scorer's component, and the propensity."""
        parts = {f"reward_router/{name}": value for name, value in self.components.items()}
        return {**parts, "reward_router/propensity": self.propensity}


def samples_of(result: RewardResult, count: int) -> list[Sample]:
    """Return one sample per response of an instance.

    Args:
        result: what the client gave for it.
        count: how many responses it has.

    Raises:
        RouterRefusedError: a refusal that concerns the training as a whole: a wrong key, run or policy.
    """
    if isinstance(result, Missing):
        if result.code in FATAL_CODES:
            raise RouterRefusedError(0, result.code, result.message)
        return [Sample(None, result.code, result.message)] * count
    parts: Mapping[str, Sequence[float | None]] = result.extra.get("components") or {}
    samples = []
    for row, (reward, failure) in enumerate(zip(result.rewards, result.failures, strict=True)):
        components = {name: float(value) for name, values in parts.items() if (value := values[row]) is not None}
        message = "" if failure is None else f"{result.model} gave no reward for this response"
        samples.append(
            Sample(reward, failure, message, components, result.model, result.decision_id, result.propensity)
        )
    return samples


class SampleScorer:
    """Asks for the rewards of single responses and of groups.

    Args:
        options: of the client.
    """

    def __init__(self, options: ClientOptions) -> None:
        self.options = options
        self._asynchronous = AsyncRouterClient(options)
        self._coalescer = Coalescer(self._asynchronous)
        self._blocking = RouterClient(options)

    async def one(self, prompt: Said, response: Said, reference: str | None = None) -> Sample:
        """Return the sample of one response; concurrent ones travel in one request."""
        result = await self._coalescer.reward(RewardItem(prompt, (response,), reference=reference))
        return samples_of(result, 1)[0]

    async def group(self, prompt: Said, responses: Sequence[Said], reference: str | None = None) -> list[Sample]:
        """Return the samples of one prompt's responses, all judged together, as one instance."""
        [result] = await self._asynchronous.reward_many([RewardItem(prompt, tuple(responses), reference=reference)])
        return samples_of(result, len(responses))

    def rows(
        self, prompts: Sequence[Said], responses: Sequence[Said], references: Sequence[str | None] | None = None
    ) -> list[Sample]:
        """Return one sample per row, blocking; rows with the same prompt and reference are judged together."""
        given = references if references is not None else [None] * len(prompts)
        keys = [repr((prompt, reference)) for prompt, reference in zip(prompts, given, strict=True)]
        groups = by_prompt(keys, [""] * len(responses))
        items = [
            RewardItem(
                prompts[group.rows[0]],
                tuple(responses[row] for row in group.rows),
                reference=given[group.rows[0]],
            )
            for group in groups
        ]
        found: list[Sample] = [Sample(None)] * len(responses)
        for group, result in zip(groups, self._blocking.reward_many(items), strict=True):
            for row, sample in zip(group.rows, samples_of(result, len(group.rows)), strict=True):
                found[row] = sample
        return found

    async def close(self) -> None:
        """Close the connections of this event loop, and those of the blocking calls."""
        await self._coalescer.close()
        self._blocking.close()


def scorer_from_environment(**options: Any) -> SampleScorer:
    """Return this process's scorer for these options; they win over the environment's `REWARD_ROUTER_CLIENT_…`."""
    return _scorer(from_environment(os.environ, **options), os.getpid())


@cache
def _scorer(options: ClientOptions, pid: int) -> SampleScorer:
    """The scorer of a process, which lives as long as it does: its callers are given nothing to keep one in."""
    return SampleScorer(options)


def split_turns(messages: Sequence[Mapping[str, Any]]) -> tuple[Said, Said]:
    """Return a conversation's prompt, and the response that begins with the assistant's first turn.

    Raises:
        ValueError: nothing stands before the assistant's first turn, or it has none.

    >>> split_turns([{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "So."}])
    ('Why?', 'So.')
    """
    roles = [message.get("role") for message in messages]
    first = roles.index("assistant") if "assistant" in roles else len(roles)
    if not 0 < first < len(roles):
        raise ValueError(f"messages have the roles {roles}: give a prompt, and then the assistant's turns")
    return as_sent(list(messages[:first])), as_sent(list(messages[first:]), "response", "assistant")


def reference_text(value: object) -> str | None:
    """Return what a right answer looks like, if it is a text."""
    return value if isinstance(value, str) and value else None

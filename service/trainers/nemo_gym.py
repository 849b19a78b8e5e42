"""NeMo Gym: how a resources server verifies through the gateway, one rollout at a time or a cohort together.

The server itself is `service.trainers.nemo_gym_server`, which imports NeMo Gym. Here is what it does, without NeMo Gym:
conversations of the Responses API to messages, samples to the fields of a verify response (`reward`,
`reward_components`, `mask_sample`, `failure_kind`, `failure_reason`), and cohorts.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from service.trainers.conversation import Said, as_sent, prompt_text
from service.trainers.samples import Sample, SampleScorer
from service.trainers.values import NO_REWARD

FAILURE_KIND = "judge_failed"
"""NeMo Gym's shared name for a verifier that could not answer."""

UNKNOWN_REASON = 2000
"""Longest `failure_reason`, as NeMo Gym cuts its own."""


def input_messages(given: object) -> Said:
    """Return the `input` of `responses_create_params` as a prompt: its text, or its messages and calls of tools.

    Raises:
        ValueError: it holds something other than text.
    """
    return given if isinstance(given, str) else as_sent(_messages(given, "input"), "input")


def output_messages(given: object) -> Said:
    """Return the `output` of a response: the assistant's turns, its calls of tools and their results.

    Raises:
        ValueError: it is empty, or holds something other than text.
    """
    return as_sent(_messages(given, "output"), "output", "assistant")


def _messages(items: Any, name: str) -> list[Mapping[str, Any]]:
    found: list[Mapping[str, Any]] = []
    for item in items or []:
        kind = item.get("type", "message")
        if kind == "message":
            found.append({"role": item.get("role", "assistant"), "content": _content(item.get("content"))})
        elif kind == "function_call":
            call = {"id": item.get("call_id", ""), "function": {"name": item["name"], "arguments": item["arguments"]}}
            found.append({"role": "assistant", "content": "", "tool_calls": [call]})
        elif kind == "function_call_output":
            found.append({"role": "tool", "content": _content(item.get("output"))})
        elif kind != "reasoning":
            raise ValueError(f"{name} holds an item of type {kind!r}: give messages and function calls")
    return found


def _content(content: Any) -> Any:
    """Return texts as they are; parts without those of other APIs' fields."""
    if isinstance(content, str):
        return content
    return [{"type": "text", "text": part["text"]} if "text" in part else part for part in content or []]


def verdict_of(sample: Sample) -> dict[str, Any]:
    """Return the fields of a verify response.

    NeMo Gym's `reward` must be a number. Where there is none it is 0 and masked: `mask_sample` keeps it out of every
    score, and the reason stands beside it.
    """
    if sample.reward is None:
        reason = f"{sample.failure or NO_REWARD}: {sample.message}"[:UNKNOWN_REASON]
        failed = {"mask_sample": True, "failure_kind": FAILURE_KIND, "failure_reason": reason}
        # The older place of the mask, which NeMo RL reads too.
        return {"reward": 0.0, "reward_components": {}, **failed, "instance_config": {"mask_sample": True}}
    return {
        "reward": sample.reward,
        "reward_components": dict(sample.components),
        "decision_id": sample.decision_id,
        "reward_model": sample.model,
    }


@dataclass(slots=True)
class _Gathering:
    """A cohort that is not complete."""

    responses: dict[int, Said] = field(default_factory=dict)
    futures: dict[int, list[asyncio.Future[Sample]]] = field(default_factory=dict)
    timer: asyncio.TimerHandle | None = None


class Cohorts:
    """Collects the rollouts of one prompt, and has them judged together once all are there.

    Args:
        scorer: who asks.
        size: rollouts per prompt.
        seconds: how long the first waits for the last; then those who came are masked.
    """

    def __init__(self, scorer: SampleScorer, size: int, seconds: float) -> None:
        self._scorer, self._size, self._seconds = scorer, size, seconds
        self._gathering: dict[tuple[str, str], _Gathering] = {}
        self._asking: set[asyncio.Task[None]] = set()

    async def verify(
        self, group: str, index: int, prompt: Said, response: Said, reference: str | None = None
    ) -> Sample:
        """Return the sample of one rollout, once its cohort is complete.

        Args:
            group: name of the cohort.
            index: of the rollout in it; the same one again waits for the same verdict.
            prompt: of all of them.
            response: of this one.
            reference: what a right answer looks like.
        """
        key = (group, prompt_text(prompt))
        loop = asyncio.get_running_loop()
        cohort = self._gathering.setdefault(key, _Gathering())
        future: asyncio.Future[Sample] = loop.create_future()
        cohort.responses[index] = response
        cohort.futures.setdefault(index, []).append(future)
        if cohort.timer is None:
            cohort.timer = loop.call_later(self._seconds, self._expire, key)
        if len(cohort.responses) == self._size:
            del self._gathering[key]
            cohort.timer.cancel()
            task = asyncio.ensure_future(self._judge(cohort, prompt, reference))
            self._asking.add(task)
            task.add_done_callback(self._asking.discard)
        return await future

    async def _judge(self, cohort: _Gathering, prompt: Said, reference: str | None) -> None:
        order = sorted(cohort.responses)
        try:
            samples: Sequence[Sample] = await self._scorer.group(
                prompt, [cohort.responses[index] for index in order], reference
            )
        except Exception as error:  # noqa: BLE001 - the waiters raise it, every one in its own request
            _settle(cohort, dict.fromkeys(order, error))
            return
        _settle(cohort, dict(zip(order, samples, strict=True)))

    def _expire(self, key: tuple[str, str]) -> None:
        cohort = self._gathering.pop(key, None)
        if cohort is not None:
            reason = f"{len(cohort.responses)} of {self._size} rollouts came within {self._seconds:g} s"
            _settle(cohort, dict.fromkeys(cohort.responses, Sample(None, "cohort_incomplete", reason)))


def _settle(cohort: _Gathering, outcomes: Mapping[int, Sample | Exception]) -> None:
    for index, outcome in outcomes.items():
        for future in cohort.futures[index]:
            if future.done():
                continue
            if isinstance(outcome, Exception):
                future.set_exception(outcome)
            else:
                future.set_result(outcome)

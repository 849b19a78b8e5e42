"""Reward functions and a reward manager for verl.

    reward.custom_reward_function.path=pkg://service.trainers.verl
    reward.custom_reward_function.name=compute_score_async          # or compute_score
    +reward.custom_reward_function.reward_kwargs.run=my-run

verl calls them once per sample. A function is not told the prompt: it must stand in `extra_info["prompt"]` (text or
messages), which the data set's preparation can put there. The manager reads it from `raw_prompt`, where verl keeps it
anyway, and needs no function:

    reward.reward_manager.source=importlib
    reward.reward_manager.name=RouterRewardManager
    reward.reward_manager.module.path=pkg://service.trainers.verl

The samples of one prompt come in different calls, often in different processes; the gateway keeps them with one reward
model (its memory of run and prompt). Concurrent samples of one process travel in one request. verl has no word for "no
reward": where none can be had before the deadline, the call raises an error that names the reason's code, and verl
stops; it never trains on a false 0.

Knows what verl 0.9 hands over; imports nothing of it, and neither torch nor ray.
"""

from __future__ import annotations

import asyncio
import atexit
import json
import os
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any

from service.trainers.client import AsyncRouterClient, RouterClient
from service.trainers.coalesce import Coalescer
from service.trainers.conversation import Said, as_sent
from service.trainers.options import ClientOptions, from_environment
from service.trainers.samples import reference_text, samples_of
from service.trainers.values import (
    NO_REWARD,
    RETRIED_CODES,
    UNAVAILABLE,
    Missing,
    RewardItem,
    RewardResult,
    RouterRefusedError,
    Scored,
)

DEADLINE_SECONDS = 300.0
"""A missing reward stops verl's training, so that it is worth waiting for."""


def compute_score(
    data_source: str | None = None,
    solution_str: str | None = None,
    ground_truth: Any = None,
    extra_info: Mapping[str, Any] | None = None,
    **options: Any,
) -> dict[str, Any]:
    """One sample's reward, blocking; verl runs it in threads.

    Args:
        data_source: not used.
        solution_str: the response.
        ground_truth: a text is sent as the reference: what a right answer looks like.
        extra_info: holds `prompt`.
        options: `reward_kwargs` of verl's configuration: `url`, `run`, `api_key`, `deadline_seconds`, …; they win over
            the environment's `REWARD_ROUTER_CLIENT_…`.

    Returns:
        `{"score": reward, "reward_model": …, "propensity": …, "decision_id": …}`; verl logs what is a number.

    Raises:
        ValueError: there is no prompt.
        RouterUnavailableError: no reward before the deadline.
        RouterRefusedError: a final refusal.
    """
    item = RewardItem(_prompt_of(extra_info), (_given(solution_str),), reference=reference_text(ground_truth))
    [result] = client_of(_options(options), os.getpid()).reward_many([item])
    return score_of(result)


async def compute_score_async(
    data_source: str | None = None,
    solution_str: str | None = None,
    ground_truth: Any = None,
    extra_info: Mapping[str, Any] | None = None,
    **options: Any,
) -> dict[str, Any]:
    """`compute_score` for verl's event loop: concurrent samples travel in one request. Prefer it."""
    coalescer = coalescer_of(_options(options), os.getpid())
    reference = reference_text(ground_truth)
    return await score_single(
        coalescer, RewardItem(_prompt_of(extra_info), (_given(solution_str),), reference=reference)
    )


class RouterRewardManager:
    """A reward manager of verl that sees the prompt; stands where `NaiveRewardManager` does.

    Not derived from verl's base class, so that this module imports without verl; it has the same interface.

    Args:
        config: verl's configuration; `reward.reward_kwargs`, where it stands, holds options of the client.
        tokenizer: of the policy.
        compute_score: ignored.
        others: what verl adds for reward models of its own.
    """

    def __init__(self, config: Any, tokenizer: Any, compute_score: Any = None, **others: Any) -> None:
        self.config = config
        self.tokenizer = tokenizer
        self.compute_score = compute_score
        self.options = _options(_kwargs_of(config))
        self._coalescer = Coalescer(AsyncRouterClient(self.options))

    async def run_single(self, data: Any) -> dict[str, Any]:
        """The reward of one sample.

        Args:
            data: verl's `DataProto` of one sample; of a longer trajectory the last one counts. A text in
                `reward_model["ground_truth"]` is the reference.

        Returns:
            `{"reward_score": float, "reward_extra_info": {…}}`.

        Raises:
            ValueError: there is no prompt.
            RouterUnavailableError: no reward before the deadline.
            RouterRefusedError: a final refusal.
        """
        sample = data[-1:][0]
        response_ids = sample.batch["responses"]
        length = int(sample.batch["attention_mask"][-response_ids.shape[-1] :].sum())
        loop = asyncio.get_running_loop()
        response = await loop.run_in_executor(
            None, lambda: self.tokenizer.decode(response_ids[:length], skip_special_tokens=True)
        )
        fields = sample.non_tensor_batch
        raw = fields.get("raw_prompt")
        prompt = as_sent(_plain(raw)) if raw is not None else _prompt_of(fields.get("extra_info"))
        reference = reference_text((fields.get("reward_model") or {}).get("ground_truth"))
        found = await score_single(self._coalescer, RewardItem(prompt, (str(response),), reference=reference))
        return {"reward_score": found["score"], "reward_extra_info": found}

    @classmethod
    def assemble_rm_scores(cls, data: Any, scores: list[float]) -> Any:
        """Each sample's reward on the last token of its response, as in verl's base class.

        Args:
            data: verl's `DataProto` of B samples.
            scores: (B,).

        Returns:
            (B, T) tensor.
        """
        import torch

        prompt_length = data.batch["prompts"].size(1)
        lengths = data.batch["attention_mask"][:, prompt_length:].sum(dim=1)
        placed = torch.zeros_like(data.batch["responses"], dtype=torch.float32)
        placed[torch.arange(len(placed), device=placed.device), lengths - 1] = placed.new_tensor(scores)
        return placed


async def score_single(coalescer: Coalescer, item: RewardItem) -> dict[str, Any]:
    """The sample's score.

    Raises:
        RouterUnavailableError: there is none.
        RouterRefusedError: a final refusal.
    """
    return score_of(await coalescer.reward(item))


def score_of(result: RewardResult) -> dict[str, Any]:
    """What verl's managers take: the score, and what to keep beside it; the same keys every time.

    Raises:
        RouterUnavailableError: there is none; names the stable code of the reason, and has it as `code`.
        RouterRefusedError: the text is one that no reward model takes, or the run or policy is wrong; likewise.
    """
    if isinstance(result, Missing) and result.code not in {*RETRIED_CODES, UNAVAILABLE, NO_REWARD}:
        raise RouterRefusedError(0, result.code, result.message)
    [sample] = samples_of(result, 1)
    reward = sample.require()
    assert isinstance(result, Scored)
    parts: Mapping[str, Sequence[float | None]] = result.extra.get("components") or {}
    return {
        "score": reward,
        "propensity": result.propensity,
        "fallback": float(result.fallback),
        "reward_model": result.model,
        "decision_id": result.decision_id,
        "components": json.dumps({name: values[0] for name, values in parts.items()}),
    }


def _options(given: Mapping[str, Any]) -> ClientOptions:
    known = {name: value for name, value in given.items() if name not in _VERLS_OWN}
    return from_environment(os.environ, **{"deadline_seconds": _default_deadline(), **known})


_VERLS_OWN = frozenset({"reward_router_address", "reward_model_tokenizer"})
"""What verl adds to every call where it serves a reward model of its own; not our URL, in spite of the name."""


def _default_deadline() -> float | None:
    return None if os.environ.get("REWARD_ROUTER_CLIENT_DEADLINE_SECONDS") else DEADLINE_SECONDS


def _given(solution: str | None) -> str:
    if solution is None:
        raise ValueError("solution_str is None: verl hands the response over by that name; give its text")
    return solution


def _prompt_of(extra_info: Mapping[str, Any] | None) -> Said:
    prompt = (extra_info or {}).get("prompt")
    if prompt is None:
        raise ValueError(
            "extra_info holds no prompt: put it there when the data set is prepared (row['extra_info']['prompt'] = "
            "row['prompt']), or use RouterRewardManager, which reads verl's raw_prompt"
        )
    return as_sent(_plain(prompt))


def _plain(prompt: Any) -> Any:
    """Messages out of numpy's arrays, in which verl's batches keep them."""
    tolist: Callable[[], Any] | None = getattr(prompt, "tolist", None)
    return tolist() if tolist is not None else prompt


def _kwargs_of(config: Any) -> dict[str, Any]:
    try:
        return dict(config.reward.get("reward_kwargs") or {})
    except AttributeError:
        return {}


@cache
def client_of(options: ClientOptions, pid: int) -> RouterClient:
    """The blocking client of a process, as long as it lives: verl gives a function nothing to keep one in.

    Args:
        options: of the client.
        pid: of the process, so that a fork gets its own.
    """
    client = RouterClient(options)
    atexit.register(client.close)
    return client


@cache
def coalescer_of(options: ClientOptions, pid: int) -> Coalescer:
    """The same for the asynchronous function."""
    return Coalescer(AsyncRouterClient(options))

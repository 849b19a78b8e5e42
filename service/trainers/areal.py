"""Rewards for AReaL: `RouterRewards` for its workflows, and a reward function for those who keep AReaL's own.

    workflow = "service.trainers.areal_workflow.RouterWorkflow"
    workflow_kwargs = dict(reward_fn="service.trainers.areal.reward_fn", ...)

AReaL runs a function in a small pool of processes, one sample a call, waits 15 s, tries four times, and then takes 0
for a timeout but rejects the trajectory for an exception. So the deadline here is shorter than AReaL's, and it ends in
an exception. That does not help a sample that waited in the pool's queue: AReaL's 15 s run there too. `RouterRewards`
needs no pool: its samples await the gateway, many in one request, and one without a reward is left out of its group,
which is what AReaL takes None for. What each scorer said goes to AReaL's statistics, beside its `reward`; a function of
the pool cannot do that, since AReaL collects the statistics of its own process only.

AReaL hands over the prompt as the policy's chat template made it. The messages are taken from the data set's column
`messages` where there is one; else the usual templates are taken apart (`templated`). Options come from the environment
(`REWARD_ROUTER_CLIENT_URL`, `REWARD_ROUTER_CLIENT_RUN`, …). Knows AReaL 1.0's calls; imports its
statistics alone, when an episode ends. Called by AReaL, and by `areal_workflow`.
"""

from __future__ import annotations

import atexit
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from importlib import import_module
from typing import Any

from service.trainers.client import AsyncRouterClient, RouterClient
from service.trainers.coalesce import Coalescer
from service.trainers.conversation import as_sent, read_messages
from service.trainers.options import ClientOptions, from_environment
from service.trainers.samples import Sample, reference_text, samples_of
from service.trainers.templated import UNKNOWN, Split, split_prompt
from service.trainers.values import FATAL_CODES, RewardItem, RouterRefusedError, RouterUnavailableError
from service.trainers.verl import score_of

logger = logging.getLogger("reward_router")

REFERENCES = ("answer", "ground_truth", "solution")
"""Columns in which AReaL's data sets keep the right answer; the first that is a text counts."""

DEADLINE_SECONDS = 12.0
"""Below the 15 s after which AReaL gives up on a call."""


def reward_fn(
    prompt: str,
    completions: str,
    prompt_ids: Sequence[int] | None = None,
    completion_ids: Sequence[int] | None = None,
    **columns: Any,
) -> float:
    """One sample's reward.

    Args:
        prompt: templated text.
        completions: the response, special tokens included.
        prompt_ids: not used.
        completion_ids: not used.
        columns: of the data set; `messages` is read, and a text in one of `REFERENCES` as the reference.

    Returns:
        The reward.

    Raises:
        RouterUnavailableError: no reward before the deadline: AReaL tries again, then rejects the trajectory.
        RouterRefusedError: a final refusal.
    """
    return score(client_of(_options(), os.getpid()), prompt, completions, columns)


def make_reward_fn(options: ClientOptions) -> ConfiguredReward:
    """The same with options of your own, for workflows that take a function and no path.

    Args:
        options: see `ClientOptions`; keep `deadline_seconds` below AReaL's `timeout_seconds`.
    """
    return ConfiguredReward(options)


class ConfiguredReward:
    """`reward_fn` with options; picklable, because AReaL's pool of processes is handed the function itself."""

    def __init__(self, options: ClientOptions) -> None:
        self.options = options

    def __call__(self, prompt: str, completions: str, *_: Any, **columns: Any) -> float:
        return score(client_of(self.options, os.getpid()), prompt, completions, columns)


def score(client: RouterClient, prompt: str, completion: str, columns: Mapping[str, Any]) -> float:
    """The reward of one sample.

    Args:
        client: who asks.
        prompt: templated text.
        completion: the response, special tokens included.
        columns: see `reward_fn`.

    Raises:
        RouterUnavailableError: there is none; names the stable code of the reason.
        RouterRefusedError: a final refusal.
    """
    [result] = client.reward_many([item_of(prompt, completion, columns)])
    return float(score_of(result)["score"])


def item_of(prompt: str, completion: str, columns: Mapping[str, Any]) -> RewardItem:
    """The sample without its chat template, with its reference; the arguments are those of `score`."""
    split = split_prompt(prompt, completion)
    messages = columns.get("messages")
    reference = next((text for name in REFERENCES if (text := reference_text(columns.get(name)))), None)
    if messages is None and split.template == UNKNOWN:
        _warn_once()
    said = split.said if messages is None else as_sent([*messages, *_later_turns(messages, split)])
    return RewardItem(said, (split.response,), reference=reference)


def _later_turns(messages: Sequence[Mapping[str, Any]], split: Split) -> Sequence[Mapping[str, str]]:
    """Return the prompt's turns that an episode has added to those of the data set, from its first answer on."""
    answered = sum(message.role == "assistant" for message in read_messages(messages, "messages"))
    answers = [index for index, turn in enumerate(split.messages) if turn["role"] == "assistant"]
    return split.messages[answers[answered] :] if len(answers) > answered else ()


@cache
def _warn_once() -> None:
    logger.warning(
        "the policy's chat template is not known: prompts are scored as they came, special tokens included; give the "
        "data set a column `messages`"
    )


class RouterRewards:
    """Mixin for AReaL's workflows, such as `RLVRWorkflow`: their rewards come from the gateway.

    Stands before the workflow among the bases, and takes the place of its reward function.

    Args:
        reward_options: of `ClientOptions`; they win over the environment's `REWARD_ROUTER_CLIENT_…`.
        workflow: the workflow's own arguments, by name.

    Raises:
        ValueError: `reward_fn` is given too, or an option is not known.
    """

    def __init__(self, *, reward_options: Mapping[str, Any] | None = None, **workflow: Any) -> None:
        if "reward_fn" in workflow:
            raise ValueError("reward_fn: the rewards come from the gateway here; leave it out")
        # A function, since AReaL would load one that is named, and put it in the place of ours at the first episode.
        super().__init__(reward_fn=reward_fn, **workflow)  # type: ignore[call-arg]
        options = from_environment(os.environ, **(reward_options or {}))
        self.async_reward_fn = AwaitedReward(options, self.record)

    def record(self, sample: Sample) -> None:
        """Add what each scorer said of a sample to AReaL's statistics, in the scope of its own `reward`."""
        scope = import_module("areal.infra.workflow_context").stat_scope()
        import_module("areal.utils.stats_tracker").get(scope).scalar(**sample.metrics())

    async def arun_episode(self, engine: Any, data: Any) -> Any:
        """Return the workflow's trajectory; None, with which AReaL leaves it out of its group, if it has no reward.

        An exception would cost the whole group.

        Raises:
            RouterRefusedError: a wrong key, run or policy.
        """
        try:
            return await super().arun_episode(engine, data)  # type: ignore[misc]
        except (RouterUnavailableError, RouterRefusedError) as error:
            if error.code in FATAL_CODES:
                raise
            logger.warning("a trajectory is left out, for it has no reward (%s): %s", error.code, error.message)
            return None


class AwaitedReward:
    """What AReaL's workflows await for a sample, in place of their `AsyncRewardWrapper`.

    Args:
        options: of the client.
        record: is called with every sample that has a reward.
    """

    def __init__(self, options: ClientOptions, record: Callable[[Sample], None] = lambda sample: None) -> None:
        self.options = options
        self._record = record
        self._coalescer = Coalescer(AsyncRouterClient(options))

    async def __call__(self, prompt: str, completions: str, *_: Any, **columns: Any) -> float:
        """See `reward_fn`; concurrent samples travel in one request.

        Raises:
            RouterUnavailableError: no reward before the deadline.
            RouterRefusedError: a final refusal.
        """
        result = await self._coalescer.reward(item_of(prompt, completions, columns))
        reward = float(score_of(result)["score"])
        [sample] = samples_of(result, 1)
        self._record(sample)
        return reward

    async def close(self) -> None:
        """Close the connections of this event loop."""
        await self._coalescer.close()


def _options() -> ClientOptions:
    chosen = None if os.environ.get("REWARD_ROUTER_CLIENT_DEADLINE_SECONDS") else DEADLINE_SECONDS
    return from_environment(os.environ, deadline_seconds=chosen)


@cache
def client_of(options: ClientOptions, pid: int) -> RouterClient:
    """The client of a process, which lives as long as the process: AReaL gives a function nothing to keep one in.

    Args:
        options: of the client.
        pid: of the process, so that each of AReaL's pool has its own.
    """
    client = RouterClient(options)
    atexit.register(client.close)
    return client

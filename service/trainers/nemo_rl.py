"""NeMo RL: what an environment's step asks of the gateway.

The environment itself is `service.trainers.nemo_rl_env`, which imports NeMo RL. Its step has no mask for one response,
so a missing reward is a failure of its prompt; where single responses are to be masked, put the NeMo Gym server
(`nemo_gym_server`) behind NeMo RL's NeMo Gym environment, which reads `mask_sample`. Imports nothing of NeMo RL.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from service.trainers.samples import Sample, reference_text, scorer_from_environment, split_turns
from service.trainers.values import RETRIED_CODES, UNAVAILABLE, RouterUnavailableError

COMPONENT = "reward/"
"""Before a component's name, by which NeMo RL's GDPO finds its rewards."""


def samples_of_logs(
    logs: Sequence[Sequence[Mapping[str, Any]]], metadata: Sequence[Mapping[str, Any] | None], **options: Any
) -> list[Sample]:
    """Return one sample per message log; logs with the same prompt are judged together.

    Args:
        logs: (B,) NeMo RL's message logs; role and content are read, tokens are not sent.
        metadata: (B,) what the environment keeps of each; `ground_truth` is the reference.
        options: of the client; they win over the environment's `REWARD_ROUTER_CLIENT_…`.

    Raises:
        ValueError: a log has no turn of the assistant.
        RouterRefusedError: a refusal that concerns the training as a whole.
    """
    turns = [split_turns([{"role": one["role"], "content": one["content"]} for one in log]) for log in logs]
    references = [reference_text((about or {}).get("ground_truth")) for about in metadata]
    prompts, responses = [prompt for prompt, _ in turns], [response for _, response in turns]
    return scorer_from_environment(**options).rows(prompts, responses, references)


def component_rewards(samples: Sequence[Sample]) -> dict[str, list[float]]:
    """Return what each scorer said of each sample, by NeMo RL's name of a reward: `reward/NAME`, (B,) numbers.

    Raises:
        ValueError: a scorer said nothing of one of them.
    """
    names = sorted({name for sample in samples for name in sample.components})
    for sample in samples:
        if lacking := [name for name in names if name not in sample.components]:
            raise ValueError(
                f"reward_components is set, and {lacking[0]!r} was not asked about every response: choose a policy "
                "that asks every scorer, such as `majority`"
            )
    return {COMPONENT + name: [sample.components[name] for sample in samples] for name in names}


def is_passing(error: RouterUnavailableError) -> bool:
    """Return True if asking again later may give the reward that is missing."""
    return error.code in {*RETRIED_CODES, UNAVAILABLE}

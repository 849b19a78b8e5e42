"""NeMo RL's environment whose rewards come from the gateway.

    register_env("reward_router", "service.trainers.nemo_rl_env.RouterEnvironment")

Imports NeMo RL and ray, so it can be loaded only where NeMo RL is; called by it, which finds it by name. A missing
reward is one of NeMo RL's own failures of a rollout, by which its `RolloutManager` tries a prompt again or skips it.
"""

from typing import Any

import ray  # type: ignore[import-not-found, unused-ignore]
import torch
from nemo_rl.distributed.ray_actor_environment_registry import (  # type: ignore[import-not-found, unused-ignore]
    ACTOR_ENVIRONMENT_REGISTRY,
)
from nemo_rl.distributed.virtual_cluster import PY_EXECUTABLES  # type: ignore[import-not-found, unused-ignore]
from nemo_rl.environments.interfaces import (  # type: ignore[import-not-found, unused-ignore]
    EnvironmentInterface,
    EnvironmentReturn,
)

from service.trainers.nemo_rl import component_rewards, is_passing, samples_of_logs
from service.trainers.values import RouterUnavailableError

try:
    from nemo_rl.experience.failures import (  # type: ignore[import-not-found, unused-ignore]
        RolloutDataFailure,
        RolloutInfraFailure,
    )
except ModuleNotFoundError:
    # Releases before NeMo RL knew kinds of failures.
    RolloutDataFailure = RolloutInfraFailure = RouterUnavailableError

# NeMo RL starts no actor whose Python it is not told; it looks here after it has imported this module.
ACTOR_ENVIRONMENT_REGISTRY.setdefault(f"{__name__}.RouterEnvironment", PY_EXECUTABLES.SYSTEM)


class Environment(EnvironmentInterface):  # type: ignore[misc, unused-ignore]
    """Single turns; every episode ends with its reward.

    Args:
        config: options of the client by name, such as `url` and `run`; and `reward_components`, True for a reward per
            scorer instead of one, as NeMo RL's GDPO takes them.
    """

    def __init__(self, config: Any = None) -> None:
        given = dict(config or {})
        self.reward_components = bool(given.pop("reward_components", False))
        self.options = given
        self.metrics: dict[str, list[float]] = {}

    def step(self, message_log_batch: Any, metadata: Any) -> Any:
        """Return NeMo RL's `EnvironmentReturn` of a batch.

        Raises:
            RolloutInfraFailure: a response has no reward, and may have one later: the gateway or a scorer is away.
            RolloutDataFailure: a response has no reward, and asking again would not change that.
            RouterRefusedError: a final refusal.
            ValueError: `reward_components` is set, and not every scorer was asked.
        """
        samples = samples_of_logs(message_log_batch, metadata, **self.options)
        try:
            rewards: Any = torch.tensor([sample.require() for sample in samples], dtype=torch.float32)
        except RouterUnavailableError as error:
            failure = RolloutInfraFailure if is_passing(error) else RolloutDataFailure
            raise failure(str(error)) from error
        if self.reward_components:
            rewards = {name: torch.tensor(values) for name, values in component_rewards(samples).items()}
        for sample in samples:
            for name, value in sample.metrics().items():
                self.metrics.setdefault(name, []).append(value)
        return EnvironmentReturn(
            observations=[{"role": "environment", "content": ""}] * len(samples),
            metadata=[None] * len(samples),
            next_stop_strings=[None] * len(samples),
            rewards=rewards,
            terminateds=torch.ones(len(samples), dtype=torch.bool),
            answers=[log[-1]["content"] for log in message_log_batch],
        )

    def global_post_process_and_metrics(self, batch: Any) -> tuple[Any, dict[str, float]]:
        """Return the batch as it is, and the means of what each scorer said since the last call."""
        means = {name: sum(values) / len(values) for name, values in self.metrics.items()}
        self.metrics = {}
        return batch, means


RouterEnvironment = ray.remote(Environment)
"""As NeMo RL makes its environments: an actor."""

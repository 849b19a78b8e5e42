"""NeMo RL's environment whose rewards come from the gateway.

    register_env("reward_router", "service.trainers.nemo_rl_env.RouterEnvironment")

Imports NeMo RL and ray, so it can be loaded only where NeMo RL is; called by it, which finds it by name.
"""

from typing import Any

import ray  # type: ignore[import-not-found, unused-ignore]
import torch
from nemo_rl.environments.interfaces import (  # type: ignore[import-not-found, unused-ignore]
    EnvironmentInterface,
    EnvironmentReturn,
)

from service.trainers.nemo_rl import samples_of_logs


class Environment(EnvironmentInterface):  # type: ignore[misc, unused-ignore]
    """Single turns; every episode ends with its reward.

    Args:
        config: options of the client by name, such as `url` and `run`.
    """

    def __init__(self, config: Any = None) -> None:
        self.options = dict(config or {})
        self.metrics: dict[str, list[float]] = {}

    def step(self, message_log_batch: Any, metadata: Any) -> Any:
        """Return NeMo RL's `EnvironmentReturn` of a batch.

        Raises:
            RouterUnavailableError: a response has no reward.
            RouterRefusedError: a final refusal.
        """
        samples = samples_of_logs(message_log_batch, metadata, **self.options)
        rewards = torch.tensor([sample.require() for sample in samples], dtype=torch.float32)
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

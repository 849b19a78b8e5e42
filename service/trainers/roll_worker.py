"""ROLL's reward worker whose rewards come from the gateway.

    worker_cls: service.trainers.roll_worker.RouterRewardWorker

Imports ROLL, so it can be loaded only where ROLL is; called by it, which finds it by path.
"""

from typing import Any

import torch
from roll.distributed.executor.worker import Worker  # type: ignore[import-not-found, unused-ignore]
from roll.distributed.scheduler.decorator import Dispatch, register  # type: ignore[import-not-found, unused-ignore]
from roll.distributed.scheduler.protocol import DataProto  # type: ignore[import-not-found, unused-ignore]
from roll.models.model_providers import default_tokenizer_provider  # type: ignore[import-not-found, unused-ignore]

from service.trainers.roll import samples_of_batch


class RouterRewardWorker(Worker):  # type: ignore[misc, unused-ignore]
    """Stands where ROLL's rule and judge workers do.

    Args:
        worker_config: ROLL's; its `model_args` name the policy's tokenizer.
    """

    def __init__(self, worker_config: Any) -> None:
        super().__init__(worker_config=worker_config)
        self.rank_info.dp_rank = self.rank_info.rank
        self.rank_info.dp_size = self.rank_info.world_size
        self.tokenizer = default_tokenizer_provider(model_args=self.worker_config.model_args)

    @register(dispatch_mode=Dispatch.ONE_TO_ALL)  # type: ignore[untyped-decorator, unused-ignore]
    def initialize(self, pipeline_config: Any) -> None:
        """Do nothing: there is no model to load."""

    @register(dispatch_mode=Dispatch.DP_MP_COMPUTE, clear_cache=False)  # type: ignore[untyped-decorator, unused-ignore]
    def compute_rewards(self, data: Any) -> Any:
        """Return `scores`, `response_level_rewards` and zeros as `token_level_rewards`, with means in `metrics`.

        Raises:
            RouterUnavailableError: a response has no reward.
            RouterRefusedError: a final refusal.
        """
        texts = self.tokenizer.batch_decode(data.batch["responses"], skip_special_tokens=True)
        samples = samples_of_batch(texts, data.non_tensor_batch)
        rewards = torch.tensor([sample.require() for sample in samples], dtype=torch.float32)
        output = DataProto.from_dict(
            tensors={
                "token_level_rewards": torch.zeros_like(data.batch["responses"], dtype=torch.float32),
                "response_level_rewards": rewards,
                "scores": rewards.clone(),
            }
        )
        names = {name for sample in samples for name in sample.metrics()}
        output.meta_info = {
            "metrics": {name: _mean([s.metrics().get(name) for s in samples]) for name in sorted(names)}
        }
        return output


def _mean(values: list[float | None]) -> float:
    there = [value for value in values if value is not None]
    return sum(there) / len(there)

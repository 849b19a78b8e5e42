"""NeMo RL and ROLL, each with its own code in a ray cluster of its own, against a running gateway.

`python -m tests.support.ray_scoring nemo_rl|roll --clients DIR` prints one JSON line of what the framework got; the
gateway is named by the environment, as for the helpers. DIR is filled by `make trainer-sources` and, for ray and what
else they share, by `make trainer-clients`. What generates is scripted. Modules that generate, train or collect spans
are stubs.
"""

from __future__ import annotations

import argparse
import asyncio
import importlib
import itertools
import json
import os
import secrets
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from tests.conftest import free_port
from tests.support import stubs
from tests.support.trainer_clients import page_block

RESPONSES = ["a b", "c d e f", "g"]
REFUSED = "x" * 50
"""A response that the RM of the tests gives no reward."""
ASKED = {"role": "user", "content": "Say something."}

UNUSED = {
    "nemo_rl": (
        "nemo_rl.environments.nemo_gym",
        "nemo_rl.models.generation.trtllm",
        "nemo_rl.models.generation.vllm",
        "nemo_rl.models.policy",
        "nemo_rl.utils.logger",
        "wandb",
    ),
    "roll": ("opentelemetry.exporter.otlp.proto.grpc", "roll.utils.otel_receiver", "transfer_queue"),
}


def start() -> Any:
    """Return ray, with a cluster of two CPUs that knows our modules and the framework's."""
    import ray  # type: ignore[import-not-found, unused-ignore]

    ray.init(
        num_cpus=2,
        include_dashboard=False,
        log_to_driver=False,
        object_store_memory=80 * 1024**2,
        runtime_env={"worker_process_setup_hook": "stubs.prepare"},
    )
    return ray


def nemo_rl() -> Any:
    """`create_env` on our environment by name, its actor asked by `calculate_rewards`, as a rollout does."""
    ray = start()
    import torch
    from nemo_rl.distributed.batched_data_dict import BatchedDataDict  # type: ignore[import-not-found, unused-ignore]
    from nemo_rl.environments.utils import create_env  # type: ignore[import-not-found, unused-ignore]
    from nemo_rl.experience.failures import classify_rollout_failure  # type: ignore[import-not-found, unused-ignore]
    from nemo_rl.experience.rollouts import calculate_rewards  # type: ignore[import-not-found, unused-ignore]

    page = page_block("nemo-gym.md", "register_env")
    named: dict[str, Any] = {}
    exec(page.replace("http://127.0.0.1:8080", os.environ["REWARD_ROUTER_CLIENT_URL"]), named)
    environment = named["env"]
    apart = create_env("reward_router", {"policy": "majority", "reward_components": True})

    def batch(responses: list[str]) -> Any:
        tokens = torch.zeros(1, dtype=torch.long)
        said = [{"role": "assistant", "content": text, "token_ids": tokens} for text in responses]
        logs = [[{**ASKED, "token_ids": tokens}, one] for one in said]
        names, truths = ["math"] * len(logs), [{"ground_truth": "c d e f"}] * len(logs)
        return BatchedDataDict({"message_log": logs, "task_name": names, "extra_env_info": truths})

    def failure(responses: list[str], env: Any) -> Any:
        try:
            return calculate_rewards(batch(responses), {"math": env}).rewards.tolist()
        except ray.exceptions.RayTaskError as error:
            return classify_rollout_failure(error).value, str(error)

    found = calculate_rewards(batch(RESPONSES), {"math": environment})
    _, means = ray.get(environment.global_post_process_and_metrics.remote({}))
    components = calculate_rewards(batch(RESPONSES), {"math": apart}).rewards
    nobody = create_env("reward_router", {"url": f"http://127.0.0.1:{free_port()}", "deadline_seconds": 0.3})
    return {
        "rewards": found.rewards.tolist(),
        "ended": found.terminateds.tolist(),
        "means": means,
        "components": {name: values.tolist() for name, values in components.items()},
        "refused": failure([*RESPONSES, REFUSED], environment),
        "away": failure(RESPONSES, nobody),
    }


async def roll(folder: Path) -> Any:
    """A `Cluster` of our worker by path, asked by `RewardScheduler`; then prompts through `RolloutContext`."""
    start()
    import numpy as np
    import torch
    from roll.distributed.executor.cluster import Cluster  # type: ignore[import-not-found, unused-ignore]
    from roll.distributed.scheduler.protocol import DataProto  # type: ignore[import-not-found, unused-ignore]
    from roll.distributed.scheduler.resource_manager import (  # type: ignore[import-not-found, unused-ignore]
        ResourceManager,
    )
    from roll.distributed.scheduler.reward_scheduler import (  # type: ignore[import-not-found, unused-ignore]
        RewardScheduler,
    )
    from roll.models.model_providers import (  # type: ignore[import-not-found, unused-ignore]
        default_tokenizer_provider,
    )
    from roll.pipeline.rlvr.rlvr_config import RewardConfig  # type: ignore[import-not-found, unused-ignore]

    from tests.support.trainer_processes import save_chatml_tokenizer

    save_chatml_tokenizer(folder)
    config = RewardConfig(world_size=1, worker_cls="service.trainers.roll_worker.RouterRewardWorker")
    config.model_args.model_name_or_path = str(folder)
    tokenizer = default_tokenizer_provider(config.model_args)
    cluster = Cluster(
        name="router", worker_cls=config.worker_cls, resource_manager=ResourceManager(0, 1), worker_config=config
    )
    cluster.initialize(pipeline_config=SimpleNamespace())

    def rows(responses: list[str]) -> Any:
        ids = [tokenizer(text)["input_ids"] for text in responses]
        padded = [row + [tokenizer.pad_token_id] * (60 - len(row)) for row in ids]
        columns = {"messages": [[ASKED]] * len(ids), "domain": ["chat"] * len(ids), "ground_truth": ["c"] * len(ids)}
        arrays = {name: np.empty(len(ids), dtype=object) for name in columns}
        for name, values in columns.items():
            for index, value in enumerate(values):
                arrays[name][index] = value
        return DataProto.from_dict({"responses": torch.tensor(padded)}, non_tensors=arrays)

    found = await RewardScheduler().compute_rewards(rows(RESPONSES), {"chat": cluster}, config)
    prompts = Prompts(cluster, tokenizer, config)
    return {
        "rewards": found.batch["response_level_rewards"].tolist(),
        "metrics": (await cluster.workers[0].compute_rewards.remote(rows(RESPONSES))).meta_info["metrics"],
        "prompts": [await prompts.outcome(said) for said in (RESPONSES, ["a", REFUSED])],
        "validated": await prompts.outcome(["a", REFUSED], validating=True),
    }


class Prompts:
    """Prompts through ROLL's `RolloutContext` and our rollout loop by path; the policy says what it is told.

    Args:
        cluster: of reward workers.
        tokenizer: of the policy.
        config: of the reward.
    """

    def __init__(self, cluster: Any, tokenizer: Any, config: Any) -> None:
        self._cluster, self._tokenizer, self._config = cluster, tokenizer, config

    async def outcome(self, said: list[str], validating: bool = False) -> Any:
        """Return the rewards that ROLL commits for a prompt; "aborted" where it gives it up; and its error."""
        import numpy as np
        import ray  # type: ignore[import-not-found, unused-ignore]
        import torch
        from roll.distributed.scheduler import generate_scheduler as own  # type: ignore[import-not-found, unused-ignore]
        from roll.utils.import_utils import safe_import_class  # type: ignore[import-not-found, unused-ignore]

        done: list[Any] = []
        asked = torch.tensor([self._tokenizer(ASKED["content"])["input_ids"]])
        tensors = {"input_ids": asked, "attention_mask": torch.ones_like(asked)}
        messages, truths = np.empty(1, dtype=object), np.empty(1, dtype=object)
        messages[0], truths[0] = [ASKED], "c"
        domains = np.array(["chat"], dtype=object)
        columns = {"messages": messages, "ground_truth": truths, "domain": domains}

        async def begin(prompt_id: int) -> int:
            return 0

        def commit(prompt_id: int, items: list[Any]) -> None:
            done.append([one.data.batch["response_level_rewards"].item() for one in items])

        async def generate_request(req: Any, request_id: Any, uid: Any) -> Any:
            ids = [self._tokenizer(text)["input_ids"] for text in said]
            ends = {"eos_token_id": self._tokenizer.eos_token_id, "pad_token_id": self._tokenizer.pad_token_id}
            return own.DataProto(meta_info={"finish_reasons": ["stop"] * len(ids), "output_token_ids": ids, **ends})

        pipeline = SimpleNamespace(
            prompt_length=asked.shape[1], is_num_return_sequences_expand=False, rewards={"chat": self._config}
        )
        buffer = SimpleNamespace(begin=begin, commit=commit, abort=lambda prompt_id: done.append("aborted"))
        scheduler = SimpleNamespace(
            udrl=safe_import_class("service.trainers.roll_rollout.RouterRolloutLoop")(),
            meta_info={"generation_config": {"num_return_sequences": len(said)}},
            pipeline_config=pipeline,
            sequence_length=asked.shape[1] + 60,
            is_val=validating,
            get_next_dataset_item=dict,
            get_data_item_kwargs={},
            collect_fn=lambda items: {**tensors, "position_ids": torch.arange(asked.shape[1])[None], **columns},
            next_request_id=lambda: "r",
            router_client=SimpleNamespace(generate_request=generate_request),
            replay_buffer=buffer,
            running_tasks={},
            reward_timer={"default": own.DurationTracker()},
            generate_timer={"default": own.DurationTracker()},
            reward_worker_iters={"default": itertools.cycle(self._cluster.workers)},
        )
        pipeline.rewards["default"] = self._config
        try:
            await own.RolloutContext.process_new_prompt(scheduler, 1)
        except asyncio.CancelledError:
            pass
        except ray.exceptions.RayTaskError as error:
            done.append(type(error.cause).__name__)
        return done


def main() -> None:
    """Run one framework, and print what it got."""
    parser = argparse.ArgumentParser()
    parser.add_argument("framework", choices=sorted(UNUSED))
    parser.add_argument("--clients", required=True, type=Path)
    parser.add_argument("--folder", required=True, type=Path)
    given = parser.parse_args()
    paths = [str(given.clients / given.framework), str(given.clients / "verl")]
    sys.path += paths
    # The folder of `stubs`: a package of verl's is called `tests` too, and would be found in the place of ours.
    known = [str(Path.cwd()), *paths, str(Path(__file__).parent)]
    os.environ |= {"PYTHONPATH": os.pathsep.join(known), stubs.VARIABLE: " ".join(UNUSED[given.framework])}
    os.environ |= {"ROLL_LOG_DIR": str(given.folder / "logs"), "RAY_AUTH_TOKEN": secrets.token_hex(32)}
    # Both look for the version of what is a stub from here on.
    for name in ("accelerate", "transformers"):
        importlib.import_module(name)
    stubs.prepare()
    found = nemo_rl() if given.framework == "nemo_rl" else asyncio.run(roll(given.folder))
    sys.stdout.write("\nRESULT " + json.dumps(found) + "\n")


if __name__ == "__main__":
    main()

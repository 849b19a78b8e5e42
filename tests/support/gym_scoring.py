"""verifiers, SkyRL, Atropos and NeMo Gym, each with its own code, against a running gateway, in a process of its own.

`python -m tests.support.gym_scoring --clients DIR verifiers|skyrl|atropos|nemo_gym` prints one JSON line of what the
framework got; the gateway is named by the environment, as for the helpers. DIR is filled by `make trainer-clients`.
What generates is scripted. Packages that verifiers imports for remote sandboxes only are stubs.
"""

from __future__ import annotations

import argparse
import asyncio
import importlib
import json
import os
import sys
import tempfile
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import typing_extensions

from tests.conftest import free_port
from tests.support.stubs import Stubs

APP = """
from service.trainers.nemo_gym_server import RouterResourcesServer

RouterResourcesServer.run_webserver()
"""
"""NeMo Gym's `app.py`, as on its page."""

RESPONSES = ["a b", "c d e f", "g"]
REFUSED = "x" * 50
"""A response that the RM of the tests gives no reward."""
PROMPT = [{"role": "user", "content": "Say something."}]
UNUSED_BY_SKYRL = (
    "cloudpathlib",
    "loguru",
    "skyrl.backends.backend",
    "skyrl.train.generators.skyrl_vlm_generator",
)
REMOTE = ("prime_runs", "prime_sandboxes", "prime_tunnel")
"""Packages for remote sandboxes."""


async def verifiers() -> Any:
    """`Task.score` with the plugged function, and a group in the `finalize` of an environment."""
    sys.meta_path.insert(0, Stubs(REMOTE))
    import verifiers.v1 as vf
    from verifiers.v1.graph import MessageNode

    from service.trainers.verifiers import score_group

    class Question(vf.TaskData):
        answer: str = "c d e f"

    config = vf.TaskConfig(rewards={"router": {"fn": "service.trainers.verifiers:reward", "weight": 0.5}})
    task = vf.Task(Question(idx=0, prompt="Say something."), config)

    def trace(response: str) -> Any:
        said = [vf.UserMessage(content="Say something."), vf.AssistantMessage(content=response)]
        nodes = [MessageNode(message=one, parent=index - 1 if index else None) for index, one in enumerate(said)]
        seat = vf.AgentInfo(config=vf.AgentConfig())
        return vf.Trace(task=vf.TraceTask(type="Task", data=task.data), agent=seat, nodes=nodes)

    singles = [trace(response) for response in RESPONSES]
    try:
        await asyncio.gather(*(task.score(one) for one in singles))
    except vf.TaskError as error:
        return {"error": repr(error), "rewards": [dict(one.rewards) for one in singles]}
    group = [trace(response) for response in RESPONSES]
    await score_group(task.data, group)
    partial = [trace(response) for response in (*RESPONSES, REFUSED)]
    await score_group(task.data, partial)
    return {
        "partial": [one.rewards["router"].score if one.rewards else None for one in partial],
        "failed": [[error.type for error in one.errors] for one in partial],
        "rewards": [one.reward for one in singles],
        "metrics": [one.metrics for one in singles],
        "group": [one.rewards["router"].score for one in group],
        "decisions": [one.info["reward_router"]["decision_id"] for one in group],
    }


async def skyrl() -> Any:
    """`skyrl_gym.make` on our class of `BaseTextEnv` by path, a single turn and two turns."""
    import skyrl_gym
    from skyrl_gym.envs.registration import make, register

    from service.trainers.skyrl_env import RouterEnv

    class Asking(RouterEnv):
        def observe(self, action: str) -> list[dict[str, str]]:
            return [{"role": "user", "content": "And?"}]

    register(id="reward_router", entry_point="service.trainers.skyrl_env:RouterEnv")
    register(id="asking", entry_point=Asking)

    def episode(name: str, turns: Sequence[str]) -> tuple[list[Any], Any]:
        env = make(name, extras={"reward_spec": {"ground_truth": "c d e f"}, "max_turns": len(turns)})
        assert isinstance(env, skyrl_gym.Env)
        env.init(PROMPT)
        return [env.step(turn) for turn in turns], env.get_metrics()

    generated = await skyrl_generated("asking")
    found = [await asyncio.to_thread(episode, "reward_router", [response]) for response in RESPONSES]
    turns, _ = await asyncio.to_thread(episode, "asking", ["a b", "c"])
    return {
        "rewards": [steps[-1]["reward"] for steps, _ in found],
        "metrics": [metrics for _, metrics in found],
        "turns": [[step["reward"], step["done"]] for step in turns],
        "generated": generated,
    }


async def skyrl_generated(env_class: str) -> Any:
    """Return the rewards and components of two turns by SkyRL's own `SkyRLGymGenerator`; its engine is scripted."""
    # SkyRL's configuration is for Python 3.12, and so is the standard library's type that it is made of.
    typing.TypedDict = typing_extensions.TypedDict  # type: ignore[assignment]
    for name in ("accelerate", "transformers"):
        importlib.import_module(name)
    sys.meta_path.insert(0, Stubs(UNUSED_BY_SKYRL))
    from skyrl.train.config import (  # type: ignore[import-not-found, unused-ignore]
        GeneratorConfig,
        SkyRLGymConfig,
    )
    from skyrl.train.generators.skyrl_gym_generator import (  # type: ignore[import-not-found, unused-ignore]
        SkyRLGymGenerator,
    )
    from transformers import AutoTokenizer

    from tests.support.trainer_processes import save_chatml_tokenizer

    with tempfile.TemporaryDirectory() as folder:
        save_chatml_tokenizer(Path(folder))
        tokenizer = AutoTokenizer.from_pretrained(folder)

    class Engine:
        """Says one turn after the other."""

        model_name = "policy"

        async def generate(self, input_batch: Any, model: str | None = None, **_: Any) -> Any:
            [ids] = input_batch["prompt_token_ids"]
            said = "c" if "And?" in tokenizer.decode(ids) else "a b"
            tokens = [*tokenizer(said)["input_ids"], tokenizer.eos_token_id]
            nothing = ("response_logprobs", "prompt_logprobs", "rollout_expert_indices", "rollout_sample_support")
            return {
                "responses": [said],
                "response_ids": [tokens],
                "stop_reasons": ["stop"],
                **dict.fromkeys(nothing),
            }

        async def finish_session(self, session_id: str) -> None:
            """Do nothing."""

    config = GeneratorConfig(max_turns=2, max_input_length=4096, use_cache_salt=False)
    generator = SkyRLGymGenerator(config, SkyRLGymConfig(max_env_workers=1), Engine(), tokenizer)
    batch = {
        "prompts": [PROMPT],
        "env_classes": [env_class],
        "env_extras": [{"reward_spec": {"ground_truth": "c d e f"}}],
        "sampling_params": None,
        "trajectory_ids": None,
        "batch_metadata": None,
    }
    found = await generator.generate(batch)
    return {
        "rewards": found["rewards"],
        "metrics": {name: value for name, value in found["rollout_metrics"].items() if "router" in name},
    }


async def atropos() -> Any:
    """`BaseEnv.handle_env`, of an environment that scores its group through us; what it would send to the trainer."""
    from collections import deque
    from types import SimpleNamespace

    from atroposlib.envs.base import BaseEnv, ScoredDataGroup

    from service.trainers.atropos import score_group

    class Environment(BaseEnv):  # type: ignore[misc, unused-ignore]
        async def collect_trajectories(self, item: Any) -> Any:
            group = ScoredDataGroup(tokens=[], masks=[], scores=[], messages=[])
            for index, response in enumerate(RESPONSES):
                group["tokens"].append([index, 1])
                group["masks"].append([-100, 1])
                group["messages"].append([*PROMPT, {"role": "assistant", "content": response}])
            return await score_group(group, reference=item), []

        async def get_next_item(self) -> Any:
            return None

        async def evaluate(self, *_: Any, **__: Any) -> None:
            return None

        async def handle_send_to_api(self, scored_data: Any, item: Any = None, **_: Any) -> None:
            self.sent.append(scored_data)

        async def cleanup(self) -> None:
            return None

    environment = Environment.__new__(Environment)
    environment.sent = []
    environment.running_items = {"u": {"item": "c d e f"}}
    environment.backlog, environment.config = [], SimpleNamespace(group_size=len(RESPONSES))
    for name in ("task_duration", "succeeded_task_duration", "failed_task_duration", "task_successful"):
        setattr(environment, name, deque())
    await environment.handle_env("u")
    return {"scores": [group["scores"] for group in environment.sent], "successful": list(environment.task_successful)}


async def nemo_gym() -> Any:
    """NeMo Gym's head server, two servers of ours as processes of their own, and its own client that asks them.

    One judges singles, the other cohorts. Each runs the page's `app.py` as NeMo Gym starts it: `run_webserver` of a
    `SimpleResourcesServer`, told its configuration by NeMo Gym's environment variables.
    """
    import nemo_gym.server_utils as http
    from omegaconf import OmegaConf

    def body(response: str, **words: Any) -> dict[str, Any]:
        message = {
            "id": "m",
            "type": "message",
            "role": "assistant",
            "status": "completed",
            "content": [{"type": "output_text", "text": response, "annotations": []}],
        }
        answer = {"id": "r", "created_at": 0, "model": "policy", "object": "response", "output": [message]}
        more = {"parallel_tool_calls": False, "tool_choice": "auto", "tools": []}
        return {"responses_create_params": {"input": PROMPT}, "response": {**answer, **more}, **words}

    keys = ("reward", "reward_components", "mask_sample", "failure_kind", "failure_reason", "decision_id")

    async def ask(client: Any, name: str, path: str, document: Any) -> Any:
        response = await client.post(server_name=name, url_path=path, json=document)
        return await response.json()

    async def verify(client: Any, name: str, bodies: list[Any]) -> list[Any]:
        found = await asyncio.gather(*(ask(client, name, "/verify", one) for one in bodies))
        return [{key: one.get(key) for key in keys} for one in found]

    async def asked(children: Sequence[asyncio.subprocess.Process]) -> Any:
        http.HeadServer.run_webserver()
        head = http.ServerClient.load_head_server_config()
        del os.environ["NEMO_GYM_CONFIG_DICT"]  # The client asks the head server for the configuration, as a trainer's.
        probe = http.ServerClient(head_server_config=head, global_config_dict=http.get_global_config_dict())
        for name in ("head_server", "single", "cohort"):
            while probe.poll_for_status(name) != "success":
                assert all(child.returncode is None for child in children), "a server ended"
                await asyncio.sleep(0.1)
        client = http.ServerClient.load_from_global_config(head)
        http.set_global_aiohttp_client(http.GlobalAIOHTTPAsyncClientConfig())
        answers = [body(response, expected_answer="c d e f") for response in RESPONSES]
        group = [body(text, _ng_task_index=7, _ng_rollout_index=index) for index, text in enumerate(RESPONSES)]
        lonely = [body("a b", _ng_task_index=8, _ng_rollout_index=0)]
        compared = {"conversation_history": PROMPT, "response_objs": [one["response"] for one in answers]}
        return {
            "single": await verify(client, "single", answers),
            "cohort": await verify(client, "cohort", group),
            "incomplete": await verify(client, "cohort", lonely),
            "compare": await ask(client, "single", "/compare", compared),
        }

    def server(size: int, seconds: float) -> dict[str, Any]:
        cohort = {"num_rollouts_per_prompt": size, "cohort_seconds": seconds}
        inner = {"host": "127.0.0.1", "port": free_port(), "entrypoint": "app.py", "domain": "other", **cohort}
        return {"resources_servers": {"router": inner}}

    head = {"host": "127.0.0.1", "port": free_port()}
    config = {"head_server": head, "dry_run": False, "single": server(1, 10), "cohort": server(3, 0.5)}
    os.environ["NEMO_GYM_CONFIG_DICT"] = OmegaConf.to_yaml(OmegaConf.create(config))
    app = f"import sys; sys.path.append({sys.path[-1]!r})\n{APP}"
    children = [
        await asyncio.create_subprocess_exec(
            sys.executable, "-c", app, env={**os.environ, "NEMO_GYM_CONFIG_PATH": name}, stdout=sys.stderr
        )
        for name in ("single", "cohort")
    ]
    try:
        return await asked(children)
    finally:
        for child in children:
            child.terminate()
        for child in children:
            await child.wait()


FRAMEWORKS = {"verifiers": verifiers, "skyrl": skyrl, "atropos": atropos, "nemo_gym": nemo_gym}


def main() -> None:
    """Run one framework, and print what it got."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--clients", required=True)
    parser.add_argument("framework", choices=sorted(FRAMEWORKS))
    given = parser.parse_args()
    sys.path.append(given.clients)
    sys.stdout.write("RESULT " + json.dumps(asyncio.run(FRAMEWORKS[given.framework]()), default=str) + "\n")


if __name__ == "__main__":
    main()

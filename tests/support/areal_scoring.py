"""AReaL's own workflow on a tiny tokenizer against a running gateway, in a process of its own.

`python -m tests.support.areal_scoring --clients DIR --model DIR` prints one JSON line; the gateway is named by the
environment, as for the function. DIR is filled by `make trainer-wheels`. What runs is AReaL's `RLVRWorkflow`, its
`MultiTurnWorkflow` as our page extends it, its `AsyncRewardWrapper` with its pool of processes, and its statistics;
what generates is scripted, and the trajectories are not trained on. AReaL's top packages, which import schedulers and
launchers for GPU clusters, are stubs, and so are its name service (it imports ray) and its packing of batches (it
imports numba).
"""

from __future__ import annotations

import argparse
import asyncio
import importlib
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

from tests.support.trainer_clients import Anything, page_block

PROMPTS = ["a b c", "d e f", "g h i"]
RESPONSES = ["a b", "c d e f", "g"]
WAYS = {
    "function": ("areal.workflow.rlvr.RLVRWorkflow", {"reward_fn": "service.trainers.areal.reward_fn"}),
    "workflow": ("service.trainers.areal_workflow.RouterWorkflow", {}),
    "turns": ("__main__.RouterTurns", {"max_turns": 2, "turn_discount": 0.5}),
}
UNUSED = ("areal.utils.name_resolve", "areal.utils.seqpack")


def prepare(clients: Path) -> None:
    """Let AReaL's modules be imported one by one."""
    sys.path.append(str(clients))
    for name in ("areal", "areal.infra"):
        stub = ModuleType(name)
        stub.__path__ = [str(clients.joinpath(*name.split(".")))]
        sys.modules[name] = stub
    for name in UNUSED:
        sys.modules[name] = Anything(name)
    context = importlib.import_module("areal.infra.workflow_context")
    sys.modules["areal"].workflow_context = context  # type: ignore[attr-defined]


class Engine:
    """Generates what it is told, in AReaL's words."""

    def __init__(self, tokenizer: Any, said: dict[str, str]) -> None:
        self._tokenizer = tokenizer
        self._said = said

    async def agenerate(self, request: Any) -> Any:
        """The response to the prompt that these ids mean."""
        from areal.api import ModelResponse

        prompt = self._tokenizer.decode(request.input_ids)
        [response] = [said for asked, said in self._said.items() if asked in prompt]
        ids = self._tokenizer(response)["input_ids"]
        return ModelResponse(
            input_tokens=list(request.input_ids),
            output_tokens=ids,
            output_logprobs=[0.0] * len(ids),
            output_versions=[0] * len(ids),
        )


async def episodes(way: str, model: str, column: str) -> dict[str, Any]:
    """Each prompt's reward, and what AReaL logs of them.

    Args:
        way: `function`, AReaL's workflow with ours by name; `workflow`, ours; `turns`, AReaL's of several turns with
            `RouterRewards` before it.
        model: folder of the tokenizer.
        column: in which the data set has the conversations; ours reads `messages`, else it takes the prompt's template
            apart.

    The workflow of several turns knows its column by itself, and asks again where a reward is 0.
    """
    from areal.api.cli_args import GenerationHyperparameters
    from areal.utils import stats_tracker
    from areal.utils.dynamic_import import import_from_string
    from areal.utils.hf_utils import load_hf_tokenizer

    if way == "turns":
        exec(page_block("areal.md", "class RouterTurns"), globals())
    path, given = WAYS[way]
    words = {"tokenizer": load_hf_tokenizer(model)} if way == "turns" else {"tokenizer": model}
    if way != "turns":
        words["data_extract_prompt_fn"] = lambda row: row[column]
    workflow = import_from_string(path)(gconfig=GenerationHyperparameters(), **words, **given)
    engine = Engine(workflow.tokenizer, dict(zip(PROMPTS, RESPONSES, strict=True)))
    rows = [{column: [{"role": "user", "content": prompt}], "answer": "x"} for prompt in PROMPTS]
    found = await asyncio.gather(*(workflow.arun_episode(engine, row) for row in rows), return_exceptions=True)
    logged = stats_tracker.get("rollout").export()
    return {"rewards": [outcome(each) for each in found], "logged": logged}


async def queue() -> dict[str, Any]:
    """What becomes of samples that wait in AReaL's pool of processes, which is as small here as it may be there."""
    from areal.api import AsyncRewardWrapper

    from service.trainers.areal import reward_fn

    wrapped = AsyncRewardWrapper(reward_fn, timeout_seconds=1, max_workers=1, max_retries=0)
    calls = [wrapped(prompt, response, [], []) for prompt, response in zip(PROMPTS, RESPONSES, strict=True)]
    return {"rewards": [outcome(each) for each in await asyncio.gather(*calls, return_exceptions=True)]}


def outcome(found: Any) -> Any:
    """The reward of a trajectory or a sample, or the name of the error."""
    if isinstance(found, BaseException):
        return type(found).__name__
    return found["rewards"].item() if isinstance(found, dict) else found


def main() -> None:
    """Score the samples, and print what AReaL got."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--clients", required=True, type=Path)
    parser.add_argument("--way", choices=[*WAYS, "queue"], default="function")
    parser.add_argument("--model", default="")
    parser.add_argument("--column", default="messages")
    given = parser.parse_args()
    prepare(given.clients)
    found = asyncio.run(queue() if given.way == "queue" else episodes(given.way, given.model, given.column))
    sys.stdout.write("RESULT " + json.dumps(found) + "\n")


if __name__ == "__main__":
    main()

"""verl's own reward loop on a tiny tokenizer against a running gateway, in a process of its own.

`python -m tests.support.verl_scoring --clients DIR --model DIR OVERRIDE...` prints one JSON line; an override is one of
verl's command line, `reward.custom_reward_function.name=compute_score`. DIR is filled by `make trainer-clients`. What
runs is verl's `RewardLoopWorker.compute_score_batch` on a `DataProto`, with the reward function or manager loaded from
the configuration as verl loads it; no ray cluster is started.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
from typing import Any

PROMPTS = ["a b c", "d e f", "g h i"]
RESPONSES = ["a b", "c d e f", "g"]


def configuration(model: str, overrides: list[str]) -> Any:
    """verl's defaults, as far as the reward loop reads them, and what its command line adds."""
    from omegaconf import OmegaConf

    defaults = {
        "actor_rollout_ref": {"model": {"tokenizer_path": model, "path": model}},
        "reward": {
            "reward_model": {"enable": False},
            "custom_reward_function": {"path": None, "name": "compute_score"},
            "sandbox_fusion": {"url": None},
            "reward_manager": {"source": "register", "name": "naive", "module": {"path": None}},
        },
    }
    given = OmegaConf.from_dotlist([override.lstrip("+") for override in overrides])
    return OmegaConf.merge(OmegaConf.create(defaults), given)


def batch(tokenizer: Any, prompt_in_extra_info: bool) -> Any:
    """Three samples, padded as verl pads them; `raw_prompt` is always there, as in verl."""
    import numpy
    import torch
    from verl import DataProto

    prompts = tokenizer(PROMPTS, return_tensors="pt", padding=True)
    responses = tokenizer(RESPONSES, return_tensors="pt", padding=True, padding_side="right")
    raw = numpy.empty(len(PROMPTS), dtype=object)
    raw[:] = [[{"role": "user", "content": prompt}] for prompt in PROMPTS]
    return DataProto.from_dict(
        tensors={
            "prompts": prompts["input_ids"],
            "responses": responses["input_ids"],
            "attention_mask": torch.cat([prompts["attention_mask"], responses["attention_mask"]], dim=1),
        },
        non_tensors={
            "data_source": numpy.array(["toy"] * len(PROMPTS), dtype=object),
            "reward_model": numpy.array([{"ground_truth": "x"}] * len(PROMPTS), dtype=object),
            "raw_prompt": raw,
            "extra_info": numpy.array(
                [{"prompt": prompt} if prompt_in_extra_info else {} for prompt in PROMPTS], dtype=object
            ),
        },
    )


def main() -> None:
    """Score the batch, and print what verl got."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--clients", required=True)
    parser.add_argument("--model", required=True)
    parser.add_argument("overrides", nargs="+")
    given = parser.parse_args()
    sys.path.append(given.clients)
    from verl.experimental.reward_loop.reward_loop import RewardLoopWorker

    async def score() -> tuple[list[dict[str, Any]], list[list[float]]]:
        worker = RewardLoopWorker(configuration(given.model, given.overrides))
        function = worker.config.reward.custom_reward_function.path is not None
        data = batch(worker.input_tokenizer, prompt_in_extra_info=function)
        outputs = await worker.compute_score_batch(data)
        scores = [output["reward_score"] for output in outputs]
        return outputs, type(worker.reward_manager).assemble_rm_scores(data, scores).tolist()

    outputs, placed = asyncio.run(score())
    sys.stdout.write("RESULT " + json.dumps({"outputs": outputs, "placed": placed}) + "\n")


if __name__ == "__main__":
    main()

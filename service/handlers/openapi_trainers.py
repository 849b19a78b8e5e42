"""OpenAPI of the routes of RLHF trainers; `handlers.openapi` merges it into the document."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from service.trainers.llamafactory import LlamaFactoryReply, LlamaFactoryRequest
from service.trainers.openrlhf import OpenRlhfReply, OpenRlhfRequest
from service.trainers.slime import SlimeRequest

TYPES: tuple[type, ...] = (OpenRlhfRequest, OpenRlhfReply, LlamaFactoryRequest, LlamaFactoryReply, SlimeRequest)
"""Structs that the routes refer to."""

_QUERY: dict[str, tuple[dict[str, Any], str]] = {
    "run": ({"type": "string"}, "The training run; by default the gateway's."),
    "policy": ({"type": "string"}, "Overrides the gateway's policy."),
    "normalize": ({"type": "boolean"}, "Rewards on the scale of their RM."),
    "text": (
        {"type": "string", "enum": ["auto", "raw"], "default": "auto"},
        "auto: texts of known chat templates are taken apart; raw: every text is scored as it came.",
    ),
}
_REWARD_KEY = ({"type": "string"}, "Answer an object with the reward under this key (slime's --reward-key).")

_NO_REWARD = "No reward for one of the samples (null is no word of this protocol). May be retried."
_SLIME_REPLY = {"oneOf": [{"type": "number"}, {"type": "object", "description": "With `reward_key`."}]}


def trainer_paths(
    post: Callable[..., dict[str, Any]], errors: Mapping[str, str], feedback_errors: Mapping[str, str]
) -> dict[str, Any]:
    """The paths.

    Args:
        post: builds one operation, see `handlers.openapi`.
        errors: description by status.
        feedback_errors: the same of feedback.
    """
    examples: dict[str, tuple[str, str, str, Any]] = {
        "/get_reward": (
            "OpenRLHF",
            "OpenRlhfRequest",
            "OpenRlhfReply",
            {"query": ["What is 7 + 5? 12"], "prompts": ["What is 7 + 5?"], "labels": ["12"]},
        ),
        "/v1/score/evaluation": (
            "LLaMA-Factory",
            "LlamaFactoryRequest",
            "LlamaFactoryReply",
            {"model": "model", "messages": ["<|im_start|>user\nWhat is 7 + 5?<|im_end|>\n<|im_start|>assistant\n12"]},
        ),
        "/remote_rm": ("slime", "SlimeRequest", "", {"prompt": "What is 7 + 5?", "response": "12", "label": "12"}),
    }
    paths: dict[str, Any] = {}
    for path, (trainer, request, reply, example) in examples.items():
        single = path == "/remote_rm"
        paths[path] = post(
            tag="trainers",
            summary=f"Rewards for {trainer}",
            description=f"What {trainer} sends to its reward server, as it is; see docs/trainers.",
            request=request,
            reply=reply or "RewardReply",
            example=example,
            errors={**errors, "404": "Unknown policy.", "503": _NO_REWARD},
        )
        paths[path + "/feedback"] = post(
            tag="trainers",
            summary=f"Feedback on what {trainer} had scored",
            description="The same body and a value per sample: `reward`, `loss` or `preferred`, as the run learns.",
            request=request,
            reply="FeedbackReply" if single else "FeedbackBatchReply",
            example={**example, "reward": 0.5 if single else [0.5]},
            errors=dict(feedback_errors if single else {**errors, "404": "Unknown run."}),
        )
        for name in (path, path + "/feedback"):
            paths[name]["post"]["parameters"] = _parameters(with_key=name == "/remote_rm")
    content = paths["/remote_rm"]["post"]["responses"]["200"]["content"]
    content["application/json"]["schema"] = _SLIME_REPLY
    return paths


def _parameters(*, with_key: bool) -> list[dict[str, Any]]:
    query = {**_QUERY, "reward_key": _REWARD_KEY} if with_key else _QUERY
    return [
        {"name": name, "in": "query", "required": False, "schema": schema, "description": text}
        for name, (schema, text) in query.items()
    ]

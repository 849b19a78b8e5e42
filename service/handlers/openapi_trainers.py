"""OpenAPI of the routes of RLHF trainers; `handlers.openapi` merges it into the document."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from service.schemas import RUN_SHAPE, SampleValue, SampleValues
from service.trainers.protocols import PROTOCOLS
from service.trainers.shim import UrlProtocol

TYPES: tuple[type, ...] = (
    SampleValue,
    SampleValues,
    *(kind for protocol in PROTOCOLS for kind in (protocol.request, protocol.reply) if kind is not None),
)
"""Structs that the routes refer to."""

_QUERY: dict[str, tuple[dict[str, Any], str]] = {
    "run": ({"type": "string", "minLength": 1, "pattern": RUN_SHAPE}, "The training run; by default the gateway's."),
    "policy": ({"type": "string", "minLength": 1}, "Overrides the gateway's policy."),
    "normalize": ({"type": "boolean"}, "Rewards on the scale of their RM."),
    "text": (
        {"type": "string", "enum": ["auto", "raw"], "default": "auto"},
        "auto: texts of known chat templates are taken apart; raw: every text is scored as it came.",
    ),
}
_NO_REWARD = "No reward for one of the samples (null is no word of this protocol). May be retried."


def trainer_paths(
    post: Callable[..., dict[str, Any]],
    ref: Callable[[str], dict[str, str]],
    errors: Mapping[str, str],
    feedback_errors: Mapping[str, str],
) -> dict[str, Any]:
    """The paths.

    Args:
        post: builds one operation, see `handlers.openapi`.
        ref: refers to a schema by name.
        errors: description by status.
        feedback_errors: the same of feedback.
    """
    paths: dict[str, Any] = {}
    for protocol in PROTOCOLS:
        path, trainer = protocol.path, protocol.trainer
        parameters = _parameters(protocol)
        rewards = post(
            tag="trainers",
            summary=f"Rewards for {trainer}",
            description=f"What {trainer} sends to its reward server, as it is; see docs/trainers.",
            request=protocol.request.__name__,
            reply="RewardReply" if protocol.reply is None else protocol.reply.__name__,
            example=protocol.example,
            errors={**errors, "404": "Unknown policy.", "503": _NO_REWARD},
        )
        feedback = post(
            tag="trainers",
            summary=f"Feedback on what {trainer} had scored",
            description="The same body and a value per sample: `reward`, `loss` or `preferred`, as the run learns.",
            request=protocol.request.__name__,
            reply="FeedbackReply" if protocol.single else "FeedbackBatchReply",
            example={**protocol.example, "reward": 0.5 if protocol.single else [0.5]},
            errors=dict(feedback_errors if protocol.single else {**errors, "404": "Unknown run."}),
        )
        values = SampleValue if protocol.single else SampleValues
        feedback["post"]["requestBody"]["content"]["application/json"]["schema"] = {
            "allOf": [ref(protocol.request.__name__), ref(values.__name__)]
        }
        rewards["post"]["parameters"] = feedback["post"]["parameters"] = parameters
        if protocol.reply_schema is not None:
            rewards["post"]["responses"]["200"]["content"]["application/json"]["schema"] = dict(protocol.reply_schema)
        paths |= {path: rewards, path + "/feedback": feedback}
    return paths


def _parameters(protocol: UrlProtocol) -> list[dict[str, Any]]:
    common = {name: {**schema, "description": text} for name, (schema, text) in _QUERY.items()}
    return [
        {
            "name": name,
            "in": "query",
            "required": False,
            "schema": {key: value for key, value in schema.items() if key != "description"},
            "description": schema["description"],
        }
        for name, schema in {**common, **protocol.options}.items()
    ]

"""OpenAPI of the hot routes, from the same msgspec structs that parse them; merged into FastAPI's document."""

from __future__ import annotations

from typing import Any

import msgspec
from fastapi import FastAPI

from service import schemas
from service.handlers.keys import OPEN_PATHS
from service.handlers.openapi_trainers import TYPES, trainer_paths

_REF = "#/components/schemas/{name}"

_EXAMPLE_REWARD: dict[str, Any] = {"prompt": "What is 7 + 5?", "responses": ["7 + 5 = 12", "7 + 5 = 13"]}
_EXAMPLE_ID = "d06in5t2co4000000000000000"

_ERRORS = {
    "400": "The body is not JSON.",
    "401": "API key missing or wrong.",
    "403": "The key is not for this path or run; or a page of a foreign host calls a gateway without API keys.",
    "408": "The request was not whole in time. May be retried.",
    "413": "The body is too large.",
    "415": "The body is not declared as JSON.",
    "422": "A field is out of its bounds or occurs twice, or every reward model refused the input.",
    "429": "Over capacity, or over the limits of the key; try again after `Retry-After` seconds.",
    "431": "The headers are too large.",
    "503": "Store or workers away; nothing was acknowledged. May be retried.",
}

_FEEDBACK_ERRORS = {
    "404": "Unknown run or decision.",
    "409": "The decision already has another feedback; the first one stands.",
    "410": "The decision is older than the feedback window.",
}


def install(app: FastAPI) -> None:
    """Make `app.openapi()` hold the hot routes too."""
    base = app.openapi

    def document() -> dict[str, Any]:
        if app.openapi_schema is None:
            out = base()
            types = [
                schemas.RewardRequest,
                schemas.RewardBatchRequest,
                schemas.RewardReply,
                schemas.BeliefsReply,
                schemas.FeedbackRequest,
                schemas.FeedbackBatchRequest,
                schemas.FeedbackReply,
                schemas.JudgementRequest,
                schemas.JudgementReply,
                schemas.PoolRequest,
                schemas.ErrorReply,
                schemas.NoReward,
                *TYPES,
            ]
            _, components = msgspec.json.schema_components(types, ref_template=_REF)
            target = out.setdefault("components", {}).setdefault("schemas", {})
            target.update(components)
            target["RewardBatchReply"] = _batch_of("RewardReply", "NoReward")
            target["FeedbackBatchReply"] = _batch_of("FeedbackReply", "ErrorReply")
            for path, methods in out["paths"].items():
                for operation in methods.values():
                    _say_errors(operation["responses"], is_open=path in OPEN_PATHS)
            for unused in ("HTTPValidationError", "ValidationError"):
                target.pop(unused, None)
            out["paths"].update(_paths())
            out["paths"].update(trainer_paths(_post, _ref, _ERRORS, {**_ERRORS, **_FEEDBACK_ERRORS}))
            _say_keys(out)
            app.openapi_schema = out
        return app.openapi_schema

    app.openapi = document  # type: ignore[method-assign]


def _say_errors(responses: dict[str, Any], *, is_open: bool) -> None:
    """Give every error of a route of FastAPI the one shape, and add those that any route may answer."""
    common = ("431",) if is_open else ("401", "403", "429", "431")
    for status in common:
        responses.setdefault(status, {"description": _ERRORS[status]})
    if "422" in responses:
        responses["422"] = {"description": "A parameter is out of its bounds."}
    for status, response in responses.items():
        if status >= "400":
            response["content"] = {"application/json": {"schema": _ref("ErrorReply")}}


def _say_keys(document: dict[str, Any]) -> None:
    """Say that a key is needed, but for what is open."""
    document["components"]["securitySchemes"] = {
        "bearer": {"type": "http", "scheme": "bearer", "description": "The API key, where the gateway has keys."},
        "header": {"type": "apiKey", "in": "header", "name": "X-API-Key", "description": "The same."},
    }
    for path, methods in document["paths"].items():
        for operation in methods.values():
            operation["security"] = [] if path in OPEN_PATHS else [{"bearer": []}, {"header": []}]


def _ref(name: str) -> dict[str, str]:
    return {"$ref": _REF.format(name=name)}


def _batch_of(item: str, failed: str) -> dict[str, Any]:
    return {
        "title": item.replace("Reply", "BatchReply"),
        "type": "object",
        "required": ["results"],
        "properties": {"results": {"type": "array", "items": {"anyOf": [_ref(item), _ref(failed)]}}},
        "description": "One reply or error per item, in order.",
    }


def _post(
    *, tag: str, summary: str, description: str, request: str, reply: str, example: Any, errors: dict[str, str]
) -> dict[str, Any]:
    return {
        "post": {
            "tags": [tag],
            "summary": summary,
            "description": description,
            "requestBody": {
                "required": True,
                "content": {"application/json": {"schema": _ref(request), "example": example}},
            },
            "responses": {
                "200": {"description": "Done.", "content": {"application/json": {"schema": _ref(reply)}}},
                **{
                    status: {"description": text, "content": {"application/json": {"schema": _ref("ErrorReply")}}}
                    for status, text in sorted(errors.items())
                },
            },
        }
    }


def _paths() -> dict[str, Any]:
    feedback_errors = {**_ERRORS, **_FEEDBACK_ERRORS}
    return {
        "/reward": _post(
            tag="routing",
            summary="Reward for one prompt with its responses",
            description=(
                "Draws one reward model for the instance, asks it for a score per response, saves the decision, "
                "and answers. If the drawn model cannot answer, the next-best draw is asked and the reply says so. "
                "There is no invented reward: if no model answers, the reply is 503."
            ),
            request="RewardRequest",
            reply="RewardReply",
            example=_EXAMPLE_REWARD,
            errors={
                **_ERRORS,
                "404": "Unknown policy.",
                "409": "The run's name belongs to another pool, checkpoint or prior than the policy insists on.",
            },
        ),
        "/reward/batch": _post(
            tag="routing",
            summary="Rewards for many instances",
            description=(
                "The same as `/reward` for each item, with one encode batch, one matrix product, one call per reward "
                "model and chunk, and one store pipeline. An item that failed has its error in its place."
            ),
            request="RewardBatchRequest",
            reply="RewardBatchReply",
            example={"items": [_EXAMPLE_REWARD]},
            errors={
                **_ERRORS,
                "404": "Unknown policy.",
                "409": "The run's name belongs to another pool, checkpoint or prior than the policy insists on.",
            },
        ),
        "/beliefs": _post(
            tag="routing",
            summary="Whom would it ask?",
            description=(
                "Takes what `/reward` takes, and tells what is believed of every scorer on the instance now: mean, "
                "standard deviation, a draw, the probability of being asked. Nobody is asked and nothing is saved."
            ),
            request="RewardRequest",
            reply="BeliefsReply",
            example=_EXAMPLE_REWARD,
            errors={
                **_ERRORS,
                "404": "Unknown run or policy.",
                "409": "The run's name belongs to another pool, checkpoint or prior than the policy insists on.",
            },
        ),
        "/feedback": _post(
            tag="learning",
            summary="Feedback on one decision",
            description=(
                "Names the decision by `decision_id`, or by `run`, `prompt` and `responses`, and carries exactly the "
                "field of the run's signal. When the reply is 200 the feedback is in the run's log, exactly once; "
                "sending the same again answers `duplicate: true` and changes nothing."
            ),
            request="FeedbackRequest",
            reply="FeedbackReply",
            example={"decision_id": _EXAMPLE_ID, "preferred": 0},
            errors=feedback_errors,
        ),
        "/feedback/batch": _post(
            tag="learning",
            summary="Feedback on many decisions",
            description="The same as `/feedback` for each item; each is applied, or refused, on its own.",
            request="FeedbackBatchRequest",
            reply="FeedbackBatchReply",
            example={"items": [{"decision_id": _EXAMPLE_ID, "preferred": 0}]},
            errors={**_ERRORS, "404": "Unknown run."},
        ),
        "/audits/judge": _post(
            tag="audits",
            summary="A person's judgement of an audited decision",
            description=(
                "Gold: it teaches the scorers, and the referee's accuracy is measured against it. When the reply is "
                "200 it is in the run's log, exactly once; sending the same again answers `duplicate: true`."
            ),
            request="JudgementRequest",
            reply="JudgementReply",
            example={"decision_id": _EXAMPLE_ID, "preferred": 0},
            errors={
                **_ERRORS,
                "404": "The audit is not kept any more, or never was.",
                "409": "Another judgement of it stands.",
            },
        ),
    }

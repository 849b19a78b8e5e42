"""The scorer protocol: what a service says that gives rewards to responses. docs/scorers.md describes it for users.

`POST /score` takes items and answers with one result for each; `GET /health` says that it can be asked; `GET /info`
says what it is. Shared by the client, by our rule worker and by `reward-router check-scorer`. Unknown fields are
ignored.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Annotated, Final

import msgspec
from msgspec import Meta

from router_core.records import MAX_ABS_SCORE, Fact
from service.scorers.transport.exchange import AnswerError, AnswerShapeError
from service.scorers.wire import PROBE_PROMPT, PROBE_RESPONSE, UNREADABLE

SCORE_PATH: Final = "/score"
HEALTH_PATH: Final = "/health"
INFO_PATH: Final = "/info"

FAILED: Final = "failed"
"""Code of a response without a reward where the service gives none."""

TIMEOUT: Final = "timeout"
"""Code of what the service had no time for: not the input's fault."""

_CODE: Final = re.compile(r"[a-z][a-z0-9_]{0,39}")


class Turn(msgspec.Struct):
    """One turn of a conversation."""

    role: str
    content: str


class Item(msgspec.Struct, omit_defaults=True):
    """One prompt with its responses. Either `prompt` or `messages` is given."""

    responses: Annotated[list[str], Meta(min_length=1, description="The responses that are scored.")]
    prompt: Annotated[str, Meta(description="The prompt's text.")] | None = None
    messages: Annotated[list[Turn], Meta(description="The conversation before the responses.")] | None = None
    reference: Annotated[str, Meta(description="What a right answer looks like.")] | None = None
    metadata: Annotated[dict[str, Fact], Meta(description="Flat facts about the item.")] = {}


class ScoreRequest(msgspec.Struct, omit_defaults=True):
    """Items to be scored. None is allowed: the reply has no results then."""

    items: list[Item]
    timeout_seconds: (
        Annotated[
            float,
            Meta(gt=0, description="What is not scored by then gets an error of code `timeout`; the rest counts."),
        ]
        | None
    ) = None


class Problem(msgspec.Struct):
    """Why an item has no reward."""

    message: str
    code: Annotated[str, Meta(description="Stable: lower-case letters, digits and `_`.")] = FAILED


class Result(msgspec.Struct, omit_defaults=True):
    """What was made of one item: exactly one of `rewards`, `abstain` and `error`."""

    rewards: (
        Annotated[
            list[float | None],
            Meta(description="One per response, in order; null for a response that has none. Not all null."),
        ]
        | None
    ) = None
    failures: Annotated[
        list[str | None], Meta(description="One stable code per response where some reward is null; else null.")
    ] = []
    components: Annotated[
        dict[str, list[float | None]], Meta(description="Parts of the rewards by name, each one per response.")
    ] = {}
    abstain: Annotated[str, Meta(description="Why the scorer does not apply to the item: no failure.")] | None = None
    error: Annotated[Problem, Meta(description="Why the scorer failed on this item alone.")] | None = None


class ScoreReply(msgspec.Struct):
    """One result per item, in order."""

    results: list[Result]


class Info(msgspec.Struct):
    """What the service is."""

    name: str
    kind: Annotated[str, Meta(description="For people, for example `rule`.")]
    version: str


PROBE_ITEM: Final = Item([PROBE_RESPONSE], PROBE_PROMPT)
"""What every service can be asked: any result is an answer."""

_DECODER = msgspec.json.Decoder(ScoreReply)


def read_results(body: bytes, sizes: Sequence[int]) -> list[Result]:
    """Return the results in an answer, in the order of the items. Each has the right shape and usable numbers.

    Args:
        body: of a response with status 200.
        sizes: number of responses of each item.

    Raises:
        AnswerError: no reply of this protocol.
        AnswerShapeError: another number of results or rewards than was asked for.
    """
    try:
        results = _DECODER.decode(body).results
    except UNREADABLE as error:
        raise AnswerError(f"the answer is not a /score reply: {error}") from error
    if len(results) != len(sizes):
        raise AnswerShapeError(f"{len(results)} results to {len(sizes)} items")
    for index, (result, size) in enumerate(zip(results, sizes, strict=True)):
        problem = shape_problem(result, size)
        if problem is not None:
            raise AnswerShapeError(f"result {index}: {problem}")
    return results


def shape_problem(result: Result, size: int) -> str | None:
    """Return what is wrong with the shape of a result; None when nothing is.

    >>> shape_problem(Result(rewards=[1.0, None]), 2), shape_problem(Result(rewards=[1.0]), 2)
    (None, '1 rewards to 2 responses')
    """
    given = [name for name in ("rewards", "abstain", "error") if getattr(result, name) is not None]
    if len(given) != 1:
        return f"it has {' and '.join(given) or 'none'} of `rewards`, `abstain` and `error`; give exactly one"
    if result.rewards is None:
        return None
    lengths = {"rewards": len(result.rewards)} | {name: len(part) for name, part in result.components.items()}
    if result.failures:
        lengths["failures"] = len(result.failures)
    for name, length in lengths.items():
        if length != size:
            return f"{length} {name} to {size} responses"
    return None


def value_problem(result: Result) -> str | None:
    """Return what is wrong with the numbers of a result; None when nothing is.

    >>> value_problem(Result(rewards=[None]))
    'every reward is null: give `abstain` or `error` instead'
    """
    if result.rewards is None:
        return None
    if all(reward is None for reward in result.rewards):
        return "every reward is null: give `abstain` or `error` instead"
    for name, values in {"rewards": result.rewards, **result.components}.items():
        for value in values:
            if value is not None and not abs(value) <= MAX_ABS_SCORE:
                return f"{name} hold {value:.6g}, beyond the bound of {MAX_ABS_SCORE:g}"
    return None


def stable_code(code: str | None) -> str:
    """Return a code that may stand in logs and metrics.

    >>> stable_code("rule_timeout"), stable_code("Oh no!"), stable_code(None)
    ('rule_timeout', 'failed', 'failed')
    """
    return code if code is not None and _CODE.fullmatch(code) else FAILED


def numbers(values: Sequence[float | None]) -> list[float]:
    """Return NaN in the place of null."""
    return [math.nan if value is None else value for value in values]

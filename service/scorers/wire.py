"""The words of vLLM's `/classify`, `/v1/models` and errors, as typed structs.

Shared by the client and by our own workers, so that both speak one language. Knows no transport and no model.
Unknown fields are ignored, as vLLM does.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from typing import Final

import msgspec

CLASSIFY_PATH: Final = "/classify"
MODELS_PATH: Final = "/v1/models"
HEALTH_PATH: Final = "/health"
TOKENIZE_PATH: Final = "/tokenize"
METRICS_PATH: Final = "/metrics"

UNREADABLE: Final = (msgspec.MsgspecError, UnicodeDecodeError, RecursionError)
"""What `msgspec` raises for bytes that are not what was asked for: other fields or no JSON, no UTF-8, too deep."""

UNTOLD: Final = frozenset({"model", "role", "type", "task", "encoding_format"})
"""Fields of requests whose values are words of the protocol, and no texts."""

QUOTED_CHARS: Final = 16
"""Characters in a row that make a quotation."""

SHORTEST_QUOTE: Final = 5
"""Of texts that are shorter, an answer may hold one by chance."""

PROBE_PROMPT: Final = "ping"
PROBE_RESPONSE: Final = "pong"
"""The tiny conversation of readiness checks. Every worker can score it; a recorded worker answers it with 0.0."""


_TOO_LONG: Final = tuple(
    re.compile(pattern, re.IGNORECASE)
    for pattern in (
        r"maximum (context|model|input|sequence|prompt)[ _-]?len",
        r"\bmax_model_len\b|\bmax_(input|seq|sequence)_len",
        r"(longer than|exceed\w*|greater than|larger than|more than)\b.*\b(context|tokens?|sequence|input|model)\b",
        r"\b(input|prompt|text|sequence|conversation|item)s?\b.*\btoo (long|large|many)\b|\btoo many (input )?tokens\b",
        r"must have less than \d+ tokens",
    )
)
"""How servers say that an input has too many tokens."""


class TextPart(msgspec.Struct):
    """One part of a message's content; workers of this project take text only."""

    type: str
    text: str = ""


class FunctionCall(msgspec.Struct):
    """The tool that is called, and its arguments as JSON."""

    name: str
    arguments: str = ""


class ToolCall(msgspec.Struct):
    """A call of a tool."""

    function: FunctionCall
    id: str = ""
    type: str = "function"


class Message(msgspec.Struct, omit_defaults=True):
    """One turn of a conversation."""

    role: str
    content: str | list[TextPart] | None = None
    name: str | None = None
    tool_calls: list[ToolCall] | None = None
    tool_call_id: str | None = None


class ClassifyRequest(msgspec.Struct, omit_defaults=True):
    """What `/classify` takes. With `messages` and `input` both given, `input` is ignored, as in vLLM."""

    model: str | None = None
    input: str | list[str | int | list[int]] | None = None
    messages: list[Message] | None = None
    use_activation: bool | None = None
    add_special_tokens: bool | None = None
    truncate_prompt_tokens: int | None = None


class TokenizeRequest(msgspec.Struct, omit_defaults=True):
    """A conversation for `/tokenize`. vLLM opens the assistant's next turn there unless told not to."""

    messages: list[Message]
    model: str | None = None
    add_generation_prompt: bool = True
    add_special_tokens: bool = False


class TokenizeReply(msgspec.Struct):
    """The reply of `/tokenize`."""

    tokens: list[int]
    count: int = 0
    max_model_len: int = 0


class Classified(msgspec.Struct):
    """One answer as the client reads it."""

    index: int
    probs: list[float]
    num_classes: int


class ClassifyAnswer(msgspec.Struct):
    """The part of a `/classify` reply that the client reads."""

    data: list[Classified]


class ClassifiedReply(msgspec.Struct):
    """One answer as a worker writes it."""

    index: int
    label: str
    probs: list[float]
    num_classes: int = 1


class Usage(msgspec.Struct):
    """Token counts of one request."""

    prompt_tokens: int
    total_tokens: int
    completion_tokens: int = 0
    prompt_tokens_details: None = None


class ClassifyReply(msgspec.Struct):
    """A whole `/classify` reply."""

    id: str
    object: str
    created: int
    model: str
    data: list[ClassifiedReply]
    usage: Usage


class ServedModel(msgspec.Struct):
    """One entry of `/v1/models`."""

    id: str
    object: str = "model"
    created: int = 0
    owned_by: str = "reward-router"
    root: str | None = None
    parent: str | None = None
    max_model_len: int | None = None


class ModelList(msgspec.Struct):
    """The reply of `/v1/models`."""

    data: list[ServedModel]
    object: str = "list"


class ErrorBody(msgspec.Struct):
    """vLLM's error: `code` is the HTTP status."""

    message: str
    type: str = "BadRequestError"
    param: str | None = None
    code: int = 400


class ErrorReply(msgspec.Struct):
    """The body of every error reply."""

    error: ErrorBody


def error_message(body: bytes, *, limit: int = 500) -> str:
    """The worker's own words out of an error body, at most `limit` characters; never raises."""
    text, _, _ = _read_error(body)
    if text is None:
        text = body[: 4 * limit].decode("utf-8", "replace")
    return text if len(text) <= limit else text[: limit - 1] + "…"


def safe_words(body: bytes, sent: bytes) -> str:
    """Return `error_message`, unless it quotes texts of the request: these belong into no log and no error.

    Args:
        body: of the answer.
        sent: the request's body; of the strings in it, all count but those of `UNTOLD`.
    """
    words = error_message(body)
    try:
        texts = list(_texts(msgspec.json.decode(sent)))
    except UNREADABLE:
        return "(its words are not shown)"
    for text in texts:
        # An answer may quote JSON, or Python, where quotes and lines are written otherwise.
        for form in {text, json.dumps(text)[1:-1], json.dumps(text, ensure_ascii=False)[1:-1], repr(text)[1:-1]}:
            if _shares(words, form):
                return "(its words quote the input, and are not shown)"
    return words


def _texts(value: object) -> Iterator[str]:
    """Yield the strings of JSON that may hold what people wrote."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, list):
        for one in value:
            yield from _texts(one)
    elif isinstance(value, dict):
        for name, one in value.items():
            if name not in UNTOLD:
                yield from _texts(one)


def _shares(words: str, text: str) -> bool:
    """Return True if words hold a text, or `QUOTED_CHARS` of it in a row."""
    if len(text) <= QUOTED_CHARS:
        return len(text) >= SHORTEST_QUOTE and text in words
    return any(words[at : at + QUOTED_CHARS] in text for at in range(len(words) - QUOTED_CHARS + 1))


def says_too_long(status: int, body: bytes) -> bool:
    """Return True if a refusal blames the length of the input.

    Status 413 always does. With 400 and 422 it is told by `param: input_tokens`, by a code, or in words: of vLLM, of
    its earlier versions, of SGLang, TEI and others, in any shape that `error_message` reads.
    """
    if status == 413:
        return True
    if status not in (400, 422):
        return False
    text, param, code = _read_error(body)
    if param == "input_tokens" or code == "context_length_exceeded":
        return True
    return text is not None and any(pattern.search(text) for pattern in _TOO_LONG)


def _read_error(body: bytes) -> tuple[str | None, object, object]:
    """(message, param, code) of an error body.

    Read are `{"error": {…}}`, `{"error": "…"}`, and flat bodies with `message` or `detail`, which may hold another.
    """
    try:
        document: object = msgspec.json.decode(body)
    except UNREADABLE:
        return None, None, None
    for _ in range(3):
        if isinstance(document, list) and document:
            document = document[0]
        if isinstance(document, str):
            return document, None, None
        if not isinstance(document, dict):
            return None, None, None
        for key in ("message", "msg"):
            if isinstance(document.get(key), str):
                return document[key], document.get("param"), document.get("code")
        document = document.get("error", document.get("detail"))
    return (document, None, None) if isinstance(document, str) else (None, None, None)


def sigmoid(x: float) -> float:
    """1 / (1 + e⁻ˣ) without overflow.

    >>> sigmoid(0.0)
    0.5
    """
    return 1.0 / (1.0 + math.exp(-x)) if x >= 0 else math.exp(x) / (1.0 + math.exp(x))

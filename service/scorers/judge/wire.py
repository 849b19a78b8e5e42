"""The words of an OpenAI-compatible `/v1/chat/completions`, as typed structs. Unknown fields are ignored."""

from __future__ import annotations

from typing import Final

import msgspec

from service.scorers.wire import Message, Usage

CHAT_PATH: Final = "/v1/chat/completions"

TOP_LOGPROBS: Final = 20
"""Alternatives per token that are asked for: the most that servers give by default."""


class ChatRequest(msgspec.Struct):
    """What our own worker reads of a request."""

    messages: list[Message]
    model: str | None = None
    max_tokens: int | None = None
    max_completion_tokens: int | None = None
    temperature: float | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    stream: bool | None = None
    n: int | None = None


class TopToken(msgspec.Struct):
    """One alternative for a token."""

    token: str
    logprob: float


class TokenLogprob(msgspec.Struct):
    """One generated token."""

    token: str
    logprob: float
    top_logprobs: list[TopToken] = []


class ChoiceLogprobs(msgspec.Struct):
    """Log-probabilities of the generated tokens."""

    content: list[TokenLogprob] | None = None


class Answer(msgspec.Struct):
    """What the model said; its thinking apart where the server takes it apart."""

    content: str | None = None
    role: str = "assistant"
    reasoning_content: str | None = None
    reasoning: str | None = None


class Choice(msgspec.Struct):
    """One completion."""

    message: Answer
    index: int = 0
    finish_reason: str | None = None
    logprobs: ChoiceLogprobs | None = None


class ChatCompletion(msgspec.Struct):
    """The part of a reply that is read, and that our own worker writes."""

    choices: list[Choice]
    id: str = ""
    object: str = "chat.completion"
    created: int = 0
    model: str = ""
    usage: Usage | None = None

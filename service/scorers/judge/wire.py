"""The words of an OpenAI-compatible `/v1/chat/completions`, as typed structs. Unknown fields are ignored."""

from __future__ import annotations

from typing import Final

import msgspec

CHAT_PATH: Final = "/v1/chat/completions"

TOP_LOGPROBS: Final = 20
"""Alternatives per token that are asked for: the most that servers give by default."""


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
    reasoning_content: str | None = None
    reasoning: str | None = None


class Choice(msgspec.Struct):
    """One completion."""

    message: Answer
    finish_reason: str | None = None
    logprobs: ChoiceLogprobs | None = None


class ChatCompletion(msgspec.Struct):
    """The part of a reply that is read."""

    choices: list[Choice]

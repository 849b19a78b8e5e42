"""What is said to a judge's servers: `/v1/chat/completions` with one message, and what the answers mean.

`service.scorers.judge.client` writes requests and reads verdicts with it; `service.scorers.requests` uses it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final

import msgspec

from service.scorers.judge.rubrics import Mode, Style
from service.scorers.judge.verdicts import (
    LABEL_MASS,
    grade_of_logprobs,
    grade_of_text,
    preference_of_logprobs,
    preference_of_text,
)
from service.scorers.judge.wire import CHAT_PATH, TOP_LOGPROBS, ChatCompletion, Choice
from service.scorers.protocol import WorkerRejectedError, WorkerTooLongError
from service.scorers.transport.exchange import AnswerError, AnswerShapeError
from service.scorers.wire import PROBE_PROMPT, UNREADABLE, says_too_long

LETTER_TOKENS: Final = 1
TEXT_TOKENS: Final = 1024
"""`max_tokens` by default: one label, or reasons and a verdict. Reasoning models may need more."""

_DECODER = msgspec.json.Decoder(ChatCompletion)


@dataclass(frozen=True, slots=True)
class ChatOptions:
    """What a judge's requests hold beside the message.

    Attributes:
        model: the servers' name for it.
        max_tokens: per answer; None for the style's default.
        temperature: None to leave the server's.
        label_mass: see `service.scorers.judge.verdicts.LABEL_MASS`.
        extra_body: further fields; None takes one out.
    """

    model: str
    max_tokens: int | None = None
    temperature: float | None = 0.0
    label_mass: float = LABEL_MASS
    extra_body: Mapping[str, Any] | None = None


class ChatDialogue:
    """Implements `service.scorers.requests.Dialogue` for one judge."""

    path = CHAT_PATH

    def __init__(self, options: ChatOptions) -> None:
        self._options = options

    def body(self, message: str, style: Style) -> bytes:
        """Return the request that sends a message and wants an answer of a style.

        Raises:
            UnicodeEncodeError: the message holds half of a surrogate pair.
        """
        wanted: dict[str, object] = {"temperature": self._options.temperature, "max_tokens": self._max_tokens(style)}
        if style is Style.LETTER:
            wanted |= {"logprobs": True, "top_logprobs": TOP_LOGPROBS}
        return self._encoded(message, wanted)

    def answer_tokens(self, style: Style) -> int:
        """Return how many tokens an answer of a style has at most, by the name that the request gives the bound."""
        extra = self._options.extra_body or {}
        return extra.get("max_completion_tokens") or extra.get("max_tokens") or self._max_tokens(style)

    def _max_tokens(self, style: Style) -> int:
        return self._options.max_tokens or (LETTER_TOKENS if style is Style.LETTER else TEXT_TOKENS)

    def read(self, body: bytes, count: int) -> Choice:
        """Return the only completion; what it says is another question."""
        try:
            choices = _DECODER.decode(body).choices
        except UNREADABLE as error:
            raise AnswerError(f"the answer is not a chat completion: {error}") from error
        if len(choices) != count:
            raise AnswerShapeError(f"{len(choices)} choices where {count} was asked for")
        return choices[0]

    def number_of(self, choice: Choice, mode: Mode, style: Style) -> float:
        """Return what an answer says: the probability that the response shown first is better, or a grade.

        Raises:
            VerdictError: nothing that can be read.
        """
        if style is Style.LETTER:
            read = preference_of_logprobs if mode is Mode.PAIRWISE else grade_of_logprobs
            return read(choice, self._options.label_mass)
        by_mode: Callable[[Choice], float] = preference_of_text if mode is Mode.PAIRWISE else grade_of_text
        return by_mode(choice)

    def probe(self) -> bytes:
        """Return a request for one token, which every server answers that answers at all."""
        return self._encoded(PROBE_PROMPT, {"max_tokens": 1, "temperature": self._options.temperature})

    def answers_probe(self, body: bytes) -> bool:
        """Return True if the body is a completion."""
        try:
            self.read(body, 1)
        except AnswerError:
            return False
        return True

    def refusal(self, message: str, details: dict[str, object], status: int, body: bytes) -> WorkerRejectedError:
        """Return the error of a refusal, which may blame the length of the input."""
        if says_too_long(status, body):
            return WorkerTooLongError(message, details=details)
        return WorkerRejectedError(message, details=details)

    def _encoded(self, message: str, wanted: Mapping[str, object]) -> bytes:
        fields: dict[str, object] = {
            "model": self._options.model,
            "messages": [{"role": "user", "content": message}],
            **wanted,
            **(self._options.extra_body or {}),
        }
        return msgspec.json.encode({name: value for name, value in fields.items() if value is not None})

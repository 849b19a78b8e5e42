"""From what a request says to an `Instance`: texts, or messages of a chat.

A prompt or a response is a text, or messages in the chat form of OpenAI and others. A single user message is as good as
a text, so that both name the same decision. Called by `score` and `learn`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from router_core.records import Fact, Instance, Message, ToolCall, Turns
from service.errors import ValidationError
from service.trainers.conversation import ChatMessage, read_messages, turns_text

Given = str | list[dict[str, object]]
"""A prompt or a response as a request has it."""

MAX_MESSAGES = 1000
"""Messages of one prompt or response."""


def instance_of(
    prompt: Given,
    responses: Sequence[Given],
    reference: str | None = None,
    metadata: Mapping[str, Fact] | None = None,
    *,
    where: str = "",
) -> Instance:
    """Return the instance that a request is about.

    Args:
        prompt: text or messages.
        responses: the same, at least one.
        reference: see `Instance`.
        metadata: see `Instance`.
        where: what stands before the names of fields in errors, for example `items[3].`.

    Raises:
        ValidationError: messages that cannot be read: no role, no words, an image.
    """
    if isinstance(prompt, str) and all(isinstance(response, str) for response in responses):
        return Instance(prompt, tuple(responses), reference, metadata or {})  # type: ignore[arg-type]
    text, turns = said_of(prompt, f"{where}prompt", "user")
    read = [said_of(response, f"{where}responses[{i}]", "assistant") for i, response in enumerate(responses)]
    answers = tuple([turns for _, turns in read])
    return Instance(
        text,
        tuple([text for text, _ in read]),
        reference,
        metadata or {},
        turns,
        answers if any(turns is not None for turns in answers) else None,
    )


def said_of(given: Given, name: str, speaker: str) -> tuple[str, Turns | None]:
    """Return the text, and the messages where a text of the speaker does not say the same.

    Args:
        given: text or messages.
        name: of the field, for errors.
        speaker: role of a text.

    Raises:
        ValidationError: messages that cannot be read.
    """
    if isinstance(given, str):
        return given, None
    if len(given) > MAX_MESSAGES:
        raise ValidationError(
            f"{name} holds {len(given)} messages: send at most {MAX_MESSAGES}",
            details={"field": name, "limit": MAX_MESSAGES},
        )
    try:
        messages = read_messages(given, name)
    except ValueError as error:
        raise ValidationError(str(error), details={"field": name}) from error
    if len(messages) == 1 and messages[0].role == speaker and messages[0].is_plain:
        return messages[0].text, None
    return turns_text(messages), tuple([_message(message) for message in messages])


def _message(message: ChatMessage) -> Message:
    calls = tuple([ToolCall(call.name, call.arguments, call.id) for call in message.calls])
    return Message(message.role, message.said, message.name, calls, message.answers)

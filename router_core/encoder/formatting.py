"""How a (prompt, response) becomes the token ids that a transformer reads, whatever their length.

Knows token ids and budgets; no model and no torch. Called by `encoder.torch`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

READING_FILE = "reward_router.json"
"""Beside a transformer's weights: how this project reads texts with it (longest text, pooling)."""
REFERENCES_FILE = "references.npy"
"""Beside an exported one: the states of the reference texts that stand in `READING_FILE`. No safetensors: vLLM takes
every file of that kind for weights."""
READING_VERSION = 1
"""Version of an exported `READING_FILE`; raised when an older gateway could misread a newer one."""
SEPARATOR = "\n"
"""Between prompt and response where the model has no chat template."""


class TextTokenizer(Protocol):
    """The part of a transformers tokenizer that is used here."""

    chat_template: str | None

    def apply_chat_template(self, conversation: list[dict[str, str]], *, tokenize: bool, **options: bool) -> str: ...


def render(tokenizer: TextTokenizer, prompt: str, response: str) -> tuple[str, str]:
    """Text up to the response, and the response with what follows: with the model's own chat template if it has one."""
    if not tokenizer.chat_template:
        return prompt + SEPARATOR, response
    user = {"role": "user", "content": prompt}
    head = tokenizer.apply_chat_template([user], tokenize=False, add_generation_prompt=True)
    whole = tokenizer.apply_chat_template([user, {"role": "assistant", "content": response}], tokenize=False)
    # A template may rewrite the text that it is given (strip it, say); then the plain response is what there is to cut.
    return (head, whole[len(head) :]) if whole.startswith(head) else (head, response)


def fit_tokens(head: Sequence[int], response: Sequence[int], budget: int) -> list[int]:
    """Join the ids and cut to `budget`: the prompt loses its beginning first, then the response its beginning.

    The end of the response is what the last token's hidden state summarises, and errors in an argument tend to show
    there; so it is kept.

    >>> fit_tokens([1, 2, 3], [4, 5], 4)
    [2, 3, 4, 5]
    >>> fit_tokens([1, 2, 3], [4, 5, 6], 2)
    [5, 6]
    """
    joined = [*head, *response]
    return joined[max(0, len(joined) - budget) :]

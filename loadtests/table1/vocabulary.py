"""The word tokenizer that the policy and the reward models share: one token a word, no unknown ones.

Called by `policy`, `sft`, `rewards`.
"""

from __future__ import annotations

import numpy as np
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

from loadtests.table1.numbers import LARGEST_NUMBER
from loadtests.table1.tasks import FAMILIES, Split, demonstrate, draw_task
from router_core.demo.tokenizer import PAD, ROLE_TOKENS, plain_text

_SAMPLES = 600
"""Tasks per family from which the words are collected; six times as many as give all."""

END = "\n"
"""Ends a response, in the chat template and in the policy."""


def build_tokenizer() -> Tokenizer:
    """The tokenizer: words and line ends are tokens, blanks are nothing. Always the same."""
    rng = np.random.default_rng(0)
    words = {END, *map(str, range(LARGEST_NUMBER + 1))}
    for family in FAMILIES:
        for _ in range(_SAMPLES):
            task = draw_task(family, rng, Split.SFT)
            for text in (task.prompt, demonstrate(task, rng, 1.0), demonstrate(task, rng, 0.0)):
                words.update(text.split(" "))
    tokens = [PAD, *ROLE_TOKENS, *sorted(words)]
    tokenizer = Tokenizer(models.WordLevel({token: i for i, token in enumerate(tokens)}, unk_token=PAD))
    tokenizer.add_special_tokens([PAD, *ROLE_TOKENS])
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r"\n| +|[^\s]+"), behavior="isolated"),
            pre_tokenizers.Split(Regex(r" +"), behavior="removed"),
        ]
    )
    tokenizer.decoder = decoders.Fuse()
    return tokenizer


class Codec:
    """Conversations to ids for the policy, and ids back to responses.

    The policy reads and writes the chat template's text: the reward models read the same tokens.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self.size = tokenizer.get_vocab_size()
        ids: list[int] = [tokenizer.token_to_id(token) for token in (PAD, *ROLE_TOKENS, END)]
        self.pad, self.user, self.assistant, self.end = ids

    def prompt(self, text: str) -> list[int]:
        """Ids up to where the response begins."""
        return [self.user, self.end, *self._words(text), self.end, self.assistant, self.end]

    def response(self, text: str) -> list[int]:
        """Ids of a finished response."""
        return [*self._words(text), self.end]

    def text(self, ids: list[int]) -> str:
        """The words up to END, separated by blanks."""
        words: list[str] = []
        for token in ids:
            if token in (self.end, self.pad):
                break
            words.append(self._tokenizer.id_to_token(token))
        return " ".join(words)

    def conversation(self, prompt: str, response: str) -> list[int]:
        """Ids as a reward model reads them."""
        ids: list[int] = self._tokenizer.encode(plain_text(prompt, response)).ids
        return ids

    def number(self, value: int) -> int:
        """The id of a number."""
        return int(self._tokenizer.token_to_id(str(value)))

    def _words(self, text: str) -> list[int]:
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False).ids
        return ids

"""The demo pool's tokenizer: a byte-level BPE of its own texts, with the project's plain chat template.

Knows the domains' generators only. Any text can be encoded (bytes are the alphabet) and nothing is added to it: no
BOS, no EOS. Called by `train`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from router_core.demo.domains import DOMAINS, Split, generate_pairs

PAD = "<|pad|>"
ROLE_TOKENS = ("<|user|>", "<|assistant|>")

CHAT_TEMPLATE = "{% for message in messages %}<|{{ message['role'] }}|>\n{{ message['content'] }}\n{% endfor %}"
"""For each message `<|role|>`, newline, content, newline: the project's plain format. No BOS; a generation prompt is
not offered, since reward models score whole conversations."""

_VOCABULARY = 2000
_CORPUS_PAIRS = 1500
_WORD = Regex(r" ?[A-Za-z]+|\d+| ?[^\sA-Za-z\d]|\s")


def plain_text(prompt: str, response: str) -> str:
    """Return the conversation as the chat template renders it, without the cost of Jinja."""
    return f"<|user|>\n{prompt}\n<|assistant|>\n{response}\n"


def train_tokenizer(seed: int) -> Tokenizer:
    """Train the tokenizer on prompts that the reward models may see, deterministic by seed.

    Whole words and whole numbers become single tokens where they are frequent, so a tiny model does not have to spell.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(_WORD, behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=_VOCABULARY,
        min_frequency=2,
        special_tokens=[PAD, *ROLE_TOKENS],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_corpus(seed), trainer)
    return tokenizer


def save_tokenizer(tokenizer: Tokenizer, directory: Path) -> None:
    """Write `tokenizer.json` and `tokenizer_config.json` in the form that transformers 4 and 5 and vLLM read."""
    tokenizer.save(str(directory / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "pad_token": PAD,
        "padding_side": "right",
        "model_max_length": 512,
        "clean_up_tokenization_spaces": False,
        "chat_template": CHAT_TEMPLATE,
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")


def _corpus(seed: int) -> Iterator[str]:
    rng = np.random.default_rng(seed)
    for number in range(200):
        yield " ".join([f"{number}"] * 20)
    for domain in DOMAINS:
        for pair in generate_pairs(domain, _CORPUS_PAIRS, rng, split=Split.MODELS):
            yield pair.instance.prompt
            yield from pair.instance.responses

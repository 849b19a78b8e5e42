"""Tiny random transformers in directories, saved as real ones are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import tokenizers
import torch
import transformers

WORDS = ["[PAD]", "[CLS]", "[SEP]", "[UNK]", *"abcdefghijklmnopqrstuvwxyz"]
CHAT = (
    "{% for m in messages %}{{ m['role'][0] }} {{ m['content'] }} e {% endfor %}"
    "{% if add_generation_prompt %}a {% endif %}"
)


def save_transformer(
    directory: Path, kind: str, chat: bool = False, positions: int = 64, seed: int = 0, hidden_size: int = 16
) -> Path:
    """A two-layer `bert` or `llama` that knows single letters as words."""
    tokenizer = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]")
    )
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    if kind == "bert":
        tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
            single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 1), ("[SEP]", 2)]
        )
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]")
    if chat:
        fast.chat_template = CHAT
    fast.save_pretrained(directory)
    shape: dict[str, Any] = {
        "vocab_size": len(WORDS),
        "hidden_size": hidden_size,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "max_position_embeddings": positions,
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if kind == "bert":
            model: Any = transformers.BertModel(transformers.BertConfig(**shape))
        else:
            model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**shape, num_key_value_heads=2))
    model.save_pretrained(directory)
    return directory

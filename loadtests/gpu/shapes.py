"""Models of published shapes with random weights, as directories that vLLM and transformers load.

Knows transformers' configurations and a tokenizer that is trained on the benchmark's own texts; nothing of servers.
`loadtests.gpu.__main__` calls it.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaModel, Qwen3Config, Qwen3ForSequenceClassification

from router_core.encoder.export import export
from router_core.encoder.torch import TorchBackbone
from service.scorers.rm.render import PLAIN_TEMPLATE

PAD = "<|pad|>"


@dataclass(frozen=True, slots=True)
class Shape:
    """Sizes of one benchmark.

    Attributes:
        name: for the table.
        rm: of `Qwen3Config`.
        encoder: of `LlamaConfig`.
        words: of the tokenizer; the embedding tables have their published sizes.
        rm_tokens: longest text of an RM.
        encoder_tokens: longest text of the encoder; the research code pads to it.
    """

    name: str
    rm: dict[str, Any]
    encoder: dict[str, Any]
    words: int
    rm_tokens: int = 2048
    encoder_tokens: int = 1024


FULL = Shape(
    "Qwen3-0.6B-shaped RMs, SmolLM2-135M-shaped encoder",
    rm={
        "vocab_size": 151_936,
        "hidden_size": 1024,
        "intermediate_size": 3072,
        "num_hidden_layers": 28,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "max_position_embeddings": 40_960,
        "tie_word_embeddings": True,
    },
    encoder={
        "vocab_size": 49_152,
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "max_position_embeddings": 8192,
        "tie_word_embeddings": True,
    },
    words=16_384,
)

_SMALL = {
    "vocab_size": 1024,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 2048,
}
TOY = Shape("toy models", rm={**_SMALL, "head_dim": 32}, encoder=_SMALL, words=1024)


@dataclass(frozen=True, slots=True)
class Models:
    """Where they lie: one directory per RM, and the exported encoder."""

    rms: tuple[Path, ...]
    encoder: Path


def make_models(folder: Path, shape: Shape, rms: int, texts: Sequence[str]) -> Models:
    """Make what is not there yet; seeds are the RMs' numbers.

    Args:
        folder: kept between runs.
        shape: sizes.
        rms: how many.
        texts: what the tokenizer is trained on.
    """
    tokenizer = train_tokenizer(texts, shape.words)
    paths = tuple(folder / f"rm-{number}" for number in range(rms))
    for seed, path in enumerate(paths):
        if not (path / "config.json").is_file():
            _make_rm(path, shape, tokenizer, seed)
    encoder = folder / "encoder"
    if not (encoder / "references.npy").is_file():
        _make_encoder(encoder, shape, tokenizer)
    return Models(paths, encoder)


def train_tokenizer(texts: Iterable[str], words: int) -> Tokenizer:
    """A byte-level BPE: about four characters a token, as published ones have of English."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=words,
        special_tokens=[PAD],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def _make_rm(path: Path, shape: Shape, tokenizer: Tokenizer, seed: int) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        config = Qwen3Config(**shape.rm, num_labels=1, pad_token_id=0, dtype=torch.bfloat16)
        model = Qwen3ForSequenceClassification(config).to(torch.bfloat16)
    model.save_pretrained(path)
    _save_tokenizer(tokenizer, path, shape.rm_tokens)


def _make_encoder(path: Path, shape: Shape, tokenizer: Tokenizer) -> None:
    source = path.with_name("encoder-source")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1000)
        LlamaModel(LlamaConfig(**shape.encoder, pad_token_id=0)).save_pretrained(source)
    _save_tokenizer(tokenizer, source, shape.encoder_tokens)
    export(TorchBackbone.load(source, "torch:encoder", max_tokens=shape.encoder_tokens), path)


def _save_tokenizer(tokenizer: Tokenizer, path: Path, longest: int) -> None:
    tokenizer.save(str(path / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "pad_token": PAD,
        "padding_side": "right",
        "model_max_length": longest,
        "clean_up_tokenization_spaces": False,
        "chat_template": PLAIN_TEMPLATE,
    }
    (path / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", "utf-8")

"""Any transformers model as a frozen backbone: last-token states of a causal model, mean states of a sentence encoder.

Knows torch and transformers; imported by `encoder.registry` only when a spec asks for it. Never downloads: a model is
a directory that is there.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import AutoConfig, AutoModel, AutoTokenizer

from router_core.encoder.base import Block
from router_core.encoder.formatting import fit_tokens, render
from router_core.errors import EncoderError

Pooling = Literal["last", "mean"]

MAX_TOKENS = 1024
"""Longest text a backbone reads, unless the model itself takes less; the paper's released code uses the same."""
BATCH_TOKENS = 8192
"""Padded tokens per forward pass: what bounds memory, whatever the lengths."""


class TorchBackbone:
    """(prompt, response) to one hidden vector. One forward pass at a time, whichever threads ask."""

    def __init__(
        self,
        model: torch.nn.Module,
        tokenizer: Any,
        spec: str,
        pooling: Pooling,
        max_tokens: int,
        device: str = "cpu",
    ) -> None:
        self._model = model.to(device).eval()
        self._tokenizer = tokenizer
        self._spec = spec
        self._pooling = pooling
        self._max_tokens = max_tokens
        self._device = device
        self._dim = int(model.config.hidden_size)  # type: ignore[union-attr, arg-type]
        # Fast tokenizers refuse concurrent use with different settings, and parallel passes only fight for cores.
        self._lock = threading.Lock()

    @classmethod
    def load(
        cls,
        directory: Path,
        spec: str,
        gguf_file: str | None = None,
        max_tokens: int = MAX_TOKENS,
        device: str = "cpu",
    ) -> TorchBackbone:
        """Load a transformers directory, or one GGUF file in it.

        Causal language models are pooled at the last token, bidirectional encoders by the mean.

        Raises:
            EncoderError: the directory or file is missing, or transformers cannot read it.
        """
        needed = directory / (gguf_file or "config.json")
        if not needed.is_file():
            raise EncoderError(f"encoder {spec!r}: {needed} does not exist; give a directory in transformers format")
        options: dict[str, Any] = {"local_files_only": True, **({"gguf_file": gguf_file} if gguf_file else {})}
        try:
            config = AutoConfig.from_pretrained(directory, **options)
            tokenizer = AutoTokenizer.from_pretrained(directory, **options)
            model = AutoModel.from_pretrained(directory, dtype=torch.float32, **options)
        except ImportError as error:
            raise EncoderError(
                f"encoder {spec!r}: {error}; install what is missing with: pip install 'reward-router[train]'"
            ) from error
        except (OSError, ValueError, KeyError) as error:
            raise EncoderError(f"encoder {spec!r}: transformers cannot load {directory} ({error})") from error
        limit = getattr(config, "max_position_embeddings", None) or max_tokens
        return cls(model, tokenizer, spec, _pooling(config), min(max_tokens, int(limit)), device)

    @property
    def spec(self) -> str:
        """The string that loads it again."""
        return self._spec

    @property
    def dim(self) -> int:
        """The model's hidden size."""
        return self._dim

    @property
    def blocks(self) -> tuple[Block, ...]:
        """One dense block."""
        return (Block(self._dim, dense=True),)

    def embed(self, conversations: Sequence[tuple[str, str]]) -> NDArray[np.float32]:
        """(N, dim) float32. Texts of like length share a batch, so little is padded and nothing to a fixed length."""
        out = np.empty((len(conversations), self._dim), dtype=np.float32)
        with self._lock, torch.inference_mode():
            ids = [self._tokens(prompt, response) for prompt, response in conversations]
            for rows in _batches([len(row) for row in ids]):
                out[rows] = self._forward([ids[row] for row in rows])
        return out

    def _tokens(self, prompt: str, response: str) -> list[int]:
        head, tail = render(self._tokenizer, prompt, response)
        head_ids = self._tokenizer(head, add_special_tokens=False, verbose=False)["input_ids"]
        tail_ids = self._tokenizer(tail, add_special_tokens=False, verbose=False)["input_ids"]
        if self._tokenizer.chat_template:
            ids = fit_tokens(head_ids, tail_ids, self._max_tokens)
        else:
            empty = self._tokenizer("")["input_ids"]
            before, after = empty[: (len(empty) + 1) // 2], empty[(len(empty) + 1) // 2 :]
            ids = [*before, *fit_tokens(head_ids, tail_ids, self._max_tokens - len(empty)), *after]
        # A model must be given something: two empty texts become one padding token.
        return ids or [int(self._tokenizer.pad_token_id or 0)]

    def _forward(self, ids: Sequence[Sequence[int]]) -> NDArray[np.float32]:
        longest = max(len(row) for row in ids)
        padded = torch.full((len(ids), longest), int(self._tokenizer.pad_token_id or 0))
        mask = torch.zeros((len(ids), longest), dtype=torch.long)
        for i, row in enumerate(ids):
            padded[i, : len(row)] = torch.tensor(row)
            mask[i, : len(row)] = 1
        padded, mask = padded.to(self._device), mask.to(self._device)
        hidden: torch.Tensor = self._model(input_ids=padded, attention_mask=mask).last_hidden_state
        if self._pooling == "last":
            pooled = hidden[torch.arange(len(ids), device=hidden.device), mask.sum(1) - 1]
        else:
            weights = mask[..., None].to(hidden.dtype)
            pooled = (hidden * weights).sum(1) / weights.sum(1)
        vectors: NDArray[np.float32] = pooled.float().cpu().numpy()
        return vectors


def _pooling(config: Any) -> Pooling:
    """Sentence encoders (BERT and its kin) see both sides of a token; everything else summarises in its last one."""
    architectures = " ".join(getattr(config, "architectures", None) or ())
    bidirectional = ("bert", "mpnet", "deberta", "electra")
    is_encoder = any(kind in str(config.model_type) for kind in bidirectional) and "Causal" not in architectures
    return "mean" if is_encoder else "last"


def _batches(lengths: Sequence[int]) -> list[list[int]]:
    """Indices in order of length, cut so that rows times the longest row stays within `BATCH_TOKENS`."""
    batches: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lengths.__getitem__):
        # Ascending, so this row is the longest of its batch.
        if batches and (len(batches[-1]) + 1) * lengths[index] <= BATCH_TOKENS:
            batches[-1].append(index)
        else:
            batches.append([index])
    return batches

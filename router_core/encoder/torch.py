"""Any transformers model as a frozen backbone: last-token states of a causal model, mean states of a sentence encoder.

Knows torch and transformers; imported by `encoder.registry` only when a spec asks for it, and by `offline.finetune`,
which trains the model that a backbone holds. Never downloads: a model is a directory that is there.
"""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import AutoConfig, AutoModel, AutoTokenizer
from transformers.utils import logging as transformers_logging

from router_core.encoder.base import Block
from router_core.encoder.formatting import READING_FILE, fit_tokens, render
from router_core.errors import EncoderError

Pooling = Literal["last", "mean"]
Precision = Literal["fp32", "bf16", "fp16"]

DTYPES: dict[Precision, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
MAX_TOKENS = 1024
"""Longest text a backbone reads, unless the model itself takes less; the paper's released code uses the same."""
CPU_BATCH_TOKENS = 1024
"""Padded tokens per forward pass on a CPU. More do not fit its caches: a 135M model was 1.9 times slower at 2048 and
3.7 times at 8192 (docs/offline.md)."""
DEVICE_BATCH_TOKENS = 16384
"""The same on an accelerator, where it bounds memory."""


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
        precision: Precision = "fp32",
    ) -> None:
        """`precision` is what the weights are held and multiplied in; vectors are float32 in any case."""
        self._model = model.to(device=device, dtype=DTYPES[precision]).eval()
        self._tokenizer = tokenizer
        self._spec = spec
        self._pooling = pooling
        self._max_tokens = max_tokens
        self._device = device
        self._dim = int(model.config.hidden_size)  # type: ignore[union-attr, arg-type]
        # Fast tokenizers refuse concurrent use with different settings, and parallel passes only fight for cores.
        self._lock = threading.Lock()
        self._identity: str | None = None

    @classmethod
    def load(
        cls,
        directory: Path,
        spec: str,
        gguf_file: str | None = None,
        max_tokens: int = MAX_TOKENS,
        device: str = "cpu",
        precision: Precision = "fp32",
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
            with _quietly():
                config = AutoConfig.from_pretrained(directory, **options)
                tokenizer = AutoTokenizer.from_pretrained(directory, **options)
                model = AutoModel.from_pretrained(directory, dtype=torch.float32, **options)
        except ImportError as error:
            raise EncoderError(
                f"encoder {spec!r}: {error}; install what is missing with: pip install 'reward-router[train]'"
            ) from error
        except (OSError, ValueError, KeyError) as error:
            raise EncoderError(f"encoder {spec!r}: transformers cannot load {directory} ({error})") from error
        if gguf_file:
            _forget_quantization(model)
        reading = _reading(directory)
        limit = getattr(config, "max_position_embeddings", None) or max_tokens
        longest = min(max_tokens, int(limit), int(reading.get("max_tokens", max_tokens)))
        pooling = reading.get("pooling", _pooling(config))
        return cls(model, tokenizer, spec, pooling, longest, device, precision)

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

    @property
    def identity(self) -> str:
        """SHA-256 over weights, tokenizer, precision, pooling and longest text: equal identities, equal rows."""
        with self._lock:
            if self._identity is None:
                self._identity = self._digest()
            return self._identity

    @property
    def model(self) -> torch.nn.Module:
        """The transformer itself, for training. Whoever changes it makes a new backbone of it afterwards."""
        return self._model

    @property
    def tokenizer(self) -> Any:
        """The transformers tokenizer."""
        return self._tokenizer

    @property
    def pooling(self) -> Pooling:
        """How hidden states become one vector."""
        return self._pooling

    @property
    def max_tokens(self) -> int:
        """Longest text that is read."""
        return self._max_tokens

    @property
    def precision(self) -> Precision:
        """What the weights are held in."""
        dtype = next(self._model.parameters()).dtype
        return next(name for name, one in DTYPES.items() if one is dtype)

    @property
    def device(self) -> str:
        """Where the weights are."""
        return self._device

    def embed(self, conversations: Sequence[tuple[str, str]]) -> NDArray[np.float32]:
        """(N, dim) float32. Texts of like length share a batch, so little is padded and nothing to a fixed length."""
        with self._lock:
            ids = [self.token_ids(prompt, response) for prompt, response in conversations]
        out = self.embed_ids(ids)
        if not np.isfinite(out).all():
            raise EncoderError(
                f"encoder {self._spec!r} gave NaN or infinity; check its weights, or load it in another precision"
            )
        return out

    def embed_ids(self, ids: Sequence[Sequence[int]]) -> NDArray[np.float32]:
        """(N, dim) float32 of N lists of token ids, none empty; NaN and infinity are left in."""
        out = np.empty((len(ids), self._dim), dtype=np.float32)
        budget = CPU_BATCH_TOKENS if self._device == "cpu" else DEVICE_BATCH_TOKENS
        with self._lock, torch.inference_mode():
            for rows in batches_by_length([len(row) for row in ids], budget):
                out[rows] = self.pool([ids[row] for row in rows]).float().cpu().numpy()
        return out

    def token_ids(self, prompt: str, response: str, max_tokens: int | None = None) -> list[int]:
        """What the model reads of a conversation; never empty, at most `max_tokens` (by default the backbone's)."""
        budget = min(max_tokens or self._max_tokens, self._max_tokens)
        head, tail = render(self._tokenizer, prompt, response)
        head_ids = self._tokenizer(head, add_special_tokens=False, verbose=False)["input_ids"]
        tail_ids = self._tokenizer(tail, add_special_tokens=False, verbose=False)["input_ids"]
        if self._tokenizer.chat_template:
            ids = fit_tokens(head_ids, tail_ids, budget)
        else:
            empty = self._tokenizer("")["input_ids"]
            before, after = empty[: (len(empty) + 1) // 2], empty[(len(empty) + 1) // 2 :]
            ids = [*before, *fit_tokens(head_ids, tail_ids, budget - len(empty)), *after]
        # A model must be given something: two empty texts become one padding token.
        return ids or [int(self._tokenizer.pad_token_id or 0)]

    def pool(self, ids: Sequence[Sequence[int]]) -> torch.Tensor:
        """One forward pass: B rows of token ids to (B, dim), padded on the right to the longest of them."""
        longest = max(len(row) for row in ids)
        padded = torch.full((len(ids), longest), int(self._tokenizer.pad_token_id or 0))
        mask = torch.zeros((len(ids), longest), dtype=torch.long)
        for i, row in enumerate(ids):
            padded[i, : len(row)] = torch.tensor(row)
            mask[i, : len(row)] = 1
        padded, mask = padded.to(self._device), mask.to(self._device)
        options = {"use_cache": False} if self._pooling == "last" else {}
        hidden: torch.Tensor = self._model(input_ids=padded, attention_mask=mask, **options).last_hidden_state
        if self._pooling == "last":
            return hidden[torch.arange(len(ids), device=hidden.device), mask.sum(1) - 1]
        weights = mask[..., None].to(hidden.dtype)
        return (hidden * weights).sum(1) / weights.sum(1)

    def save(self, directory: Path) -> None:
        """Write model and tokenizer as a transformers directory, with how this backbone reads them beside."""
        with _quietly():
            self._model.save_pretrained(directory)  # type: ignore[operator]
            self._tokenizer.save_pretrained(directory)
        reading = {"max_tokens": self._max_tokens, "pooling": self._pooling}
        (directory / READING_FILE).write_text(json.dumps(reading) + "\n", "utf-8")

    def _digest(self) -> str:
        facts = {
            "dtype": str(next(self._model.parameters()).dtype),
            "max_tokens": self._max_tokens,
            "pooling": self._pooling,
            "chat_template": self._tokenizer.chat_template,
            "tokenizer": self._tokenizer.backend_tokenizer.to_str(),
        }
        digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode())
        for name, tensor in sorted(self._model.state_dict().items()):
            digest.update(f"\n{name} {tuple(tensor.shape)}\n".encode())
            digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
        return digest.hexdigest()


@contextmanager
def _quietly() -> Iterator[None]:
    """No progress bars from transformers, nor its report that a language model's head was not loaded."""
    verbosity, bars = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if bars:
            transformers_logging.enable_progress_bar()  # type: ignore[no-untyped-call]


def _forget_quantization(model: Any) -> None:
    """A GGUF file's weights are plain numbers once loaded, but transformers still takes the model for a quantized one,
    which it would neither save nor let be trained.
    """
    model.hf_quantizer = None
    model.is_quantized = False
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config


def _reading(directory: Path) -> dict[str, Any]:
    """What `TorchBackbone.save` wrote beside a model; nothing for any other directory."""
    try:
        reading: dict[str, Any] = json.loads((directory / READING_FILE).read_text("utf-8"))
    except OSError:
        return {}
    return reading


def _pooling(config: Any) -> Pooling:
    """Sentence encoders (BERT and its kin) see both sides of a token; everything else summarises in its last one."""
    architectures = " ".join(getattr(config, "architectures", None) or ())
    bidirectional = ("bert", "mpnet", "deberta", "electra")
    is_encoder = any(kind in str(config.model_type) for kind in bidirectional) and "Causal" not in architectures
    return "mean" if is_encoder else "last"


def batches_by_length(lengths: Sequence[int], budget: int) -> list[list[int]]:
    """Indices in order of length, cut so that rows times the longest row stays within `budget`.

    A row that is longer than the budget is a batch of its own.

    >>> batches_by_length([5, 1, 2, 9], 6)
    [[1, 2], [0], [3]]
    """
    batches: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lengths.__getitem__):
        # Ascending, so this row is the longest of its batch.
        if batches and (len(batches[-1]) + 1) * lengths[index] <= budget:
            batches[-1].append(index)
        else:
            batches.append([index])
    return batches

"""A small worker that runs a reward model on the CPU with transformers and answers as vLLM does.

For laptops and CI; `vllm serve` is for the rest. One thread runs the model: whatever has arrived while it was busy is
batched together, shortest first. Rewards are transformers' own logits, pooling included, so they differ from vLLM's
for a text that ends in pad tokens (transformers skips those). Over-long input is refused, never truncated.
`reward-router worker` runs it. With `generating` and `inference`, the only modules of `service` that import torch.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import jinja2
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from service.errors import ConfigurationError
from service.scorers.wire import ServedModel
from service.workers.inference import Job, ModelThread, settle
from service.workers.server import ApiError, Content, Scored, WorkerApp

BATCH_TOKENS: Final = 4096
"""Tokens of one forward pass, padding included; bounds memory and the wait of what comes next."""

BATCH_ITEMS: Final = 64
"""Texts of one forward pass."""


@dataclass(frozen=True, slots=True)
class CpuModel:
    """One loaded reward model. `model` and `tokenizer` are transformers' own objects."""

    name: str
    model: Any
    tokenizer: Any
    max_length: int
    vocabulary: int
    pad_id: int | None
    raw_by_default: bool


@dataclass(frozen=True, slots=True)
class _Text:
    """One text to be scored, and by which model."""

    model: CpuModel
    ids: list[int]


def load_model(name: str, directory: Path, *, max_length: int | None = None, dtype: str = "float32") -> CpuModel:
    """Load a reward model, of one label or several, and its tokenizer from a directory.

    Args:
        name: under which it is served.
        directory: as `save_pretrained` writes it.
        max_length: tokens at most; the model's own limit when None.
        dtype: torch's name of a floating type.

    Raises:
        ConfigurationError: the directory cannot be loaded.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(directory, local_files_only=True)
        model = AutoModelForSequenceClassification.from_pretrained(
            directory, local_files_only=True, dtype=getattr(torch, dtype)
        )
    except (OSError, ValueError, AttributeError) as error:
        raise ConfigurationError(f"model {name!r}: {directory} cannot be loaded: {error}") from error
    # Scoring reads each text once; a key-value cache would only be filled.
    model.config.use_cache = False
    own_limit = getattr(model.config, "max_position_embeddings", None)
    return CpuModel(
        name=name,
        model=model.eval(),
        tokenizer=tokenizer,
        max_length=min(filter(None, (max_length, own_limit)), default=tokenizer.model_max_length),
        vocabulary=model.get_input_embeddings().num_embeddings,
        pad_id=model.config.pad_token_id,
        raw_by_default=model.config.problem_type == "regression",
    )


def cpu_app(
    models: Mapping[str, Path] | Sequence[Path],
    *,
    max_length: int | None = None,
    dtype: str = "float32",
    threads: int | None = None,
) -> WorkerApp:
    """The worker for one or more models of one process.

    Args:
        models: served name -> directory; for a sequence the directories' names are the served names.
        max_length: see `load_model`.
        dtype: see `load_model`.
        threads: torch's threads for one operation; torch's default when None.

    Raises:
        ConfigurationError: see `load_model`; no model; two models of one name.
    """
    named = models if isinstance(models, Mapping) else {path.name: path for path in models}
    if not named or len(named) != len(models):
        raise ConfigurationError("a CPU worker needs at least one model, and names that differ")
    loaded = [load_model(name, path, max_length=max_length, dtype=dtype) for name, path in named.items()]
    return WorkerApp(CpuBackend(loaded, threads=threads))


class CpuBackend:
    """Tokenizes in one thread and infers in another. Implements `service.workers.server.Backend`."""

    def __init__(self, models: Sequence[CpuModel], *, threads: int | None = None) -> None:
        self._loaded = {model.name: model for model in models}
        self._models = tuple(
            ServedModel(model.name, root=model.name, max_model_len=model.max_length) for model in models
        )
        self._inferring: ModelThread[_Text, list[float]] = ModelThread("infer", _infer, threads=threads)
        self._tokenizing: ThreadPoolExecutor | None = None

    @property
    def models(self) -> Sequence[ServedModel]:
        return self._models

    async def start(self) -> None:
        """Start the two threads."""
        # One thread: fast tokenizers change shared state while they run and refuse a second caller.
        self._tokenizing = ThreadPoolExecutor(1, thread_name_prefix="tokenize")
        self._inferring.start()

    async def stop(self) -> None:
        """Finish what is queued and end the threads."""
        await self._inferring.stop()
        if self._tokenizing is not None:
            self._tokenizing.shutdown()

    def raw_by_default(self, model: str) -> bool:
        return self._loaded[model].raw_by_default

    async def score(self, model: str, contents: Sequence[Content], *, add_special_tokens: bool) -> list[Scored]:
        loaded = self._loaded[model]
        loop = asyncio.get_running_loop()
        rows = await loop.run_in_executor(self._tokenizing, tokenize, loaded, contents, add_special_tokens)
        logits = await asyncio.gather(*[self._inferring.submit(_Text(loaded, ids)) for ids in rows])
        return [Scored(first, len(ids), tuple(rest)) for (first, *rest), ids in zip(logits, rows, strict=True)]

    async def tokenize(
        self, model: str, content: Content, *, add_generation_prompt: bool, add_special_tokens: bool
    ) -> list[int]:
        return await asyncio.get_running_loop().run_in_executor(
            self._tokenizing, _ids, self._loaded[model], content, add_special_tokens, add_generation_prompt
        )


def _infer(jobs: Sequence[Job[_Text, list[float]]]) -> None:
    """Score what waits, in batches of texts of like lengths and of one model."""
    for batch in batches([len(job.work.ids) for job in jobs]):
        by_model: dict[str, list[Job[_Text, list[float]]]] = {}
        for index in batch:
            by_model.setdefault(jobs[index].work.model.name, []).append(jobs[index])
        for group in by_model.values():
            settle(group, lambda texts: forward(texts[0].model, [text.ids for text in texts]))


def tokenize(loaded: CpuModel, contents: Sequence[Content], add_special_tokens: bool) -> list[list[int]]:
    """The token ids of each content, within the model's limits.

    Raises:
        ApiError: empty, over-long, out of vocabulary, or refused by the chat template.
    """
    rows = [_ids(loaded, content, add_special_tokens) for content in contents]
    for ids in rows:
        if not ids:
            raise ApiError("The input is empty: it has no tokens.", param="input")
        if len(ids) > loaded.max_length:
            raise ApiError(
                f"This model's maximum context length is {loaded.max_length} tokens. However, your request has "
                f"{len(ids)} input tokens. Please reduce the length of the input messages.",
                param="input_tokens",
            )
    return rows


def batches(lengths: Sequence[int]) -> list[list[int]]:
    """Indices of texts, shortest first, cut so that padding each batch to its longest stays within the bounds.

    >>> batches([3, 1, 2])
    [[1, 2, 0]]
    """
    result: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lengths.__getitem__):
        batch = result[-1] if result else None
        if batch is None or len(batch) >= BATCH_ITEMS or (len(batch) + 1) * lengths[index] > BATCH_TOKENS:
            result.append([index])
        else:
            batch.append(index)
    return result


def forward(loaded: CpuModel, rows: Sequence[Sequence[int]]) -> list[list[float]]:
    """The logits of some id lists, one per label, in one forward pass; equal to transformers' of each list alone.

    A model without a pad token cannot be batched by transformers, so its lists go one by one.
    """
    if loaded.pad_id is None and len(rows) > 1:
        return [forward(loaded, [row])[0] for row in rows]
    longest = max(len(row) for row in rows)
    ids = torch.full((len(rows), longest), loaded.pad_id or 0, dtype=torch.long)
    mask = torch.zeros((len(rows), longest), dtype=torch.long)
    for index, row in enumerate(rows):
        ids[index, : len(row)] = torch.tensor(row, dtype=torch.long)
        mask[index, : len(row)] = 1
    with torch.inference_mode():
        logits = loaded.model(input_ids=ids, attention_mask=mask).logits
    told: list[list[float]] = logits.float().tolist()
    return told


def _ids(
    loaded: CpuModel, content: Content, add_special_tokens: bool, add_generation_prompt: bool = False
) -> list[int]:
    tokenizer = loaded.tokenizer
    if isinstance(content, str):
        return list(tokenizer(content, add_special_tokens=add_special_tokens)["input_ids"])
    ids = [item for item in content if isinstance(item, int)]
    if len(ids) == len(content):
        if any(not 0 <= token < loaded.vocabulary for token in ids):
            raise ApiError(f"Token id out of vocabulary (0 to {loaded.vocabulary - 1}).", param="input")
        return ids
    turns = [{"role": item[0], "content": item[1]} for item in content if isinstance(item, tuple)]
    if tokenizer.chat_template is None:
        raise ApiError("This model has no chat template; send input instead of messages.", param="messages")
    try:
        text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=add_generation_prompt)
    except (jinja2.TemplateError, TypeError, ValueError, LookupError) as error:
        raise ApiError(f"The chat template cannot read these messages: {error}", param="messages") from error
    return list(tokenizer(text, add_special_tokens=add_special_tokens)["input_ids"])

"""Ask the real demo models about pairs: fill in each pair's scores and verdicts.

Works for any Hugging Face sequence classifier with one label and a chat template. Knows nothing of training. Called by
the demo command to write offline data, and by `report` callers to measure the pool.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer
from transformers.utils import logging as transformers_logging

from router_core.records import LabelledPair, verdict_of
from router_core.torch_threads import torch_threads


def score_texts(texts: Sequence[str], model: Any, tokenizer: Any, *, batch_size: int = 64) -> list[float]:
    """Return the raw logit of every rendered conversation, in order.

    Texts are scored in batches of similar length, padded on the right and masked; no special tokens are added.

    Raises:
        ValueError: batch_size below 1.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}; use 1 or more")
    if not texts:
        return []
    encoded: list[list[int]] = tokenizer(list(texts), add_special_tokens=False)["input_ids"]
    order = sorted(range(len(texts)), key=lambda i: len(encoded[i]))
    scores = [0.0] * len(texts)
    for start in range(0, len(order), batch_size):
        rows = order[start : start + batch_size]
        batch = tokenizer.pad({"input_ids": [encoded[i] for i in rows]}, padding_side="right", return_tensors="pt")
        with torch.inference_mode():
            logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, 0]
        for row, score in zip(rows, logits.tolist(), strict=True):
            scores[row] = score
    return scores


def label_pairs(
    pairs: Sequence[LabelledPair], model_dirs: Sequence[Path], *, batch_size: int = 64, threads: int = 1
) -> list[LabelledPair]:
    """Return the pairs with the score and verdict of every model, named after its directory, added to those they have.

    `threads` is torch's, set for the call and put back: models this small gain nothing from a second one, and lose much
    when they share the cores.

    Raises:
        OSError: a directory holds no model or no tokenizer.
        ValueError: two directories have one name.
    """
    names = [directory.name for directory in model_dirs]
    if len(set(names)) != len(names):
        raise ValueError(f"model directories {names} share a name; rename one")
    scores: list[dict[str, tuple[float, ...]]] = [dict(pair.scores) for pair in pairs]
    for directory in model_dirs:
        tokenizer: Any = AutoTokenizer.from_pretrained(directory)
        with no_progress_bar():
            model: Any = AutoModelForSequenceClassification.from_pretrained(directory, dtype=torch.float32).eval()
        texts: list[str] = [
            tokenizer.apply_chat_template(
                [{"role": "user", "content": pair.instance.prompt}, {"role": "assistant", "content": response}],
                tokenize=False,
            )
            for pair in pairs
            for response in pair.instance.responses
        ]
        with torch_threads(threads):
            flat = iter(score_texts(texts, model, tokenizer, batch_size=batch_size))
        for pair, row in zip(pairs, scores, strict=True):
            row[directory.name] = tuple(next(flat) for _ in pair.instance.responses)
    return [
        replace(pair, scores=row, verdicts={**pair.verdicts, **{name: verdict_of(row[name]) for name in names}})
        for pair, row in zip(pairs, scores, strict=True)
    ]


@contextmanager
def no_progress_bar() -> Iterator[None]:
    """Keep transformers from drawing on stderr while it loads; the process-wide switch is put back."""
    enabled = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        if enabled:
            transformers_logging.enable_progress_bar()  # type: ignore[no-untyped-call]

"""What transformers itself says: the logits and states that vLLM must repeat."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import transformers

from router_core.demo.domains import generate_stream

TOLERANCE = 1e-4
"""Absolute difference of a reward, both sides in float32; measured: 5e-6 over 200 texts, rewards from -10 to 8."""


def some_items(count: int, seed: int = 7) -> list[tuple[str, str]]:
    """(prompt, response) of every demo domain; half of them wrong responses."""
    pairs = generate_stream((count + 1) // 2, np.random.default_rng(seed))
    items = [(pair.instance.prompt, response) for pair in pairs for response in pair.instance.responses]
    return items[:count]


class Reference:
    """A reward model under transformers, one text at a time, so without padding."""

    def __init__(self, directory: Path) -> None:
        self.tokenizer = transformers.AutoTokenizer.from_pretrained(directory, local_files_only=True)
        self._model = transformers.AutoModelForSequenceClassification.from_pretrained(
            directory, local_files_only=True, dtype=torch.float32
        ).eval()

    def ids(self, prompt: str, response: str) -> list[int]:
        """Token ids by the model's own chat template."""
        turns = [{"role": "user", "content": prompt}, {"role": "assistant", "content": response}]
        text = self.tokenizer.apply_chat_template(turns, tokenize=False)
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def rewards(self, items: Sequence[tuple[str, str]]) -> list[float]:
        """Raw logits of the first label."""
        return [row[0] for row in self.labels(items)]

    def labels(self, items: Sequence[tuple[str, str]]) -> list[list[float]]:
        """Raw logits of every label."""
        with torch.inference_mode():
            return [self._model(torch.tensor([self.ids(*item)])).logits[0].tolist() for item in items]

"""The research pipeline's way, as its released code does it: transformers, everything in one process, no server.

    python -m loadtests.gpu.research --rm DIR --encoder DIR --pairs FILE --device cuda

RMs score in half precision, in chunks of 8 responses, each padded to the longest of its chunk; the encoder reads in
fp32, every text padded to 1,024 tokens. A process of its own, so that its memory is free when it ends. Prints one JSON
object.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModel, AutoModelForSequenceClassification, AutoTokenizer

CHUNK = 8
"""Responses of one forward pass."""


def measure(rm: Path, encoder: Path, pairs: Sequence[dict[str, Any]], device: str, padded: int) -> dict[str, float]:
    """Responses/s of the RM and encodings/s of the encoder, and the seconds of one pair's two encodings.

    Args:
        rm: directory of one reward model.
        encoder: directory of the encoder.
        pairs: with `prompt` and two `responses`.
        device: as torch names it.
        padded: tokens that each text is padded to for the encoder.
    """
    conversations = [
        [{"role": "user", "content": pair["prompt"]}, {"role": "assistant", "content": response}]
        for pair in pairs
        for response in pair["responses"]
    ]
    half = torch.float16 if device != "cpu" else torch.float32
    scored = _scoring(rm, conversations, device, half)
    encoded, one_pair = _encoding(encoder, conversations, device, padded)
    return {"responses_per_second": scored, "encodings_per_second": encoded, "one_pair_encoding_ms": one_pair * 1e3}


def _scoring(directory: Path, conversations: Sequence[Any], device: str, dtype: torch.dtype) -> float:
    tokenizer = AutoTokenizer.from_pretrained(directory, local_files_only=True)
    model = AutoModelForSequenceClassification.from_pretrained(directory, local_files_only=True, dtype=dtype)
    model = model.to(device).eval()
    texts = [tokenizer.apply_chat_template(turns, tokenize=False) for turns in conversations]

    def score(chunk: Sequence[str]) -> None:
        inputs = tokenizer(chunk, return_tensors="pt", padding=True, truncation=True).to(device)
        model(**inputs).logits.float().cpu()

    with torch.inference_mode():
        score(texts[:CHUNK])
        began = time.perf_counter()
        for start in range(0, len(texts), CHUNK):
            score(texts[start : start + CHUNK])
        return len(texts) / (time.perf_counter() - began)


def _encoding(directory: Path, conversations: Sequence[Any], device: str, padded: int) -> tuple[float, float]:
    tokenizer = AutoTokenizer.from_pretrained(directory, local_files_only=True)
    model = AutoModel.from_pretrained(directory, local_files_only=True, dtype=torch.float32).to(device).eval()
    texts = [tokenizer.apply_chat_template(turns, tokenize=False) for turns in conversations]

    def encode(chunk: Sequence[str]) -> None:
        inputs = tokenizer(chunk, return_tensors="pt", padding="max_length", truncation=True, max_length=padded).to(
            device
        )
        hidden = model(**inputs).last_hidden_state
        last = inputs["attention_mask"].sum(1) - 1
        hidden[torch.arange(len(chunk), device=hidden.device), last].float().cpu()

    with torch.inference_mode():
        encode(texts[:2])
        seconds = []
        began = time.perf_counter()
        for start in range(0, len(texts), 2):
            one = time.perf_counter()
            encode(texts[start : start + 2])
            seconds.append(time.perf_counter() - one)
        return len(texts) / (time.perf_counter() - began), sorted(seconds)[len(seconds) // 2]


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(prog="python -m loadtests.gpu.research")
    parser.add_argument("--rm", type=Path, required=True)
    parser.add_argument("--encoder", type=Path, required=True)
    parser.add_argument("--pairs", type=Path, required=True)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--padded", type=int, default=1024)
    options = parser.parse_args()
    pairs = json.loads(options.pairs.read_text("utf-8"))
    print(json.dumps(measure(options.rm, options.encoder, pairs, options.device, options.padded)))


if __name__ == "__main__":
    main()

"""Trainers in processes of their own: how one is run, and what it is given."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tests.support.arms import ScriptedArm

SECONDS = 300.0
"""Longest wait on a busy machine; importing a trainer takes most of it."""


def opinionated_arms() -> list[ScriptedArm]:
    """One RM likes long responses, one short ones, one by a hash: seldom a tie."""
    return [
        ScriptedArm("rm-long", lambda _, response: float(len(response))),
        ScriptedArm("rm-short", lambda _, response: -float(len(response))),
        ScriptedArm("rm-odd", lambda prompt, response: float(sum(map(ord, prompt + response)) % 97)),
    ]


def save_policy(folder: Path) -> Path:
    """A tiny random Llama with a tokenizer that has an end of text: what trainers can train."""
    import transformers

    from tests.support.transformers_dirs import save_transformer

    save_transformer(folder, "llama", chat=True)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    tokenizer.eos_token = "[SEP]"
    tokenizer.save_pretrained(folder)
    return folder


CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def save_chatml_tokenizer(folder: Path) -> Path:
    """A tokenizer of single bytes, which gives every text back as it was, with the template that most policies have."""
    import tokenizers
    import transformers

    letters = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate(["<|im_start|>", "<|im_end|>", *letters])}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<|im_end|>"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Sequence(
        [
            tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            tokenizers.pre_tokenizers.Split(tokenizers.Regex("."), "isolated"),
        ]
    )
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    special = tokenizers.AddedToken("<|im_start|>", special=True)
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|im_end|>", additional_special_tokens=[special]
    )
    fast.chat_template = CHATML
    fast.save_pretrained(folder)
    return folder


def run_python(
    arguments: Sequence[object], environment: Mapping[str, str] | None = None, folder: Path | None = None
) -> subprocess.CompletedProcess[str]:
    """`python arguments`, in a process whose warnings are its own affair; in the folder, if one is given."""
    return subprocess.run(
        [sys.executable, *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=SECONDS,
        check=False,
        env={**os.environ, **(environment or {})},
        cwd=folder,
    )


def run_module(
    module: str, arguments: Sequence[object], environment: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """`python -m module arguments`."""
    return run_python(["-m", module, *arguments], environment)


def result_of(done: subprocess.CompletedProcess[str]) -> Any:
    """What the process printed after `RESULT`."""
    assert done.returncode == 0, done.stderr[-4000:]
    [line] = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    return json.loads(line.removeprefix("RESULT "))

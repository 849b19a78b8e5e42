"""How an exported transformer reads texts, without its weights and without torch: chat template, tokenizer, cutting.

Knows the directory that `router_core.encoder.export` writes; knows no server. `Reading.load` checks itself: it must
give the very token ids that transformers gave when the directory was written. `service.gateway` loads one,
`router_core.encoder.split.SplitEncoder` and `service.encoders.probe` use it.
"""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from numpy.typing import NDArray

from router_core.encoder.base import Block
from router_core.encoder.formatting import (
    READING_FILE,
    READING_VERSION,
    REFERENCES_FILE,
    SEPARATOR,
    fit_tokens,
)
from router_core.errors import EncoderError
from service.errors import ConfigurationError
from service.scorers.rm.render import ChatTemplate, RenderError, load_chat_template

if TYPE_CHECKING:
    from tokenizers import Tokenizer

_AGAIN: Final = "write it with `reward-router encoder export`"


@dataclass(frozen=True, slots=True, eq=False)
class References:
    """What a server is tried with: R texts' token ids, and the states (R, dim) float32 that it must repeat."""

    ids: list[list[int]]
    states: NDArray[np.float32]


class Reading:
    """The reader of one transformer. Safe for several threads; one tokenizes at a time.

    Implements `router_core.encoder.split.TransformerReader`.
    """

    def __init__(
        self,
        spec: str,
        max_tokens: int,
        tokenizer: Tokenizer,
        template: ChatTemplate | None,
        references: References,
        padding: int = 0,
        files: str = "",
    ) -> None:
        """`template` None: texts are joined with `SEPARATOR`, and get the tokenizer's own special tokens.

        `files` is `files_digest` of the checkpoint that the weights lay in.
        """
        self.spec = spec
        self.max_tokens = max_tokens
        self.references = references
        self.files = files
        self._padding = padding
        self._tokenizer = tokenizer
        self._template = template
        # Fast tokenizers refuse concurrent use.
        self._lock = threading.Lock()
        special = list(tokenizer.encode("").ids)
        self._before, self._after = special[: (len(special) + 1) // 2], special[(len(special) + 1) // 2 :]

    @classmethod
    def load(cls, directory: Path) -> Reading:
        """Read an exported directory.

        Raises:
            ConfigurationError: it is not one, or does not give the token ids that it was written with.
        """
        facts = _facts(directory)
        tokenizer = _tokenizer(directory)
        try:
            template = load_chat_template(directory) if _has_template(directory) else None
            states = np.load(directory / REFERENCES_FILE, allow_pickle=False)
            texts = [(str(entry["prompt"]), str(entry["response"])) for entry in facts["references"]]
            ids = [list(map(int, entry["ids"])) for entry in facts["references"]]
            reading = cls(
                str(facts["spec"]),
                int(facts["max_tokens"]),
                tokenizer,
                template,
                References(ids, states.astype(np.float32)),
                int(facts["padding"]),
                str(facts["files"]),
            )
            if not texts or states.shape != (len(ids), int(facts["dim"])):
                raise ValueError(f"the reference states have shape {states.shape}")
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ConfigurationError(
                f"{directory}: lacks what an exported encoder holds ({error!r}); {_AGAIN}"
            ) from error
        found = reading.token_ids(texts)
        if found != ids:
            wrong = next(i for i, (a, b) in enumerate(zip(found, ids, strict=True)) if a != b)
            raise ConfigurationError(
                f"{directory}: reference text {wrong} has other token ids here than when it was exported; tokenizer or "
                f"chat template was altered, or is read differently by this version: {_AGAIN} again"
            )
        return reading

    @property
    def dim(self) -> int:
        """Columns of a state."""
        return int(self.references.states.shape[1])

    @property
    def blocks(self) -> tuple[Block, ...]:
        """One dense block."""
        return (Block(self.dim, dense=True),)

    def token_ids(self, conversations: Sequence[tuple[str, str]]) -> list[list[int]]:
        """What the transformer reads of each (prompt, response), as `TorchBackbone.token_ids` gives it.

        Raises:
            EncoderError: the chat template refuses a conversation.
        """
        if not conversations:
            return []
        try:
            pairs = [self._render(prompt, response) for prompt, response in conversations]
            # The responses of a group share their head: each is tokenized once.
            texts = list(dict.fromkeys(text for pair in pairs for text in pair))
            for text in texts:
                # The tokenizer would panic.
                text.encode()
        except (RenderError, UnicodeEncodeError) as error:
            raise EncoderError(f"encoder {self.spec!r} cannot read a text: {error}") from error
        with self._lock:
            rows = self._tokenizer.encode_batch(texts, add_special_tokens=False)
        ids = {text: row.ids for text, row in zip(texts, rows, strict=True)}
        budget = self.max_tokens - len(self._before) - len(self._after) if self._template is None else self.max_tokens
        out = [fit_tokens(ids[head], ids[tail], budget) for head, tail in pairs]
        if self._template is None:
            out = [[*self._before, *row, *self._after] for row in out]
        # A model must be given something: two empty texts become one padding token.
        return [row or [self._padding] for row in out]

    def _render(self, prompt: str, response: str) -> tuple[str, str]:
        """As `router_core.encoder.formatting.render`."""
        if self._template is None:
            return prompt + SEPARATOR, response
        head = self._template.render_turns([("user", prompt)], add_generation_prompt=True)
        whole = self._template.render_turns([("user", prompt), ("assistant", response)])
        return (head, whole[len(head) :]) if whole.startswith(head) else (head, response)


def files_digest(encoder_files: Mapping[str, str]) -> str:
    """Names the fine-tuned transformer of a checkpoint by `Checkpoint.encoder_files`; "" where there is none."""
    if not encoder_files:
        return ""
    return hashlib.sha256(json.dumps(sorted(encoder_files.items())).encode()).hexdigest()


def _facts(directory: Path) -> dict[str, Any]:
    try:
        facts: dict[str, Any] = json.loads((directory / READING_FILE).read_text("utf-8"))
    except OSError as error:
        raise ConfigurationError(
            f"encoder directory {directory}: {READING_FILE} cannot be read ({error.strerror}); {_AGAIN}"
        ) from error
    except ValueError as error:
        raise ConfigurationError(f"{directory / READING_FILE}: is not JSON ({error}); {_AGAIN} again") from error
    if facts.get("version") != READING_VERSION:
        raise ConfigurationError(
            f"{directory / READING_FILE}: version {facts.get('version')!r}, this program reads {READING_VERSION}; "
            f"{_AGAIN}"
        )
    return facts


def _tokenizer(directory: Path) -> Tokenizer:
    """The tokenizer alone: what its file says of padding and cutting is not wanted here."""
    try:
        from tokenizers import Tokenizer
    except ImportError as error:
        raise ConfigurationError(
            "an encoder over vLLM needs package 'tokenizers'; install it with: pip install 'reward-router[server]'"
        ) from error
    path = directory / "tokenizer.json"
    if not path.is_file():
        raise ConfigurationError(f"{path} does not exist; {_AGAIN}")
    tokenizer = Tokenizer.from_file(str(path))
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return tokenizer


def _has_template(directory: Path) -> bool:
    if (directory / "chat_template.jinja").exists():
        return True
    try:
        return bool(json.loads((directory / "tokenizer_config.json").read_text("utf-8")).get("chat_template"))
    except OSError:
        return False

"""Token ids instead of texts: the RM's chat template and tokenizer, run here once, so that lengths are known.

`TokenRendering` makes of each (prompt, response) the ids that vLLM makes of the same `messages`: the template writes
the special tokens, the tokenizer adds none (two BOS change the reward), and nothing truncates. The registration probe
compares. What is longer than the RM reads is refused here, before anything is sent, or loses prompt tokens on its left;
a response is never cut. Uses `tokenizers`, not transformers. Knows no transport; `service.scorers.rm.client` calls it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import datetime
from pathlib import Path
from typing import Final

import httpx2
from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from tokenizers import Tokenizer

from router_core.records import Said
from service.scorers.rm.render import (
    Content,
    Item,
    Prepared,
    RenderError,
    Template,
    TooLongError,
    length,
    load_chat_template,
    to_json,
)
from service.scorers.wire import ClassifyRequest

TOKENIZER_FILES: Final = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
"""What of a model's repository is needed here."""

HUB_SECONDS: Final = 10.0
"""Longest wait for an answer of the hub. A network that swallows what is sent to it must not keep a gateway from
starting: without a bound each model would cost minutes."""

INLINE_CHARACTERS: Final = 2048
"""Texts shorter than this, all of a call together, are tokenized on the event loop: about 2 ms at most. Handing them to
a thread costs about 0.1 ms."""

PLACE: Final = "\ue000prompt\ue001"
"""Stands for the prompt when it is looked for in the rendered text. Private-use characters, which no template tests."""


class TokenRendering:
    """Many lists of token ids per request, templated and tokenized here.

    Safe for several threads.

    Args:
        template: the RM's.
        tokenizer: the RM's. Its own truncation and padding are switched off.
    """

    def __init__(self, template: Template, tokenizer: Tokenizer) -> None:
        tokenizer.no_truncation()
        tokenizer.no_padding()
        self._template = template
        self._tokenizer = tokenizer

    @property
    def name(self) -> str:
        """As pool files name it."""
        return "tokens"

    @property
    def items_limit(self) -> int | None:
        """Any number."""
        return None

    @property
    def counts_tokens(self) -> bool:
        """Sizes are tokens."""
        return True

    def lengthy(self, groups: Sequence[Sequence[Item]]) -> bool:
        characters = sum(length(prompt) + length(response) for group in groups for prompt, response in group)
        return characters > INLINE_CHARACTERS

    def prepare(
        self, groups: Sequence[Sequence[Item]], *, limit: int | None = None, cut_prompt: bool = False
    ) -> list[Prepared | RenderError]:
        """See `Rendering.prepare`; one pass of the tokenizer over all groups."""
        rendered = [self._texts(group) for group in groups]
        every = [text for texts in rendered if not isinstance(texts, RenderError) for text in texts]
        tokenized = iter(self._ids(every))
        prepared: list[Prepared | RenderError] = []
        for group, texts in zip(groups, rendered, strict=True):
            if isinstance(texts, RenderError):
                prepared.append(texts)
                continue
            ids = [next(tokenized) for _ in texts]
            try:
                prepared.append(self._fitted(group, texts, ids, limit, cut_prompt))
            except RenderError as error:
                prepared.append(error)
        return prepared

    def body(self, model: str, contents: Sequence[Content], *, use_activation: bool | None = False) -> bytes:
        ids: list[str | int | list[int]] = [content for content in contents if isinstance(content, list)]
        return to_json(ClassifyRequest(model=model, input=ids, use_activation=use_activation))

    def _texts(self, group: Sequence[Item]) -> list[str] | RenderError:
        try:
            texts = [self._template.render(prompt, response) for prompt, response in group]
            for text in texts:
                # The tokenizer would panic.
                text.encode()
        except RenderError as error:
            return error
        except UnicodeEncodeError as error:
            return RenderError(f"a text cannot be written as UTF-8: {error.reason}")
        return texts

    def _ids(self, texts: list[str]) -> list[list[int]]:
        if len(texts) <= 2:
            # Not worth the tokenizer's threads.
            return [self._tokenizer.encode(text, add_special_tokens=False).ids for text in texts]
        return [one.ids for one in self._tokenizer.encode_batch_fast(texts, add_special_tokens=False)]

    def _fitted(
        self,
        group: Sequence[Item],
        texts: Sequence[str],
        ids: list[list[int]],
        limit: int | None,
        cut_prompt: bool,
    ) -> Prepared:
        """The ids of the responses that the limit lets in.

        Raises:
            TooLongError: there is none.
        """
        lengths = [len(one) for one in ids]
        longest = max(lengths)
        if longest == 0:
            raise RenderError("the text has no tokens")
        if limit is None or longest <= limit:
            return Prepared(tuple(ids), sum(lengths))

        def shortened(place: int, excess: int) -> list[int] | None:
            return self._without(*group[place], texts[place], excess) if excess > 0 else ids[place]

        kept = {place: one for place, one in enumerate(ids) if lengths[place] <= limit}
        if cut_prompt:
            able = [place for place, size in enumerate(lengths) if shortened(place, size - limit) is not None]
            kept = {}
            while able and not kept:
                # All responses lose the same of their prompt.
                excess = max(lengths[place] for place in able) - limit
                cut = {place: shortened(place, excess) for place in able}
                kept = {place: one for place, one in cut.items() if one is not None}
                if len(kept) < len(able):
                    kept = {}
                    able.remove(max(able, key=lambda place: lengths[place]))
        if not kept:
            tail = ", and cutting the prompt does not make room: a response is never cut" if cut_prompt else ""
            raise TooLongError(f"{longest} tokens are more than the {limit} that it reads{tail}", longest, limit)
        return Prepared(
            tuple(kept.values()),
            sum(map(len, kept.values())),
            max(lengths[place] - len(one) for place, one in kept.items()),
            {place: size for place, size in enumerate(lengths) if place not in kept},
        )

    def _without(self, prompt: Said, response: Said, text: str, excess: int) -> list[int] | None:
        """The text's ids without the first `excess` tokens of the prompt, and without the rest of a character they
        share; None where the prompt has no more tokens than that. A longer conversation loses them from the first
        message that is not the system's.
        """
        head, found, tail = self._template.render(_with_place(prompt), response).partition(PLACE)
        if not found or PLACE in tail or not (text.startswith(head) and text.endswith(tail)):
            # The template writes the prompt twice, not at all, or otherwise than it stands.
            return None
        encoding = self._tokenizer.encode(text, add_special_tokens=False)
        begin, end = len(head), len(text) - len(tail)
        own = [index for index, (first, last) in enumerate(encoding.offsets) if begin <= first < last <= end]
        keep = excess
        while keep < len(own) and encoding.offsets[own[keep]][0] < encoding.offsets[own[keep - 1]][1]:
            # Bytes of one character are tokens of their own.
            keep += 1
        if keep >= len(own):
            return None
        gone = set(own[:keep])
        return [token for index, token in enumerate(encoding.ids) if index not in gone]


def _with_place(prompt: Said) -> Said:
    """Return the prompt with `PLACE` for what may be cut."""
    if isinstance(prompt, str):
        return PLACE
    first = next((index for index, turn in enumerate(prompt) if turn.role != "system"), 0)
    return (*prompt[:first], prompt[first]._replace(text=PLACE), *prompt[first + 1 :])


def load_token_rendering(
    name: str,
    template: str | None = None,
    *,
    revision: str | None = None,
    now: Callable[[], datetime] = datetime.now,
    cache_dir: Path | None = None,
    hub_seconds: float = HUB_SECONDS,
) -> TokenRendering:
    """The rendering `tokens` of a pool file.

    Args:
        name: the RM's directory, or its id on the model hub, from which three files are fetched once.
        template: a `.jinja` file; None for the model's own.
        revision: branch, tag or commit of an id on the hub.
        now: see `ChatTemplate`.
        cache_dir: where fetched files are kept; the hub library's default when None.
        hub_seconds: longest wait for an answer of the hub; what is kept is used when there is none.

    Raises:
        ValueError: no tokenizer or no chat template there.
        OSError: a file cannot be read.
    """
    directory = Path(name) if Path(name).is_dir() else _fetched(name, revision, cache_dir, hub_seconds)
    file = directory / "tokenizer.json"
    if not file.is_file():
        raise ValueError(
            f"{directory} holds no tokenizer.json; save the model's fast tokenizer there, or use rendering 'messages'"
        )
    try:
        tokenizer = Tokenizer.from_file(str(file))
    except Exception as error:
        # The library raises nothing more precise.
        raise ValueError(f"{file} is no tokenizer: {error}") from error
    return TokenRendering(
        load_chat_template(directory, None if template is None else Path(template), now=now), tokenizer
    )


def _fetched(name: str, revision: str | None, cache_dir: Path | None, seconds: float) -> Path:
    """The folder with the files, from the hub or, where it does not answer, as they were fetched before."""
    away: Exception | None = None
    try:
        # Asked first, because the download itself waits for ever.
        HfApi().model_info(name, revision=revision, timeout=seconds)
    # The hub's refusals, no network or offline mode, and the client's own.
    except (HFValidationError, HfHubHTTPError, OSError, httpx2.HTTPError) as error:
        away = error
    try:
        return Path(
            snapshot_download(
                name,
                revision=revision,
                allow_patterns=list(TOKENIZER_FILES),
                cache_dir=cache_dir,
                local_files_only=away is not None,
            )
        )
    except (HFValidationError, HfHubHTTPError, OSError, httpx2.HTTPError) as error:
        raise ValueError(
            f"tokenizer {name!r} is neither a directory nor a model that the hub gives (set HF_TOKEN for one that it "
            f"gives to some only, or use rendering 'messages'): {away or error}"
        ) from error

"""A worker that answers from recorded scores, by content: real reward models' behaviour without their weights.

Looks (prompt, response) up in labelled pairs; a conversation and its text under the template `plain` are the same
content. Content that was never recorded is a 404, never an invented reward. Imports no torch.
`reward-router worker` and the load tests run it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Mapping, Sequence
from typing import Final

from router_core.records import LabelledPair
from router_core.rows import Row
from service.errors import ConfigurationError
from service.scorers.rm.render import plain
from service.scorers.wire import PROBE_PROMPT, PROBE_RESPONSE, ServedModel
from service.workers.server import ApiError, Content, Scored, WorkerApp

PROBE_LOGIT: Final = 0.0
"""Recorded workers' answer to the probe conversation, so that readiness checks need no recorded content."""


class RecordedBackend:
    """Scores by content. Implements `service.workers.server.Backend`.

    Args:
        tables: per model, plain text -> raw score.
        delay_seconds: waited before every answer, to stand for a model's time.
    """

    def __init__(self, tables: Mapping[str, Mapping[str, float]], *, delay_seconds: float = 0.0) -> None:
        self._tables = tables
        self._models = tuple(ServedModel(name, root=name) for name in tables)
        self._delay = delay_seconds

    @property
    def models(self) -> Sequence[ServedModel]:
        return self._models

    async def start(self) -> None:
        """Nothing to load."""

    async def stop(self) -> None:
        """Nothing to release."""

    def raw_by_default(self, model: str) -> bool:
        """Without the flag a recorded worker gives sigmoids, like vLLM."""
        return False

    async def score(self, model: str, contents: Sequence[Content], *, add_special_tokens: bool) -> list[Scored]:
        """See `Backend.score`; token counts are of words, there is no tokenizer."""
        if self._delay:
            await asyncio.sleep(self._delay)
        table = self._tables[model]
        return [self._look_up(model, table, content, index) for index, content in enumerate(contents)]

    def _look_up(self, model: str, table: Mapping[str, float], content: Content, index: int) -> Scored:
        if isinstance(content, str):
            text = content
        elif content and isinstance(content[0], tuple):
            text = plain([turn for turn in content if isinstance(turn, tuple)])
        else:
            raise ApiError("A recorded worker knows texts and messages, not token ids.", param="input")
        score = table.get(text)
        if score is None:
            raise ApiError(
                f"No recorded score of `{model}` for item {index} ({len(text)} characters). This worker answers only "
                "what was recorded: send messages, or texts in the template 'plain', of the recorded pairs.",
                status=404,
                kind="NotFoundError",
                param="input",
            )
        return Scored(score, len(text.split()))


def recorded_app(
    pairs: Iterable[LabelledPair | Row], models: str | Sequence[str], *, delay_seconds: float = 0.0
) -> WorkerApp:
    """The worker for some of the RMs that were recorded.

    Args:
        pairs: what was recorded; `router_core.dataset.load_rows` reads them, and no label is needed.
        models: names in the pairs' `scores`, selected by the request's `model`; the first is the default.
        delay_seconds: see `RecordedBackend`.

    Raises:
        ConfigurationError: no model named, or a model without a single score.
    """
    names = [models] if isinstance(models, str) else list(dict.fromkeys(models))
    if not names:
        raise ConfigurationError("a recorded worker needs at least one model")
    return WorkerApp(RecordedBackend(score_tables(pairs, names), delay_seconds=delay_seconds))


def score_tables(pairs: Iterable[LabelledPair | Row], models: Sequence[str]) -> dict[str, dict[str, float]]:
    """Per model, plain text -> raw score, the probe conversation included.

    Where a file records the same content twice, the first stands: an RM's score of a text does not depend on the pair.

    Raises:
        ConfigurationError: a model without a single score.
    """
    tables: dict[str, dict[str, float]] = {model: {} for model in models}
    known: set[str] = set()
    for pair in pairs:
        instance = pair.instance
        known.update(pair.scores)
        texts = [plain([("user", instance.prompt), ("assistant", response)]) for response in instance.responses]
        for model in models:
            for text, score in zip(texts, pair.scores.get(model, ()), strict=False):
                tables[model].setdefault(text, float(score))
    for model, table in tables.items():
        if not table:
            raise ConfigurationError(f"no score of {model!r} is recorded; recorded are {', '.join(sorted(known))}")
        table.setdefault(plain([("user", PROBE_PROMPT), ("assistant", PROBE_RESPONSE)]), PROBE_LOGIT)
    return tables

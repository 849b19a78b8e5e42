"""Rows before and after labelling: which (row, RM) are still to be asked, and rows with what was answered put in.

Knows the row format and the journal's answers, and counts them; asks nobody and writes nothing. Called by the command
`label`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec

from router_core.records import TIE, Instance, correctness, verdict_of
from router_core.rows import Row, judgement
from service.lab.labelling.ask import ABSTAINED, reason_kind
from service.lab.labelling.journal import Answer, content_key

MISSING_FIELD = "rm_missing"
"""Field of a written row, {RM: reason}, for the RMs that were asked and gave no score."""

Answers = Mapping[tuple[str, str], Answer]
"""By (content, model)."""


@dataclass(frozen=True, slots=True)
class Known:
    """What needs no asking: scores or verdicts in the rows, and answers of earlier runs.

    Attributes:
        rows: the input.
        keys: the content key of each row.
        earlier: what an output of before holds.
        journal: what the run holds that this one goes on with.
    """

    rows: Sequence[Row]
    keys: Sequence[str]
    earlier: Answers
    journal: Answers

    @property
    def answers(self) -> Answers:
        """Both; the newer ones count."""
        return {**self.earlier, **self.journal}

    def to_ask(self, model: str, *, retry_missing: bool, again: bool) -> list[tuple[str, Instance]]:
        """The distinct contents that this RM has not answered, in the order of the rows.

        Args:
            retry_missing: ask again what the RM refused.
            again: ask everything that the journal does not hold.
        """
        answers = self.journal if again else self.answers
        wanted: dict[str, Instance] = {}
        for key, row in zip(self.keys, self.rows, strict=True):
            answer = answers.get((key, model))
            settled = answer is not None and (answer.scores is not None or not retry_missing)
            if not settled and (again or model not in row.verdicts):
                wanted.setdefault(key, row.instance)
        return list(wanted.items())


def earlier_answers(rows: Sequence[Row]) -> dict[tuple[str, str], Answer]:
    """What the rows of an earlier output hold, as answers: scores, and the reasons of those that have none."""
    answers: dict[tuple[str, str], Answer] = {}
    for row in rows:
        key = content_key(row.instance)
        for model, scores in row.scores.items():
            answers[key, model] = Answer(key, model, scores=scores)
        for model, reason in _reasons(row).items():
            answers[key, model] = Answer(key, model, reason=reason)
    return answers


def labelled_lines(known: Known, models: Sequence[str]) -> list[bytes]:
    """The rows, in order, each with the answers put in; everything else of a row stays as it is.

    An answer with scores replaces what the row held; a refusal is noted where the row holds no verdict.

    Args:
        models: the RMs whose names come first; others that have answered follow.
    """
    answers = known.answers
    names = list(dict.fromkeys([*models, *(model for _, model in answers)]))
    return [_labelled(row, key, answers, names) for row, key in zip(known.rows, known.keys, strict=True)]


def summarise(known: Known, asked: Mapping[str, int]) -> dict[str, Any]:
    """What was asked and answered per RM; `accuracy` over the labelled rows that it judged, its ties one
    half. Rows that are labelled a tie have no right answer.

    Args:
        asked: contents that each RM was asked about in this run.
    """
    return {
        "rows": len(known.rows),
        "models": {model: {"asked": count, **_summary(known, model)} for model, count in asked.items()},
    }


def _summary(known: Known, model: str) -> dict[str, Any]:
    answers = known.answers
    reasons: Counter[str] = Counter()
    right: list[float] = []
    scored = 0
    for row, key in zip(known.rows, known.keys, strict=True):
        answer = answers.get((key, model))
        scores = None if answer is None else answer.scores
        verdict = row.verdicts.get(model) if scores is None else verdict_of(scores)
        if verdict is not None:
            scored += 1
            if row.label is not None and row.label != TIE:
                right.append(correctness(verdict, scores, len(row.instance.responses), row.label))
        elif answer is not None and answer.reason is not None:
            reasons[reason_kind(answer.reason)] += 1
    return {"scored": scored, "missing": dict(reasons), "accuracy": sum(right) / len(right) if right else None}


def _labelled(row: Row, key: str, answers: Answers, models: Sequence[str]) -> bytes:
    fields: dict[str, Any] = dict(row.fields)
    judged: dict[str, Any] = dict(fields.get("rm") or {})
    reasons = _reasons(row)
    lettered = fields.get("responses") is None
    for model in models:
        answer = answers.get((key, model))
        if answer is None:
            continue
        if answer.scores is not None:
            judged[model] = judgement(answer.scores, verdict_of(answer.scores), lettered=lettered)
            reasons.pop(model, None)
        elif model not in row.verdicts and answer.reason is not None:
            reasons[model] = answer.reason
            if reason_kind(answer.reason) == ABSTAINED:
                judged[model] = {"abstained": True}
    fields["rm"] = judged
    fields.pop(MISSING_FIELD, None)
    if reasons:
        fields[MISSING_FIELD] = reasons
    return msgspec.json.encode(fields)


def _reasons(row: Row) -> dict[str, str]:
    """A row's `rm_missing`; what is no object of texts was not written here and says nothing."""
    found = row.fields.get(MISSING_FIELD)
    if not isinstance(found, dict):
        return {}
    return {model: reason for model, reason in found.items() if isinstance(reason, str)}

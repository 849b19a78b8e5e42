"""One row of the labelled-pair format: JSON to checked values, and back.

Knows the fields of docs/data.md and the place of the row, so that every complaint names file, line, field, value and
remedy. Knows nothing of whole files, groups' folds or pools. Called by `router_core.dataset`, and by the `label`
command for rows that have no label yet.

A row has two responses (`response_a`, `response_b`) or a list of them (`responses`); a response is named by its letter
or by its index, and an RM's scores are `score_a` and `score_b`, or a list (`scores`), in the order of the responses. A
verdict without scores is enough: judges and leaderboards give no more.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from string import ascii_lowercase
from typing import Any

import msgspec

from router_core.errors import DatasetError
from router_core.records import (
    MAX_ABS_SCORE,
    TIE,
    Fact,
    Instance,
    LabelledPair,
    Message,
    Said,
    Turns,
    leaders_of,
    verdict_of,
)
from router_core.turns import chat_message, text_of, turns_of

_HUMANEVALPACK_TASK = re.compile(r"(?:^|/)hep-[^/]+/([^/]+)$")
_TIE = "tie"
_SCORE_FIELDS = ("score_a", "score_b", "scores")


@dataclass(frozen=True, slots=True)
class Row:
    """One checked row.

    Attributes:
        fields: the row as it was written, unknown fields included.
        id, instance, scores, verdicts, domain, subset, group, abstained: as `LabelledPair`.
        label: index of the better response; TIE if they are equally good; None if the row has none.
    """

    fields: Mapping[str, Any]
    id: str
    instance: Instance
    label: int | None
    scores: Mapping[str, tuple[float, ...]]
    verdicts: Mapping[str, int]
    domain: str
    subset: str
    group: str
    abstained: frozenset[str] = frozenset()


def parse_row(file: Path, number: int, line: bytes) -> Row:
    """Check one line of a JSON Lines file; the label may be absent.

    Raises:
        DatasetError: the line is no object, or a field does not fit.
    """
    try:
        fields = msgspec.json.decode(line)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise complaint(file, number, "(row)", line[:60], f"write one JSON object a line ({error})") from error
    if not isinstance(fields, dict):
        raise complaint(file, number, "(row)", fields, "write one JSON object a line")
    if "chosen" in fields and "rejected" in fields:
        raise complaint(
            file, number, "chosen", fields["chosen"], "run `reward-router convert`, which makes rows of published data"
        )
    return _Reader(file, number, fields).read()


def complaint(file: Path, number: int, field: str, value: object, remedy: str) -> DatasetError:
    """The error of one field of one line."""
    shown = repr(value)
    if len(shown) > 80:
        shown = shown[:77] + "..."
    return DatasetError(f"{file}, line {number}: field {field!r} = {shown}: {remedy}")


def encode_pair(pair: LabelledPair) -> bytes:
    """The pair as one line without its end: two responses by letters, several as lists."""
    instance = pair.instance
    lettered = len(instance.responses) == 2
    row: dict[str, object] = {
        "id": pair.id,
        "subset": pair.subset,
        "domain": pair.domain,
        "group": pair.group,
    }
    prompt, *responses = (written(said) for said in (instance.items()[0][0], *[r for _, r in instance.items()]))
    row["prompt"] = prompt
    if lettered:
        row |= {"response_a": responses[0], "response_b": responses[1]}
    else:
        row["responses"] = responses
    if instance.reference is not None:
        row["reference"] = instance.reference
    if instance.metadata:
        row["metadata"] = dict(instance.metadata)
    row["label"] = _name_of(pair.label, lettered)
    row["rm"] = {
        name: judgement(pair.scores.get(name), verdict, lettered=lettered)
        for name, verdict in sorted(pair.verdicts.items())
    } | {name: {"abstained": True} for name in sorted(pair.abstained)}
    return msgspec.json.encode(row)


def written(said: Said) -> object:
    """Return a text as it is, and messages as the objects of a row or request."""
    return said if isinstance(said, str) else [chat_message(turn) for turn in said]


def judgement(scores: tuple[float, ...] | None, verdict: int, *, lettered: bool) -> dict[str, object]:
    """What one RM said of a row, in the format's words: `score_a`, `score_b` and a letter, or `scores` and an index;
    the letter or index alone where it gave no scores.
    """
    if scores is None:
        return {"verdict": _name_of(verdict, lettered)}
    if lettered:
        a, b = scores
        return {"score_a": a, "score_b": b, "verdict": _name_of(verdict, lettered)}
    return {"scores": list(scores), "verdict": _name_of(verdict, lettered)}


def group_of(pair_id: str, prompt: str) -> str:
    """HumanEvalPack poses one task in six languages, so its task number groups; any other row groups by prompt."""
    task = _HUMANEVALPACK_TASK.search(pair_id)
    if task:
        return f"hep/{task.group(1)}"
    return "prompt/" + hashlib.sha256(prompt.encode()).hexdigest()[:16]


def _name_of(index: int, lettered: bool) -> str | int:
    if index == TIE:
        return _TIE
    return ascii_lowercase[index] if lettered else index


class _Reader:
    """One row being read: holds the place, so that every complaint can name it."""

    def __init__(self, file: Path, number: int, fields: dict[str, Any]) -> None:
        self._file = file
        self._number = number
        self._fields = fields

    def read(self) -> Row:
        row_id, (prompt, turns) = self._name("id"), self._said("prompt", self._fields.get("prompt"), "user")
        said = self._responses()
        responses, answers = tuple([text for text, _ in said]), tuple([turns for _, turns in said])
        label = self._label(len(responses))
        scores, verdicts, abstained = self._judgements(len(responses))
        return Row(
            fields=self._fields,
            id=row_id,
            instance=Instance(
                prompt=prompt,
                responses=responses,
                reference=None if self._fields.get("reference") is None else self._text("reference"),
                metadata=self._facts(),
                turns=turns,
                answers=answers if any(turns is not None for turns in answers) else None,
            ),
            label=label,
            scores=scores,
            verdicts=verdicts,
            domain=self._name("domain", default=""),
            subset=self._name("subset", default=""),
            group=self._name("group", default="") or group_of(row_id, prompt),
            abstained=abstained,
        )

    def _responses(self) -> list[tuple[str, Turns | None]]:
        several = self._fields.get("responses")
        if several is None:
            return [self._said(field, self._fields.get(field), "assistant") for field in ("response_a", "response_b")]
        for field in ("response_a", "response_b"):
            if self._fields.get(field) is not None:
                raise self._error(field, self._fields[field], "the row has 'responses' too: give one or the other")
        if not isinstance(several, list) or len(several) < 2:
            raise self._error("responses", several, "give a list of at least two strings")
        return [self._said(f"responses[{index}]", said, "assistant") for index, said in enumerate(several)]

    def _said(self, field: str, value: object, speaker: str) -> tuple[str, Turns | None]:
        """Return a prompt's or a response's text, and its messages where one text of the speaker does not say it."""
        if isinstance(value, str):
            return value, None
        if not isinstance(value, list):
            raise self._error(field, value, "give a string, or a list of messages")
        try:
            turns = turns_of(value)
        except ValueError as error:
            raise self._error(field, value, str(error)) from error
        if turns == (Message(speaker, turns[0].text),):
            return turns[0].text, None
        return text_of(turns), turns

    def _facts(self) -> dict[str, Fact]:
        facts = self._fields.get("metadata")
        if facts is None:
            return {}
        if not isinstance(facts, dict) or not all(
            fact is None or isinstance(fact, str | int | float | bool) for fact in facts.values()
        ):
            raise self._error("metadata", facts, "give a flat object of texts, numbers and booleans")
        return facts

    def _label(self, n: int) -> int | None:
        value = self._fields.get("label")
        if value is None:
            return None
        index = _index_of(value, n)
        if index is None:
            raise self._error("label", value, _choices(n) + ', or "tie"')
        return index

    def _judgements(self, n: int) -> tuple[dict[str, tuple[float, ...]], dict[str, int], frozenset[str]]:
        table = self._fields.get("rm")
        if table is None:
            table = {}
        if not isinstance(table, dict):
            raise self._error("rm", table, "give an object from RM name to scores")
        scores: dict[str, tuple[float, ...]] = {}
        verdicts: dict[str, int] = {}
        abstained: set[str] = set()
        for name, judged in table.items():
            if judged is None:
                continue
            if judged == {"abstained": True}:
                abstained.add(name)
                continue
            if not isinstance(judged, dict):
                raise self._error(f"rm[{name}]", judged, 'give {"score_a": number, "score_b": number}')
            if judged.get("verdict") is not None and all(judged.get(key) is None for key in _SCORE_FIELDS):
                verdicts[name] = self._stated(judged["verdict"], name, n)
                continue
            scores[name] = self._scores(judged, name, n)
            verdicts[name] = self._verdict(judged, name, scores[name])
        return scores, verdicts, frozenset(abstained)

    def _scores(self, judged: dict[str, Any], name: str, n: int) -> tuple[float, ...]:
        several = judged.get("scores")
        if several is None and n == 2:
            return tuple(self._number_at(judged.get(key), f"rm[{name}].{key}") for key in ("score_a", "score_b"))
        if not isinstance(several, list) or len(several) != n:
            raise self._error(
                f"rm[{name}].scores", several, f"give a list of {n} numbers, one a response, or leave the RM out"
            )
        return tuple(self._number_at(value, f"rm[{name}].scores[{i}]") for i, value in enumerate(several))

    def _verdict(self, judged: dict[str, Any], name: str, scores: tuple[float, ...]) -> int:
        derived = verdict_of(scores)
        given = judged.get("verdict")
        if given is None:
            return derived
        verdict = self._stated(given, name, len(scores))
        # Rounded scores may hide the order that the verdict was taken from; only a reversed order is a mistake.
        if verdict != TIE and verdict not in leaders_of(scores):
            best = _name_of(scores.index(max(scores)), lettered=len(scores) == 2)
            shown = " and ".join(map(str, scores)) if len(scores) == 2 else str(list(scores))
            raise self._error(f"rm[{name}].verdict", given, f"its scores {shown} say {best!r}; correct one")
        return verdict

    def _stated(self, given: object, name: str, n: int) -> int:
        verdict = _index_of(given, n)
        if verdict is None:
            raise self._error(f"rm[{name}].verdict", given, _choices(n) + ', or "tie", or leave it out')
        return verdict

    def _number_at(self, value: object, field: str) -> float:
        if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) <= MAX_ABS_SCORE:
            bounds = f"between -{MAX_ABS_SCORE:g} and {MAX_ABS_SCORE:g}"
            remedy = f"give a number {bounds}, a verdict alone, or leave the RM out of this row"
            raise self._error(field, value, remedy)
        return float(value)

    def _text(self, field: str, default: str | None = None) -> str:
        value = self._fields.get(field)
        if value is None and default is not None:
            return default
        if not isinstance(value, str):
            raise self._error(field, value, "give a string")
        return value

    def _name(self, field: str, default: str | None = None) -> str:
        """A name, which may be written as a whole number."""
        value = self._fields.get(field)
        if isinstance(value, int) and not isinstance(value, bool):
            return str(value)
        return self._text(field, default)

    def _error(self, field: str, value: object, remedy: str) -> DatasetError:
        return complaint(self._file, self._number, field, value, remedy)


def _index_of(value: object, n: int) -> int | None:
    """The response that a letter or an index names; TIE for "tie"; None for anything else."""
    if value == _TIE:
        return TIE
    if isinstance(value, str) and len(value) == 1 and value in ascii_lowercase[:n]:
        return ascii_lowercase.index(value)
    if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < n:
        return value
    return None


def _choices(n: int) -> str:
    return 'give "a" or "b"' if n == 2 else f'give the index of a response, 0 to {n - 1}, or its letter from "a"'

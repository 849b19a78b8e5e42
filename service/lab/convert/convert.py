"""One file of preferences to rows of docs/data.md, with an account of what was taken and what was left out.

Knows records, formats and rows; prints nothing. Called by the command `convert`.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec

from router_core.errors import DatasetError
from router_core.rows import written
from service.lab.convert.formats import FORMATS, OURS, Preference, best, format_of
from service.lab.convert.reading import Record, read_records
from service.lab.convert.texts import UnusableError, prompt_of, response_of
from service.lab.labelling.journal import write_atomically

_RATED = "HelpSteer ratings"
_RATED_MEANING = "`prompt`; responses: each `response` to that prompt; better: the highest `helpfulness`"
_IDS = ("id", "prompt_id", "question_id", "conversation_id", "uid")
_NAMES = ("subset", "domain", "group", "source")
_LETTERS = ("a", "b")


@dataclass(slots=True)
class Account:
    """What became of a file's records.

    Attributes:
        records: how many were read.
        rows: how many rows were written.
        ties: how many of these are labelled a tie.
        taken: per format, what was taken for what, and rows.
        left_out: records without a row, by reason.
    """

    records: int = 0
    rows: int = 0
    ties: int = 0
    taken: dict[str, tuple[str, int]] = field(default_factory=dict)
    left_out: Counter[str] = field(default_factory=Counter)


def convert_file(path: Path, out: Path) -> Account:
    """Write the file's preferences as labelled rows, which no RM was asked about yet.

    Of two responses the better one is `a` or `b` by a digest of the texts, so that a judge that favours a place gains
    nothing by it.

    Raises:
        DatasetError: the file cannot be read, or none of its records is a preference.
        ConfigurationError: `out` cannot be written.
    """
    account, seen = Account(), set[str]()
    columns: tuple[str, ...] = ()
    lines: list[bytes] = []
    for number, name, meaning, record, preference in _preferences(path, account):
        columns = columns or tuple(record)
        if isinstance(preference, UnusableError):
            account.left_out[str(preference)] += 1
            continue
        row = dict(record) if name == OURS.name else _row(record, preference)
        row["id"] = _unique(str(row.get("id", f"{path.name.split('.')[0]}/{number}")), seen)
        try:
            lines.append(msgspec.json.encode(row))
        except UnicodeEncodeError:
            account.left_out["a name holds half a surrogate pair"] += 1
            continue
        account.rows += 1
        account.ties += preference.better is None
        account.taken[name] = (meaning, account.taken.get(name, ("", 0))[1] + 1)
    if not lines:
        raise DatasetError(_nothing(path, account, columns))
    write_atomically(out, lines)
    return account


def _preferences(path: Path, account: Account) -> Iterator[tuple[int, str, str, Record, Preference | UnusableError]]:
    """Number, format, meaning, record and what it says; ratings of single responses come last, by prompt."""
    rated: dict[str, list[Record]] = {}
    for number, record in enumerate(read_records(path), start=1):
        account.records = number
        if isinstance(record, UnusableError):
            yield number, "", "", {}, record
            continue
        found = format_of(record)
        if found is None and {"prompt", "response", "helpfulness"} <= record.keys():
            rated.setdefault(repr(record["prompt"]), []).append(record)
            continue
        if found is None:
            yield number, "", "", record, UnusableError("the columns are of no known format")
            continue
        try:
            yield number, found.name, found.meaning, record, _checked(found.convert(record))
        except UnusableError as error:
            yield number, found.name, found.meaning, record, error
    for number, records in enumerate(rated.values(), start=1):
        try:
            preference: Preference | UnusableError = _checked(_rated(records))
        except UnusableError as error:
            preference = error
        yield number, _RATED, _RATED_MEANING, records[0], preference


def _rated(records: list[Record]) -> Preference:
    if len(records) < 2:
        raise UnusableError("there are fewer than two responses")
    better = best([record["helpfulness"] for record in records])
    responses = tuple(response_of(record["response"]) for record in records)
    return Preference(prompt_of(records[0]["prompt"]), responses, better)


def _checked(preference: Preference) -> Preference:
    if len(set(preference.responses)) < len(preference.responses):
        raise UnusableError("responses are equal")
    return preference


def _unique(name: str, seen: set[str]) -> str:
    """The name, with a number behind it where it was given before; it is noted in `seen`."""
    unique, count = name, 1
    while unique in seen:
        count += 1
        unique = f"{name}#{count}"
    seen.add(unique)
    return unique


def _row(record: Record, preference: Preference) -> dict[str, Any]:
    given = next((record[name] for name in _IDS if isinstance(record.get(name), str | int)), None)
    row: dict[str, Any] = {} if given is None else {"id": str(given)}
    row |= {name: str(record[name]) for name in _NAMES if isinstance(record.get(name), str | int)}
    row["prompt"] = written(preference.prompt.turns or preference.prompt.text)
    if len(preference.responses) == 2:
        order = (1, 0) if _swapped(preference) else (0, 1)
        row |= {f"response_{letter}": preference.responses[k] for letter, k in zip(_LETTERS, order, strict=True)}
        row["label"] = "tie" if preference.better is None else _LETTERS[order.index(preference.better)]
        return row
    row["responses"] = list(preference.responses)
    row["label"] = "tie" if preference.better is None else preference.better
    return row


def _swapped(preference: Preference) -> bool:
    content = "\0".join([preference.prompt.text, *sorted(preference.responses)])
    better_first = preference.responses[0] == min(preference.responses)
    return bool(hashlib.sha256(content.encode()).digest()[0] % 2) == better_first


def _nothing(path: Path, account: Account, columns: tuple[str, ...]) -> str:
    if not account.records:
        return f"{path}: holds no record; give a file of preferences"
    reasons = ", ".join(f"{reason} ({count})" for reason, count in account.left_out.most_common())
    known = ", ".join(dict.fromkeys([*(one.name for one in FORMATS), _RATED]))
    return (
        f"{path}: none of {account.records} records gives a pair: {reasons}. The columns are "
        f"{', '.join(columns) or 'none'}; known are {known} (docs/data.md): rename the columns"
    )

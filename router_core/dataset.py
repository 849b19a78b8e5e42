"""Labelled pairs on disk: read, check, group, split, digest.

Knows the JSON Lines format of recorded pairs and nothing of encoders, posteriors or networks. Called by the offline
stage, by replay and by the recorded worker; one reader for all three, so that a row means the same to each.

One row:

    {"id": "...", "prompt": "...", "response_a": "...", "response_b": "...", "label": "a",
     "rm": {"NAME": {"score_a": 0.1, "score_b": 0.7, "verdict": "b"}}, "subset": "...", "domain": "...", "group": "..."}

`verdict` ("a", "b" or "tie") may be absent and is then derived from the scores; `subset`, `domain` and `group` may be
absent; an RM that is absent from `rm` was not asked about that pair.
"""

from __future__ import annotations

import hashlib
import math
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from router_core.errors import DatasetError
from router_core.records import TIE, Instance, LabelledPair

_VERDICTS: Mapping[str, int] = {"a": 0, "b": 1, "tie": TIE}
_LETTERS: Mapping[int, str] = {0: "a", 1: "b", TIE: "tie"}
_HUMANEVALPACK_TASK = re.compile(r"(?:^|/)hep-[^/]+/([^/]+)$")


def load_pairs(path: str | os.PathLike[str]) -> list[LabelledPair]:
    """Read every row of a JSON Lines file; blank lines are skipped.

    Raises:
        DatasetError: the file cannot be read, holds no row, or a row breaks the format. The message names file, line,
            field, value and remedy.
    """
    file = Path(path)
    pairs: list[LabelledPair] = []
    first_line: dict[str, int] = {}
    try:
        with file.open("rb") as lines:
            for number, line in enumerate(lines, start=1):
                if not line.strip():
                    continue
                pair = _Row(file, number, line).parse()
                if pair.id in first_line:
                    raise DatasetError(
                        f"{file}, line {number}: field 'id' = {pair.id!r} is on line {first_line[pair.id]} already; "
                        "make ids unique"
                    )
                first_line[pair.id] = number
                pairs.append(pair)
    except OSError as error:
        raise DatasetError(f"{file}: cannot be read ({error.strerror}); give the path of a JSON Lines file") from error
    if not pairs:
        raise DatasetError(f"{file}: holds no row; give one JSON object a line")
    return pairs


def write_pairs(path: str | os.PathLike[str], pairs: Iterable[LabelledPair]) -> int:
    """Write pairs as JSON Lines that `load_pairs` reads back equal; returns how many.

    Raises:
        DatasetError: a pair has another number of responses than two.
    """
    count = 0
    with Path(path).open("wb") as file:
        for pair in pairs:
            file.write(_encode(pair) + b"\n")
            count += 1
    return count


def pairs_digest(pairs: Sequence[LabelledPair]) -> str:
    """SHA-256 (hex) of the pairs' content in their order: what a checkpoint says it was trained on."""
    digest = hashlib.sha256()
    for pair in pairs:
        digest.update(_encode(pair))
        digest.update(b"\n")
    return digest.hexdigest()


def pool_names(pairs: Sequence[LabelledPair]) -> tuple[str, ...]:
    """Every RM that was asked about at least one pair, in order of first appearance."""
    return tuple(dict.fromkeys(name for pair in pairs for name in pair.verdicts))


def pool_matrix(pairs: Sequence[LabelledPair], pool: Sequence[str]) -> NDArray[np.float64]:
    """Was RM k right on pair i? 1 right, 0 wrong, 0.5 tie, NaN where it was not asked.

    Returns:
        (N, K) float64, columns in the order of `pool`.

    Raises:
        DatasetError: an RM of the pool was asked about none of the pairs.
    """
    known = set(pool_names(pairs))
    for name in pool:
        if name not in known:
            raise DatasetError(
                f"pool: RM {name!r} was asked about none of the {len(pairs)} pairs; it has {sorted(known)}; "
                "correct the name or record its scores"
            )
    rows = [[pair.correctness(name) if name in pair.verdicts else math.nan for name in pool] for pair in pairs]
    return np.array(rows, dtype=np.float64).reshape(len(pairs), len(pool))


def grouped_folds(
    pairs: Sequence[LabelledPair], n_folds: int, rng: np.random.Generator
) -> list[tuple[NDArray[np.int64], NDArray[np.int64]]]:
    """Split into folds of about equal size such that pairs of one group are never on both sides.

    Groups go to the smallest fold so far, in random order, the largest groups first.

    Args:
        n_folds: 2 ... number of groups.
        rng: decides the order of groups; the same generator state gives the same folds.

    Returns:
        `n_folds` tuples of ascending indices (train, test); the tests partition 0 ... N−1.

    Raises:
        DatasetError: `n_folds` is below 2 or above the number of groups.
    """
    members = _members(pairs)
    if not 2 <= n_folds <= len(members):
        raise DatasetError(f"n_folds = {n_folds}: must be from 2 to the number of groups, {len(members)}")
    shuffled = [members[i] for i in rng.permutation(len(members))]
    shuffled.sort(key=len, reverse=True)
    tests: list[list[int]] = [[] for _ in range(n_folds)]
    for group in shuffled:
        min(tests, key=len).extend(group)
    everything = np.arange(len(pairs), dtype=np.int64)
    folds = []
    for test in tests:
        held_out = np.array(sorted(test), dtype=np.int64)
        folds.append((np.setdiff1d(everything, held_out, assume_unique=True), held_out))
    return folds


def grouped_split(
    pairs: Sequence[LabelledPair], test_fraction: float, rng: np.random.Generator
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """One split (train, test) by whole groups, with at least `test_fraction` of the pairs in test.

    Both sides hold at least one group; the last group added to test may overshoot the fraction.

    Raises:
        DatasetError: `test_fraction` is not inside (0, 1), or there are fewer than two groups.
    """
    members = _members(pairs)
    if not 0.0 < test_fraction < 1.0:
        raise DatasetError(f"test_fraction = {test_fraction}: must be inside (0, 1)")
    if len(members) < 2:
        raise DatasetError(f"pairs: {len(members)} group(s); a split needs at least 2 different groups")
    test: list[int] = []
    for index in rng.permutation(len(members))[:-1]:
        if len(test) >= test_fraction * len(pairs):
            break
        test.extend(members[index])
    held_out = np.array(sorted(test), dtype=np.int64)
    return np.setdiff1d(np.arange(len(pairs), dtype=np.int64), held_out, assume_unique=True), held_out


def _members(pairs: Sequence[LabelledPair]) -> list[list[int]]:
    groups: dict[str, list[int]] = {}
    for index, pair in enumerate(pairs):
        groups.setdefault(pair.group, []).append(index)
    return list(groups.values())


def _group_of(pair_id: str, prompt: str) -> str:
    """HumanEvalPack poses one task in six languages, so its task number groups; any other row groups by prompt."""
    task = _HUMANEVALPACK_TASK.search(pair_id)
    if task:
        return f"hep/{task.group(1)}"
    return "prompt/" + hashlib.sha256(prompt.encode()).hexdigest()[:16]


def _encode(pair: LabelledPair) -> bytes:
    if len(pair.instance.responses) != 2:
        raise DatasetError(
            f"pair {pair.id!r}: {len(pair.instance.responses)} responses; the file format holds exactly two"
        )
    row: dict[str, object] = {
        "id": pair.id,
        "subset": pair.subset,
        "domain": pair.domain,
        "group": pair.group,
        "prompt": pair.instance.prompt,
        "response_a": pair.instance.responses[0],
        "response_b": pair.instance.responses[1],
        "label": _LETTERS[pair.label],
        "rm": {
            name: {
                "score_a": pair.scores[name][0],
                "score_b": pair.scores[name][1],
                "verdict": _LETTERS[pair.verdicts[name]],
            }
            for name in sorted(pair.scores)
        },
    }
    return msgspec.json.encode(row)


class _Row:
    """One line being read: holds the place, so that every complaint can name it."""

    def __init__(self, file: Path, number: int, line: bytes) -> None:
        self._file = file
        self._number = number
        self._line = line

    def parse(self) -> LabelledPair:
        try:
            row = msgspec.json.decode(self._line)
        except msgspec.DecodeError as error:
            raise self._error("(row)", self._line[:60], f"write one JSON object a line ({error})") from error
        if not isinstance(row, dict):
            raise self._error("(row)", row, "write one JSON object a line")
        pair_id = self._text(row, "id")
        prompt = self._text(row, "prompt")
        responses = (self._text(row, "response_a"), self._text(row, "response_b"))
        label = row.get("label")
        if label not in ("a", "b"):
            raise self._error("label", label, 'give "a" or "b"')
        scores, verdicts = self._judgements(row)
        return LabelledPair(
            id=pair_id,
            instance=Instance(prompt=prompt, responses=responses),
            label=_VERDICTS[label],
            scores=scores,
            verdicts=verdicts,
            domain=self._text(row, "domain", default=""),
            subset=self._text(row, "subset", default=""),
            group=self._text(row, "group", default="") or _group_of(pair_id, prompt),
        )

    def _judgements(self, row: dict[str, Any]) -> tuple[dict[str, tuple[float, ...]], dict[str, int]]:
        table = row.get("rm", {})
        if not isinstance(table, dict):
            raise self._error("rm", table, "give an object from RM name to scores")
        scores: dict[str, tuple[float, ...]] = {}
        verdicts: dict[str, int] = {}
        for name, judged in table.items():
            if not isinstance(judged, dict):
                raise self._error(f"rm[{name}]", judged, 'give {"score_a": number, "score_b": number}')
            a, b = (self._score(judged, name, key) for key in ("score_a", "score_b"))
            derived = TIE if a == b else int(b > a)
            verdict = judged.get("verdict", _LETTERS[derived])
            if not isinstance(verdict, str) or verdict not in _VERDICTS:
                raise self._error(f"rm[{name}].verdict", verdict, 'give "a", "b" or "tie", or leave it out')
            # Rounded scores may hide the order that the verdict was taken from; only a reversed order is a mistake.
            if derived != TIE and _VERDICTS[verdict] not in (derived, TIE):
                raise self._error(
                    f"rm[{name}].verdict", verdict, f"its scores {a} and {b} say {_LETTERS[derived]!r}; correct one"
                )
            scores[name] = (a, b)
            verdicts[name] = _VERDICTS[verdict]
        return scores, verdicts

    def _score(self, judged: dict[str, Any], name: str, key: str) -> float:
        value = judged.get(key)
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise self._error(f"rm[{name}].{key}", value, "give a finite number, or leave the RM out of this row")
        return float(value)

    def _text(self, row: dict[str, Any], field: str, default: str | None = None) -> str:
        value = row.get(field, default)
        if not isinstance(value, str):
            raise self._error(field, value, "give a string")
        return value

    def _error(self, field: str, value: object, remedy: str) -> DatasetError:
        shown = repr(value)
        if len(shown) > 80:
            shown = shown[:77] + "..."
        return DatasetError(f"{self._file}, line {self._number}: field {field!r} = {shown}: {remedy}")


def subset_accuracy(
    pairs: Sequence[LabelledPair], chosen_right: NDArray[np.float64], key: Callable[[LabelledPair], str]
) -> dict[str, float]:
    """Mean of `chosen_right` (N,) within each value of `key`, for tables by subset or domain."""
    sums: dict[str, list[float]] = {}
    for pair, right in zip(pairs, chosen_right, strict=True):
        sums.setdefault(key(pair), []).append(float(right))
    return {name: float(np.mean(values)) for name, values in sums.items()}

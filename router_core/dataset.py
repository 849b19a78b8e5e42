"""Labelled pairs on disk: read, group, split, digest.

Knows files of recorded pairs and nothing of encoders, posteriors or networks; what one row may hold is in
`router_core.rows`. Called by the offline stage, by replay and by the recorded worker; one reader for all three, so
that a row means the same to each.

One row:

    {"id": "...", "prompt": "...", "response_a": "...", "response_b": "...", "label": "a",
     "rm": {"NAME": {"score_a": 0.1, "score_b": 0.7, "verdict": "b"}}, "subset": "...", "domain": "...", "group": "..."}

or, with several responses, `"responses": [...]`, `"label": 2` and `"rm": {"NAME": {"scores": [...], "verdict": 0}}`.
`verdict` may be absent and is then derived from the scores; scores may be absent where there is a verdict; `subset`,
`domain` and `group` may be absent; `{"abstained": true}` in the place of an RM's scores: it was asked, and does not
apply to that pair; an RM that is absent from `rm` was not asked about it.
"""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from router_core.errors import BadRowsError, DatasetError
from router_core.files import numbered_lines
from router_core.records import TIE, LabelledPair
from router_core.rows import Row, complaint, encode_pair, parse_row

MAX_NAMED_ROWS = 10
"""Bad rows that an error names one by one; the others are counted."""


@dataclass(frozen=True, slots=True)
class PairsFile:
    """What a file of labelled pairs holds.

    Attributes:
        pairs: the pairs with a better response, in order.
        ties: how many more are labelled a tie. No RM is right or wrong about such a pair, so none is learned from.
        skipped: one complaint per row that was left out because it breaks the format.
        unheard: scorers that rows name (in `rm` or `rm_missing`) and that have no verdict on any of the pairs.
    """

    pairs: list[LabelledPair]
    ties: int
    skipped: tuple[DatasetError, ...]
    unheard: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class RowsFile:
    """What a file of rows holds, labelled or not.

    Attributes:
        rows: in order.
        skipped: as `PairsFile`.
    """

    rows: list[Row]
    skipped: tuple[DatasetError, ...]


def read_pairs(path: str | os.PathLike[str], *, skip_bad_rows: bool = False) -> PairsFile:
    """Read every labelled row of a JSON Lines file, which may end in `.gz` or `.zst`; blank lines are skipped.

    Args:
        skip_bad_rows: leave out rows that break the format, instead of refusing the file.

    Raises:
        BadRowsError: rows break the format. The message names file, line, field, value and remedy of each, up to
            `MAX_NAMED_ROWS`.
        DatasetError: the file cannot be read, or no labelled row is left.
    """
    found, bad = _rows(Path(path), labelled=True)
    _require_rows(Path(path), len(found), bad, skip_bad_rows)
    pairs = [_labelled(row, row.label) for row in found if row.label is not None and row.label != TIE]
    if not pairs:
        raise DatasetError(f"{path}: every row is labelled a tie; nothing can be learned or judged by ties alone")
    return PairsFile(pairs, len(found) - len(pairs), tuple(bad), _unheard(found, pairs))


def read_rows(path: str | os.PathLike[str], *, skip_bad_rows: bool = False) -> RowsFile:
    """Read every row of a JSON Lines file as `read_pairs` does, but a row may have no label, or be a tie.

    Raises:
        BadRowsError, DatasetError: as `read_pairs`.
    """
    found, bad = _rows(Path(path), labelled=False)
    _require_rows(Path(path), len(found), bad, skip_bad_rows)
    return RowsFile(found, tuple(bad))


def _unheard(rows: Sequence[Row], pairs: Sequence[LabelledPair]) -> tuple[str, ...]:
    """Return the scorers that rows name and that have no verdict on any of the pairs, in order of first appearance."""
    named = [row.fields.get(field) for row in rows for field in ("rm", "rm_missing")]
    heard = {name for pair in pairs for name in pair.verdicts}
    listed = [name for names in named if isinstance(names, dict) for name in names]
    return tuple(name for name in dict.fromkeys(listed) if name not in heard)


def load_pairs(path: str | os.PathLike[str]) -> list[LabelledPair]:
    """The pairs of `read_pairs`, which is also told of ties and of bad rows."""
    return read_pairs(path).pairs


def load_rows(path: str | os.PathLike[str]) -> list[Row]:
    """The rows of `read_rows`."""
    return read_rows(path).rows


def write_pairs(path: str | os.PathLike[str], pairs: Iterable[LabelledPair]) -> int:
    """Write pairs as JSON Lines that `load_pairs` reads back equal; returns how many."""
    count = 0
    with Path(path).open("wb") as file:
        for pair in pairs:
            file.write(encode_pair(pair) + b"\n")
            count += 1
    return count


def pairs_digest(pairs: Sequence[LabelledPair]) -> str:
    """SHA-256 (hex) of the pairs' content in their order: what a checkpoint says it was trained on."""
    digest = hashlib.sha256()
    for pair in pairs:
        digest.update(encode_pair(pair))
        digest.update(b"\n")
    return digest.hexdigest()


def pool_names(pairs: Sequence[LabelledPair]) -> tuple[str, ...]:
    """Every RM that was asked about at least one pair, in order of first appearance.

    Raises:
        DatasetError: no RM was asked about any.
    """
    names = tuple(dict.fromkeys(name for pair in pairs for name in pair.verdicts))
    if not names:
        raise DatasetError(
            f"field 'rm' is missing or empty in all {len(pairs)} pairs: no RM was asked about these pairs: run "
            "`reward-router label` first"
        )
    return names


def judgeable(pairs: Sequence[LabelledPair], pool: Sequence[str]) -> NDArray[np.bool_]:
    """(N,): True where every RM of the pool has answered or abstained, and one of them has answered.

    Only such pairs can be replayed, since a policy may ask any RM; one that abstained is not asked there.
    """
    return np.array(
        [
            all(name in pair.verdicts or name in pair.abstained for name in pool)
            and any(name in pair.verdicts for name in pool)
            for pair in pairs
        ],
        dtype=np.bool_,
    )


def pool_matrix(pairs: Sequence[LabelledPair], pool: Sequence[str]) -> NDArray[np.float64]:
    """Was RM k right on pair i? `LabelledPair.correctness`, NaN where it was not asked.

    Returns:
        (N, K) float64, columns in the order of `pool`.

    Raises:
        DatasetError: an RM of the pool was asked about none of the pairs.
    """
    return _per_model(pairs, pool, LabelledPair.correctness)


def credit_matrix(pairs: Sequence[LabelledPair], pool: Sequence[str]) -> NDArray[np.float64]:
    """What is learned of RM k from pair i: as `pool_matrix`, with `LabelledPair.credit`."""
    return _per_model(pairs, pool, LabelledPair.credit)


def _per_model(
    pairs: Sequence[LabelledPair], pool: Sequence[str], value: Callable[[LabelledPair, str], float]
) -> NDArray[np.float64]:
    known = set(pool_names(pairs))
    for name in pool:
        if name not in known:
            raise DatasetError(
                f"pool: RM {name!r} was asked about none of the {len(pairs)} pairs; it has {sorted(known)}; "
                "correct the name or record its scores"
            )
    rows = [[value(pair, name) if name in pair.verdicts else math.nan for name in pool] for pair in pairs]
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


def _rows(file: Path, *, labelled: bool) -> tuple[list[Row], list[DatasetError]]:
    """The rows that fit, and one complaint for each that does not; ids are unique."""
    found: list[Row] = []
    bad: list[DatasetError] = []
    first_line: dict[str, int] = {}
    for number, line in numbered_lines(file):
        try:
            row = parse_row(file, number, line)
            if row.id in first_line:
                remedy = f"is on line {first_line[row.id]} already; make ids unique"
                raise complaint(file, number, "id", row.id, remedy)
            if labelled and row.label is None:
                remedy = (
                    'give "a" or "b", or the index of the better response: an RM is judged by it. Rows without label '
                    "are for `train --consensus`, which learns from where the RMs agree"
                )
                raise complaint(file, number, "label", None, remedy)
        except DatasetError as error:
            bad.append(error)
            continue
        first_line[row.id] = number
        found.append(row)
    return found, bad


def _require_rows(file: Path, found: int, bad: Sequence[DatasetError], skip_bad_rows: bool) -> None:
    """Raises BadRowsError for bad rows, DatasetError where no row is left."""
    if bad and not (skip_bad_rows and found):
        named = "\n".join(str(error) for error in bad[:MAX_NAMED_ROWS])
        rest = len(bad) - MAX_NAMED_ROWS
        raise BadRowsError(named + (f"\n… and {rest} more bad rows of {file}" if rest > 0 else ""), len(bad))
    if not found:
        raise DatasetError(f"{file}: holds no row; give one JSON object a line")


def _labelled(row: Row, label: int) -> LabelledPair:
    return LabelledPair(
        id=row.id,
        instance=row.instance,
        label=label,
        scores=row.scores,
        verdicts=row.verdicts,
        domain=row.domain,
        subset=row.subset,
        group=row.group,
        abstained=row.abstained,
    )


def partly_labelled(rows: Sequence[Row]) -> tuple[list[LabelledPair], NDArray[np.bool_]]:
    """Return the rows that an RM was asked about as pairs, and which labels are known, (N,); the others are 0.

    A row that is labelled a tie counts as not labelled.

    Raises:
        DatasetError: no RM was asked about any row.
    """
    asked = [row for row in rows if row.verdicts]
    if not asked:
        raise DatasetError(f"none of the {len(rows)} rows holds a score of an RM: run `reward-router label` first")
    known = np.array([row.label is not None and row.label != TIE for row in asked])
    labels = [0 if row.label is None or row.label == TIE else row.label for row in asked]
    return [_labelled(row, label) for row, label in zip(asked, labels, strict=True)], known


def _members(pairs: Sequence[LabelledPair]) -> list[list[int]]:
    groups: dict[str, list[int]] = {}
    for index, pair in enumerate(pairs):
        groups.setdefault(pair.group, []).append(index)
    return list(groups.values())

"""The reader of recorded pairs: what it accepts, what it derives, and what its complaints name."""

from __future__ import annotations

import gzip
import json
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from router_core.dataset import (
    grouped_folds,
    grouped_split,
    load_pairs,
    pairs_digest,
    pool_matrix,
    pool_names,
    read_pairs,
    read_rows,
    write_pairs,
)
from router_core.errors import BadRowsError, DatasetError
from router_core.records import TIE, Instance, LabelledPair

RB9_DEV = Path(os.environ.get("RB9_DEV", Path(__file__).parents[2] / "../shared/data/rb9_dev.jsonl"))


def row(**changes: object) -> dict[str, object]:
    base: dict[str, object] = {
        "id": "p/1",
        "prompt": "What is 2 + 2?",
        "response_a": "4",
        "response_b": "5",
        "label": "a",
        "rm": {"R1": {"score_a": 0.9, "score_b": 0.1}, "R2": {"score_a": 0.2, "score_b": 0.6, "verdict": "b"}},
    }
    return {key: value for key, value in {**base, **changes}.items() if value is not None}


def write(path: Path, *rows: object) -> Path:
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in rows))
    return path


def pair(pair_id: str, group: str) -> LabelledPair:
    return LabelledPair(pair_id, Instance("p", ("a", "b")), 0, {"R": (1.0, 0.0)}, {"R": 0}, group=group)


def test_reads_texts_label_scores_and_verdicts(tmp_path: Path) -> None:
    (read,) = load_pairs(write(tmp_path / "pairs.jsonl", row(domain="math", subset="sums")))
    assert read.instance == Instance("What is 2 + 2?", ("4", "5"))
    assert (read.label, read.domain, read.subset) == (0, "math", "sums")
    assert read.scores == {"R1": (0.9, 0.1), "R2": (0.2, 0.6)}
    assert read.verdicts == {"R1": 0, "R2": 1}


def test_equal_scores_without_a_verdict_are_a_tie_worth_one_half(tmp_path: Path) -> None:
    (read,) = load_pairs(write(tmp_path / "pairs.jsonl", row(rm={"R": {"score_a": 0.5, "score_b": 0.5}})))
    assert read.verdicts["R"] == TIE
    assert read.correctness("R") == 0.5


def test_a_verdict_may_stand_where_rounding_made_the_scores_equal(tmp_path: Path) -> None:
    judged = {"R": {"score_a": 0.5, "score_b": 0.5, "verdict": "b"}}
    (read,) = load_pairs(write(tmp_path / "pairs.jsonl", row(rm=judged)))
    assert read.verdicts["R"] == 1


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"label": "c"}, "'label' = 'c'"),
        ({"label": ["a"]}, "'label' = ['a']"),
        ({"label": None}, "'label' = None"),
        ({"prompt": 7}, "'prompt' = 7"),
        ({"response_b": None}, "'response_b' = None"),
        ({"rm": []}, "'rm' = []"),
        ({"rm": {"R": {"score_a": 1.0}}}, "'rm[R].score_b' = None"),
        ({"rm": {"R": {"score_a": True, "score_b": 0.0}}}, "'rm[R].score_a' = True"),
        ({"rm": {"R": {"score_a": 1.0, "score_b": 0.0, "verdict": "A"}}}, "'rm[R].verdict' = 'A'"),
        ({"rm": {"R": {"score_a": 1.0, "score_b": 0.0, "verdict": {}}}}, "'rm[R].verdict' = {}"),
        ({"rm": {"R": {"score_a": 1.0, "score_b": 0.0, "verdict": "b"}}}, "say 'a'"),
    ],
)
def test_a_bad_field_is_named_with_file_line_and_value(tmp_path: Path, changes: dict[str, object], named: str) -> None:
    path = write(tmp_path / "pairs.jsonl", row(), "", row(id="p/2", **changes))
    with pytest.raises(DatasetError) as caught:
        load_pairs(path)
    assert f"{path}, line 3" in str(caught.value)
    assert named in str(caught.value)


@pytest.mark.parametrize("line", ["{", "[1]", '{"id": "x", "prompt": NaN}'])
def test_a_line_that_is_not_an_object_is_refused(tmp_path: Path, line: str) -> None:
    with pytest.raises(DatasetError, match=r"line 1.*one JSON object a line"):
        load_pairs(write(tmp_path / "pairs.jsonl", line))


def test_a_repeated_id_names_both_lines(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match=r"line 2.*'p/1': is on line 1"):
        load_pairs(write(tmp_path / "pairs.jsonl", row(), row()))


def test_missing_and_empty_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match="cannot be read"):
        load_pairs(tmp_path / "absent.jsonl")
    with pytest.raises(DatasetError, match="holds no row"):
        load_pairs(write(tmp_path / "empty.jsonl", ""))


def test_every_bad_row_is_named_up_to_a_bound_and_the_rest_is_counted(tmp_path: Path) -> None:
    path = write(tmp_path / "pairs.jsonl", row(), *[row(id=f"bad/{i}", label="z") for i in range(13)])
    with pytest.raises(BadRowsError) as caught:
        load_pairs(path)
    said = str(caught.value)
    assert [f"line {n}:" in said for n in range(1, 15)] == [False] + [True] * 10 + [False] * 3
    assert "3 more bad rows" in said
    assert caught.value.count == 13


def test_bad_rows_can_be_left_out_and_are_told(tmp_path: Path) -> None:
    lone_surrogate = '{"id": "s", "prompt": "\\ud83d", "response_a": "x", "response_b": "y", "label": "a"}'
    nested = "[" * 100_000
    path = write(
        tmp_path / "pairs.jsonl", row(), lone_surrogate, nested, row(), row(id="p/2", label=None), row(id="p/3")
    )
    read = read_pairs(path, skip_bad_rows=True)
    assert [pair.id for pair in read.pairs] == ["p/1", "p/3"]
    assert ["line 2" in str(read.skipped[0]), "line 3" in str(read.skipped[1])] == [True, True]
    assert "line 1 already" in str(read.skipped[2])
    assert "'label' = None" in str(read.skipped[3])


def test_a_file_of_bad_rows_alone_is_refused_with_their_complaints(tmp_path: Path) -> None:
    with pytest.raises(BadRowsError, match="line 1"):
        read_rows(write(tmp_path / "pairs.jsonl", "nonsense"), skip_bad_rows=True)


def test_a_byte_order_mark_is_no_part_of_the_first_row(tmp_path: Path) -> None:
    path = write(tmp_path / "pairs.jsonl", row())
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert [pair.id for pair in load_pairs(path)] == ["p/1"]
    path.write_bytes(path.read_bytes().decode("utf-8-sig").encode("utf-16"))
    with pytest.raises(DatasetError, match="UTF-16; save it as UTF-8"):
        load_pairs(path)


def test_compressed_files_are_read_and_torn_ones_are_refused(tmp_path: Path) -> None:
    plain = write(tmp_path / "pairs.jsonl", row(), row(id="p/2"))
    pyarrow = pytest.importorskip("pyarrow")
    zipped, zstd = tmp_path / "pairs.jsonl.gz", tmp_path / "pairs.jsonl.zst"
    zipped.write_bytes(gzip.compress(plain.read_bytes()))
    with pyarrow.output_stream(str(zstd), compression="zstd") as file:
        file.write(plain.read_bytes())
    assert load_pairs(zipped) == load_pairs(zstd) == load_pairs(plain)
    for path in (zipped, zstd):
        path.write_bytes(path.read_bytes()[:-9])
        with pytest.raises(DatasetError, match=path.name):
            load_pairs(path)


def test_pairs_labelled_a_tie_are_counted_and_teach_nothing(tmp_path: Path) -> None:
    path = write(tmp_path / "pairs.jsonl", row(label="tie"), row(id="p/2"))
    read = read_pairs(path)
    assert ([pair.id for pair in read.pairs], read.ties) == (["p/2"], 1)
    assert [one.label for one in read_rows(path).rows] == [TIE, 0]
    with pytest.raises(DatasetError, match="every row is labelled a tie"):
        load_pairs(write(tmp_path / "ties.jsonl", row(label="tie")))


def test_pairs_that_no_rm_was_asked_about_name_the_command_that_asks() -> None:
    pair = LabelledPair("1", Instance("q", ("x", "y")), 0, {}, {})
    for refused in (lambda: pool_names([pair]), lambda: pool_matrix([pair], ["R"])):
        with pytest.raises(DatasetError, match="no RM was asked about these pairs: run `reward-router label` first"):
            refused()


def test_one_programming_task_in_two_languages_is_one_group(tmp_path: Path) -> None:
    path = write(
        tmp_path / "pairs.jsonl",
        row(id="rb/hep-python/7", prompt="x"),
        row(id="rb/hep-go/7", prompt="y"),
        row(id="rb/hep-go/8", prompt="y"),
        row(id="q/1", prompt="same"),
        row(id="q/2", prompt="same"),
        row(id="q/3", prompt="same", group="own"),
    )
    groups = [read.group for read in load_pairs(path)]
    assert groups[0] == groups[1] != groups[2]
    assert groups[3] == groups[4]
    assert groups[5] == "own"


def test_written_pairs_are_read_back_equal(tmp_path: Path) -> None:
    pairs = load_pairs(write(tmp_path / "in.jsonl", row(id="rb/hep-go/7"), row(id="q", prompt="ünï\n\u2028")))
    assert write_pairs(tmp_path / "out.jsonl", pairs) == 2
    again = load_pairs(tmp_path / "out.jsonl")
    assert again == pairs
    assert pairs_digest(again) == pairs_digest(pairs)


def test_the_digest_sees_a_changed_score_and_the_order(tmp_path: Path) -> None:
    one, two = load_pairs(write(tmp_path / "a.jsonl", row(), row(id="p/2")))
    changed = load_pairs(write(tmp_path / "b.jsonl", row(rm={"R1": {"score_a": 0.9, "score_b": 0.11}}), row(id="p/2")))
    assert len({pairs_digest([one, two]), pairs_digest([two, one]), pairs_digest(changed)}) == 3


def test_the_pool_matrix_marks_unasked_models_and_ties(tmp_path: Path) -> None:
    path = write(
        tmp_path / "pairs.jsonl",
        row(),
        row(id="p/2", rm={"R2": {"score_a": 0.5, "score_b": 0.5}}),
        row(id="p/3", rm={}),
    )
    pairs = load_pairs(path)
    assert pool_names(pairs) == ("R1", "R2")
    np.testing.assert_array_equal(pool_matrix(pairs, ["R2", "R1"]), [[0, 1], [0.5, np.nan], [np.nan, np.nan]])
    with pytest.raises(DatasetError, match="'R3' was asked about none"):
        pool_matrix(pairs, ["R1", "R3"])


@given(st.lists(st.integers(0, 12), min_size=2, max_size=60), st.integers(2, 6), st.integers(0, 2**32))
def test_folds_partition_the_pairs_and_never_split_a_group(groups: list[int], n_folds: int, seed: int) -> None:
    pairs = [pair(str(i), str(group)) for i, group in enumerate(groups)]
    if len(set(groups)) < n_folds:
        with pytest.raises(DatasetError, match="n_folds"):
            grouped_folds(pairs, n_folds, np.random.default_rng(seed))
        return
    folds = grouped_folds(pairs, n_folds, np.random.default_rng(seed))
    assert sorted(np.concatenate([test for _, test in folds]).tolist()) == list(range(len(pairs)))
    for train, test in folds:
        assert len(test)
        assert not {groups[i] for i in train} & {groups[i] for i in test}
        assert len(train) + len(test) == len(pairs)


@given(st.lists(st.integers(0, 8), min_size=1, max_size=40), st.floats(0.05, 0.9), st.integers(0, 2**32))
def test_a_split_keeps_groups_whole_and_both_sides_filled(groups: list[int], fraction: float, seed: int) -> None:
    pairs = [pair(str(i), str(group)) for i, group in enumerate(groups)]
    if len(set(groups)) < 2:
        with pytest.raises(DatasetError, match="at least 2"):
            grouped_split(pairs, fraction, np.random.default_rng(seed))
        return
    train, test = grouped_split(pairs, fraction, np.random.default_rng(seed))
    assert len(train)
    assert len(test)
    assert not {groups[i] for i in train} & {groups[i] for i in test}


def test_a_fraction_outside_zero_and_one_is_refused() -> None:
    with pytest.raises(DatasetError, match=r"test_fraction = 1\.0"):
        grouped_split([pair("1", "a"), pair("2", "b")], 1.0, np.random.default_rng(0))


@pytest.mark.skipif(not RB9_DEV.is_file(), reason="set RB9_DEV to the recorded evaluation pairs")
def test_the_recorded_evaluation_pairs_are_read_whole() -> None:
    pairs = load_pairs(RB9_DEV)
    assert len(pairs) == 1295
    accuracy = dict(zip(pool_names(pairs), pool_matrix(pairs, pool_names(pairs)).mean(axis=0), strict=True))
    assert len(accuracy) == 9
    assert accuracy["internlm2-1_8b-reward"] == pytest.approx(0.8131, abs=1e-4)
    assert len({p.group for p in pairs if p.subset.startswith("hep-")}) < 165


def test_a_scorer_without_any_verdict_is_told(tmp_path: Path) -> None:
    row = {"prompt": "p", "response_a": "x", "response_b": "y", "label": "a"}
    judged = {"good": {"score_a": 1.0, "score_b": 0.0}, "silent": {"abstained": True}}
    lines = [json.dumps(row | {"id": name, "rm": judged, "rm_missing": {"away": "refused"}}) for name in "12"]
    (tmp_path / "pairs.jsonl").write_text("\n".join(lines))
    assert read_pairs(tmp_path / "pairs.jsonl").unheard == ("silent", "away")


def test_a_pair_without_subset_counts_under_its_domain() -> None:
    pair = LabelledPair("1", Instance("p", ("a", "b")), 0, {}, {}, domain="math")
    assert (pair.part, replace(pair, subset="sums").part, replace(pair, domain="").part) == ("math", "sums", "(none)")

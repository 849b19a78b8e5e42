"""The row format: several responses, letters and indices, what may be absent, and what complaints name."""

from __future__ import annotations

import json
from pathlib import Path

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from router_core.dataset import load_pairs, load_rows, pairs_digest, pool_matrix, write_pairs
from router_core.errors import DatasetError
from router_core.records import MAX_ABS_SCORE, TIE, Instance, LabelledPair, Message, ToolCall, verdict_of
from router_core.rows import Row, encode_pair, parse_row
from router_core.turns import text_of

FILE = Path("pairs.jsonl")


def several(**changes: object) -> dict[str, object]:
    base: dict[str, object] = {
        "id": "g/1",
        "prompt": "Which?",
        "responses": ["one", "two", "three"],
        "label": 2,
        "rm": {"R": {"scores": [0.1, 0.3, 0.2]}},
    }
    return {key: value for key, value in {**base, **changes}.items() if value is not None}


def parse(row: dict[str, object]) -> Row:
    return parse_row(FILE, 1, json.dumps(row).encode())


def test_several_responses_are_read_with_scores_in_their_order() -> None:
    row = parse(several())
    assert row.instance == Instance("Which?", ("one", "two", "three"))
    assert (row.label, row.scores["R"], row.verdicts["R"]) == (2, (0.1, 0.3, 0.2), 1)


@pytest.mark.parametrize(("label", "index"), [("a", 0), ("c", 2), (0, 0), (2, 2)])
def test_a_response_is_named_by_letter_or_index(label: object, index: int) -> None:
    assert parse(several(label=label)).label == index


@pytest.mark.parametrize(("verdict", "index"), [("tie", TIE), ("b", 1), (1, 1)])
def test_a_verdict_is_a_letter_an_index_or_a_tie(verdict: object, index: int) -> None:
    assert parse(several(rm={"R": {"scores": [0.0, 2.0, 1.0], "verdict": verdict}})).verdicts["R"] == index


@pytest.mark.parametrize(
    "judged",
    [{"verdict": "b"}, {"verdict": 1, "score_a": None, "score_b": None}, {"verdict": "b", "scores": None}],
)
def test_a_verdict_without_scores_is_enough(judged: dict[str, object]) -> None:
    row = parse(several(responses=["x", "y"], label="a", rm={"R": judged, "S": {"scores": [2, 1]}}))
    assert (dict(row.verdicts), dict(row.scores)) == ({"R": 1, "S": 0}, {"S": (2.0, 1.0)})


def test_published_preference_data_is_sent_to_convert() -> None:
    line = json.dumps({"prompt": "p", "chosen": "a", "rejected": "b"}).encode()
    with pytest.raises(DatasetError, match=r"field 'chosen' = 'a': run `reward-router convert`"):
        parse_row(Path("x.jsonl"), 1, line)


def test_ids_groups_and_names_may_be_whole_numbers() -> None:
    row = parse(several(id=7, group=3, subset=2, domain=1))
    assert (row.id, row.group, row.subset, row.domain) == ("7", "3", "2", "1")


@pytest.mark.parametrize("responses", [["x", "y"], ["x", "y", "z"]])
def test_a_pair_may_be_labelled_a_tie(responses: list[str]) -> None:
    assert parse(several(responses=responses, label="tie", rm={})).label == TIE


def test_equal_best_scores_are_a_tie_and_a_verdict_may_name_any_of_them() -> None:
    equal = [0.5, 0.1, 0.5]
    assert parse(several(rm={"R": {"scores": equal}})).verdicts["R"] == TIE
    assert parse(several(rm={"R": {"scores": equal, "verdict": 2}})).verdicts["R"] == 2
    with pytest.raises(DatasetError, match="say 0"):
        parse(several(rm={"R": {"scores": equal, "verdict": 1}}))


def test_two_responses_may_be_given_as_a_list_and_letters_may_be_indices() -> None:
    listed = parse(
        several(responses=["x", "y"], label=1, rm={"R": {"scores": [1, 2]}, "S": {"score_a": 3, "score_b": 1}})
    )
    assert (listed.label, dict(listed.scores), dict(listed.verdicts)) == (
        1,
        {"R": (1.0, 2.0), "S": (3.0, 1.0)},
        {"R": 1, "S": 0},
    )


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"responses": ["one"]}, "'responses' = ['one']: give a list of at least two"),
        ({"responses": "one"}, "'responses' = 'one'"),
        ({"responses": ["one", 2]}, "'responses[1]' = 2"),
        ({"response_a": "one"}, "'response_a' = 'one': the row has 'responses' too"),
        ({"label": 3}, "'label' = 3: give the index of a response, 0 to 2"),
        ({"label": -1}, "'label' = -1"),
        ({"label": True}, "'label' = True"),
        ({"label": 1.0}, "'label' = 1.0"),
        ({"label": "d"}, "'label' = 'd'"),
        ({"id": True}, "'id' = True"),
        ({"rm": {"R": {}}}, "'rm[R].scores' = None"),
        ({"rm": {"R": {"verdict": "z"}}}, "'rm[R].verdict' = 'z'"),
        ({"rm": {"R": {"verdict": 0, "score_a": 1}}}, "'rm[R].scores' = None"),
        ({"label": "ab"}, "'label' = 'ab'"),
        ({"rm": {"R": {"scores": [1, 2]}}}, "'rm[R].scores' = [1, 2]: give a list of 3 numbers"),
        ({"rm": {"R": {"score_a": 1, "score_b": 2}}}, "'rm[R].scores' = None"),
        ({"rm": {"R": {"scores": [1, 2, "3"]}}}, "'rm[R].scores[2]' = '3'"),
        ({"rm": {"R": {"scores": [1, 2, 3], "verdict": 3}}}, "'rm[R].verdict' = 3"),
        ({"rm": {"R": {"scores": [1, 2, 3], "verdict": 0}}}, "its scores [1.0, 2.0, 3.0] say 2"),
    ],
)
def test_a_bad_field_is_named_with_value_and_remedy(changes: dict[str, object], named: str) -> None:
    with pytest.raises(DatasetError) as caught:
        parse(several(**changes))
    assert "pairs.jsonl, line 1" in str(caught.value)
    assert named in str(caught.value)


@pytest.mark.parametrize("number", ["1e999", "-1e999", "1e300", "-1e7"])
def test_an_absurd_score_is_refused(number: str) -> None:
    line = json.dumps(several(rm={"R": {"scores": [1, 2, 12345]}})).replace("12345", number)
    with pytest.raises(DatasetError, match=r"line 1: .*(scores\[2\]|one JSON object)"):
        parse_row(FILE, 1, line.encode())


def test_bytes_that_are_not_utf_8_are_a_complaint_about_the_line() -> None:
    with pytest.raises(DatasetError, match="line 4"):
        parse_row(FILE, 4, b'{"id": "\xff\xfe"}')


def test_optional_fields_may_be_absent_or_null() -> None:
    row = parse(several(label=None, rm=None) | {"domain": None, "group": None, "rm": {"R": None}})
    assert (row.label, row.scores, row.domain, row.subset) == (None, {}, "", "")
    assert row.group.startswith("prompt/")


def test_a_row_without_label_is_read_as_a_row_but_not_as_a_pair(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(several()) + "\n" + json.dumps(several(id="g/2", label=None, extra=[1])) + "\n")
    assert [(row.label, row.fields.get("extra")) for row in load_rows(path)] == [(2, None), (None, [1])]
    with pytest.raises(DatasetError, match=r"line 2: field 'label' = None"):
        load_pairs(path)


TEXT = st.text(st.characters(codec="utf-8"), max_size=8)
SCORE = st.floats(-MAX_ABS_SCORE, MAX_ABS_SCORE) | st.sampled_from([0.0, 1.0])


MESSAGE = st.builds(
    Message,
    role=st.sampled_from(["system", "user", "assistant", "tool"]),
    text=TEXT,
    name=st.sampled_from(["", "add"]),
    calls=st.lists(st.builds(ToolCall, name=TEXT, arguments=TEXT, id=TEXT), max_size=2).map(tuple),
    answers=st.sampled_from(["", "c1"]),
)
SAID = st.tuples(TEXT, st.none()) | st.lists(MESSAGE, min_size=2, max_size=3).map(
    lambda turns: (text_of(turns), tuple(turns))
)
FACTS = st.dictionaries(TEXT, st.none() | st.booleans() | TEXT | SCORE, max_size=3)


@st.composite
def instances(draw: st.DrawFn, n: int) -> Instance:
    (prompt, turns), said = draw(SAID), [draw(SAID) for _ in range(n)]
    answers = tuple(turns for _, turns in said)
    return Instance(
        prompt,
        tuple(text for text, _ in said),
        draw(st.none() | TEXT),
        draw(FACTS),
        turns,
        answers if any(answers) else None,
    )


@st.composite
def labelled_pairs(draw: st.DrawFn) -> LabelledPair:
    n = draw(st.integers(2, 5))
    scores = draw(st.dictionaries(TEXT, st.tuples(*[SCORE] * n), max_size=3))
    return LabelledPair(
        id=draw(TEXT),
        instance=draw(instances(n)),
        label=draw(st.integers(0, n - 1)),
        scores=scores,
        verdicts=draw(st.dictionaries(TEXT, st.integers(TIE, n - 1), max_size=3))
        | {name: draw(st.sampled_from([verdict_of(row), TIE])) for name, row in scores.items()},
        domain=draw(TEXT),
        subset=draw(TEXT),
        group=draw(TEXT.filter(bool)),
    )


@given(labelled_pairs())
def test_what_is_written_is_read_back_equal(pair: LabelledPair) -> None:
    row = parse_row(FILE, 1, encode_pair(pair))
    read = LabelledPair(
        row.id, row.instance, row.label or 0, row.scores, row.verdicts, row.domain, row.subset, row.group
    )
    assert read == pair


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"prompt": []}, "at least one message"),
        ({"prompt": [{"content": "hi"}]}, "role"),
        ({"prompt": [{"role": " ", "content": "hi"}]}, "say who speaks"),
        ({"prompt": [{"role": "user"}]}, "says nothing"),
        ({"response_a": [{"role": "user", "content": [1]}]}, "response_a"),
        ({"metadata": {"a": [1]}}, "flat object"),
        ({"reference": 7}, "reference"),
    ],
)
def test_messages_and_facts_that_do_not_fit_are_told(fields: dict[str, object], words: str) -> None:
    row = {"id": "1", "prompt": "p", "response_a": "x", "response_b": "y", "label": "a", **fields}
    with pytest.raises(DatasetError, match=words):
        parse_row(FILE, 1, msgspec.json.encode(row))


def test_pairs_of_two_are_written_with_letters_and_others_with_indices(tmp_path: Path) -> None:
    two = LabelledPair("2", Instance("p", ("x", "y")), 1, {"R": (1.0, 0.0)}, {"R": 0}, group="g")
    three = LabelledPair("3", Instance("p", ("x", "y", "z")), 1, {"R": (1.0, 0.0, 1.0)}, {"R": TIE}, group="g")
    write_pairs(tmp_path / "out.jsonl", [two, three])
    first, second = (msgspec.json.decode(line) for line in (tmp_path / "out.jsonl").read_bytes().splitlines())
    assert (first["response_b"], first["label"], first["rm"]["R"]) == (
        "y",
        "b",
        {"score_a": 1.0, "score_b": 0.0, "verdict": "a"},
    )
    assert (second["responses"], second["label"], second["rm"]["R"]) == (
        ["x", "y", "z"],
        1,
        {"scores": [1.0, 0.0, 1.0], "verdict": "tie"},
    )
    again = load_pairs(tmp_path / "out.jsonl")
    assert again == [two, three]
    assert pairs_digest(again) == pairs_digest([two, three])
    np.testing.assert_array_equal(pool_matrix(again, ["R"]), [[0.0], [0.0]])

"""Rows and answers: what is still to be asked, and what a row looks like when the answers are put in."""

from __future__ import annotations

from pathlib import Path

import msgspec

from router_core.rows import Row, parse_row
from service.lab.labelling.journal import Answer, content_key
from service.lab.labelling.rows import Answers, Known, earlier_answers, labelled_lines, summarise


def row(row_id: str, text: str = "x", **fields: object) -> Row:
    content = {"id": row_id, "prompt": "p", "response_a": text, "response_b": "y", "label": "a", **fields}
    return parse_row(Path("f"), 1, msgspec.json.encode(content))


def known(rows: list[Row], journal: Answers | None = None, earlier: Answers | None = None) -> Known:
    return Known(rows, [content_key(one.instance) for one in rows], earlier or {}, journal or {})


def answered(one: Row, model: str = "rm", *scores: float, reason: str | None = None) -> dict[tuple[str, str], Answer]:
    key = content_key(one.instance)
    return {(key, model): Answer(key, model, scores=scores or None, reason=reason)}


def to_ask(state: Known, *, retry_missing: bool = False, again: bool = False) -> int:
    return len(state.to_ask("rm", retry_missing=retry_missing, again=again))


def test_rows_of_equal_content_are_asked_about_once() -> None:
    assert to_ask(known([row("1"), row("2"), row("3", "z")])) == 2


def test_scores_in_the_row_the_journal_or_the_earlier_output_need_no_asking() -> None:
    rows = [row("1", "s", rm={"rm": {"score_a": 1, "score_b": 0}}), row("2", "t"), row("3", "u"), row("4", "v")]
    state = known(rows, answered(rows[1], "rm", 1.0, 2.0), answered(rows[2], "rm", 3.0, 4.0))
    assert [instance.responses[0] for _, instance in state.to_ask("rm", retry_missing=False, again=False)] == ["v"]


def test_a_refusal_is_asked_again_on_demand_only() -> None:
    one = row("1")
    refused = answered(one, reason="refused (400): long")
    assert [to_ask(known([one], refused), retry_missing=retry) for retry in (False, True)] == [0, 1]
    assert [to_ask(known([one], {}, refused), retry_missing=retry) for retry in (False, True)] == [0, 1]


def test_again_asks_what_is_known_but_not_what_this_run_has_asked_already() -> None:
    rows = [row("1", "s", rm={"rm": {"score_a": 1, "score_b": 0}}), row("2", "t"), row("3", "u")]
    state = known(rows, answered(rows[1], "rm", 1.0, 2.0), answered(rows[2], "rm", 3.0, 4.0))
    assert to_ask(state, again=True) == 2


def test_a_row_whose_text_has_changed_is_asked_again() -> None:
    assert to_ask(known([row("1", "new")], answered(row("1", "old"), "rm", 1.0, 2.0))) == 1


def test_answers_are_put_in_and_everything_else_stays() -> None:
    one = row("1", extra={"kept": [1]}, rm={"old": {"score_a": 1, "score_b": 2, "note": "n"}})
    (line,) = labelled_lines(known([one], answered(one, "rm", 0.25, 0.25)), ["rm"])
    fields = msgspec.json.decode(line)
    assert fields["extra"] == {"kept": [1]}
    assert fields["rm"]["old"] == {"score_a": 1, "score_b": 2, "note": "n"}
    assert fields["rm"]["rm"] == {"score_a": 0.25, "score_b": 0.25, "verdict": "tie"}
    assert "rm_missing" not in fields


def test_several_responses_get_lists() -> None:
    content = {"id": "1", "prompt": "p", "responses": ["x", "y", "z"]}
    one = parse_row(Path("f"), 1, msgspec.json.encode(content))
    (line,) = labelled_lines(known([one], answered(one, "rm", 1.0, 3.0, 2.0)), ["rm"])
    assert msgspec.json.decode(line)["rm"] == {"rm": {"scores": [1.0, 3.0, 2.0], "verdict": 1}}


def test_a_refusal_is_noted_unless_the_row_holds_scores_and_goes_when_scores_come() -> None:
    bare, scored = row("1", "s"), row("2", "t", rm={"rm": {"score_a": 1, "score_b": 0}})
    refusals = answered(bare, reason="refused (400): long") | answered(scored, reason="timeout: late")
    first, second = (msgspec.json.decode(line) for line in labelled_lines(known([bare, scored], refusals), ["rm"]))
    assert first["rm_missing"] == {"rm": "refused (400): long"}
    assert "rm_missing" not in second
    again = parse_row(Path("f"), 1, msgspec.json.encode(first))
    assert earlier_answers([again]) == answered(bare, reason="refused (400): long")
    (line,) = labelled_lines(known([again], answered(bare, "rm", 1.0, 0.0), earlier_answers([again])), ["rm"])
    assert "rm_missing" not in msgspec.json.decode(line)


def test_answers_of_models_that_this_run_does_not_name_are_kept() -> None:
    one = row("1")
    (line,) = labelled_lines(known([one], answered(one, "rm", 1.0, 0.0), answered(one, "other", 2.0, 1.0)), ["rm"])
    assert list(msgspec.json.decode(line)["rm"]) == ["rm", "other"]


def test_the_summary_counts_scores_reasons_and_right_verdicts() -> None:
    rows = [row("1", "s"), row("2", "t"), row("3", "u", label=None), row("4", "v"), row("5", "w")]
    journal = (
        answered(rows[0], "rm", 1.0, 0.0)
        | answered(rows[1], "rm", 1.0, 1.0)
        | answered(rows[2], "rm", 0.0, 1.0)
        | answered(rows[3], reason="refused (400): a")
        | answered(rows[4], reason="refused (400): b")
    )
    found = summarise(known(rows, journal), {"rm": 4})
    assert found == {
        "rows": 5,
        "models": {"rm": {"asked": 4, "scored": 3, "missing": {"refused (400)": 2}, "accuracy": 0.75}},
    }

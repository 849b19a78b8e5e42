"""What is read from a judge's answer, and what is not."""

from __future__ import annotations

import math
from typing import Any

import msgspec
import pytest

from service.scorers.judge.verdicts import (
    SMALLEST_PROBABILITY,
    VerdictError,
    grade_of_logprobs,
    grade_of_text,
    preference_of_logprobs,
    preference_of_text,
)
from service.scorers.judge.wire import Choice


def choice(**fields: Any) -> Choice:
    """A choice as a server writes it."""
    return msgspec.convert({"message": {}} | fields, Choice)


def said(text: str | None, **fields: Any) -> Choice:
    return choice(message={"content": text}, **fields)


def token(chosen: str, alternatives: dict[str, float] | None = None) -> dict[str, Any]:
    """A generated token; alternatives are probabilities."""
    given = alternatives or {chosen: 1.0}
    tops = [{"token": name, "logprob": math.log(p), "bytes": None} for name, p in given.items()]
    return {"token": chosen, "logprob": tops[0]["logprob"], "bytes": None, "top_logprobs": tops}


def tokens(*parts: dict[str, Any], **fields: Any) -> Choice:
    return choice(logprobs={"content": list(parts)}, **fields)


def test_the_labels_share_of_the_probability_is_the_preference() -> None:
    found = preference_of_logprobs(tokens(token("A", {"A": 0.6, "B": 0.2, "The": 0.2})))
    assert found == pytest.approx(0.75)


def test_a_label_with_and_without_space_adds_up() -> None:
    found = preference_of_logprobs(tokens(token("A", {"A": 0.3, " A": 0.3, "B": 0.1, " B": 0.1, "**B": 0.1})))
    assert found == pytest.approx(0.6 / 0.9)


def test_brackets_and_space_before_the_label_are_skipped() -> None:
    assert preference_of_logprobs(tokens(token("\n"), token("[["), token("B", {"B": 0.8, "A": 0.2}))) == pytest.approx(
        0.2
    )


def test_a_label_that_is_not_listed_gets_the_smallest_probability() -> None:
    assert preference_of_logprobs(tokens(token("A", {"A": 0.97, "The": 0.02, "I": 0.01}))) == pytest.approx(0.97 / 0.98)


def test_certainty_stays_finite() -> None:
    assert preference_of_logprobs(tokens(token("A", {"A": 1.0, "B": 1e-30}))) == 1 - SMALLEST_PROBABILITY


def test_thinking_is_skipped_in_tokens() -> None:
    thinking = [token("<think>"), token("A"), token(" is"), token(" bad"), token("</think>"), token("\n\n")]
    assert preference_of_logprobs(tokens(*thinking, token("B", {"B": 0.9, "A": 0.1}))) == pytest.approx(0.1)


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (choice(), "no log-probabilities"),
        (tokens(), "no log-probabilities"),
        (tokens({"token": "A", "logprob": 0.0}), "no alternatives"),
        (tokens(token("The", {"The": 0.9, "A": 0.05, "B": 0.02})), "at least 0.1"),
        (tokens(token("a", {"a": 0.9, "b": 0.1})), "at least 0.1"),
        (tokens(token("\n"), finish_reason="length"), "ended before a label; it was cut off"),
        (tokens(token("<think>"), token("A")), "does not end"),
        (tokens(token("A"), message={"content": None, "reasoning_content": "A is"}), "does not end"),
        (tokens(token("A"), message={"content": None, "reasoning": "A is"}), "does not end"),
    ],
)
def test_unreadable_logprobs_are_an_error(answer: Choice, words: str) -> None:
    with pytest.raises(VerdictError, match=words):
        preference_of_logprobs(answer)


def test_grade_is_the_expectation() -> None:
    assert grade_of_logprobs(tokens(token("7", {"7": 0.4, "8": 0.4, "The": 0.2}))) == pytest.approx(7.5)
    assert grade_of_text(said("Good.\n[[7]]")) == 7.0


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("A is right.\n[[A]]", 0.9),
        ("[[B]]", 0.1),
        ("Both.\n\n**[[C]]**\n", 0.5),
        ("The response says [[A]], but that is a trick.\nVerdict: [[B]].", 0.1),
        ("<think>\n[[A]]\n</think>\n[[B]]", 0.1),
        ("looks like [[A]]\n</think>\n\n[[B]]", 0.1),
        ("[THINK]hm[/THINK][[A]]", 0.9),
    ],
)
def test_the_last_line_holds_the_verdict(text: str, expected: float) -> None:
    assert preference_of_text(said(text)) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (None, "no verdict"),
        ("", "no verdict"),
        ("A", "no verdict"),
        ("[A]", "no verdict"),
        ("[[a]]", "no verdict"),
        ("[[D]]", "no verdict"),
        ("[[A]]\nI hope this helps!", "no verdict"),
        ("[[A]] or [[B]]", "several verdicts"),
        ("<think>\n[[A]]", "does not end"),
        ("[[7]]", "no verdict"),
    ],
)
def test_text_without_a_strict_verdict_is_an_error(text: str | None, words: str) -> None:
    with pytest.raises(VerdictError, match=words):
        preference_of_text(said(text))


@pytest.mark.parametrize("text", ["[[0]]", "[[10]]", "[[A]]", "7/9", "[[7.5]]"])
def test_text_without_a_strict_grade_is_an_error(text: str) -> None:
    with pytest.raises(VerdictError):
        grade_of_text(said(text))


def test_an_answer_that_was_cut_off_says_so() -> None:
    with pytest.raises(VerdictError, match="raise `max_tokens`"):
        preference_of_text(said("I think that", finish_reason="length"))

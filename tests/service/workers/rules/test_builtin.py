"""The built-in rules on answers as models write them."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from router_core.dataset import load_pairs
from service.workers.rules.builtin import BUILTIN, RuleOptionsError
from service.workers.rules.formats import CHECKS

RB9_DEV = Path(os.environ.get("RB9_DEV", Path(__file__).resolve().parents[5] / "shared/data/rb9_dev.jsonl"))

# Solutions in the style of MATH and GSM8K: reference, response, right.
MATH = [
    (r"\frac{1}{2}", r"The probability is $\frac{3}{6}$, so the answer is $\boxed{\frac{1}{2}}$.", 1),
    (r"\frac{1}{2}", r"Hence $P = 0.5$. The final answer is $0.5$.", 1),
    (r"\frac{1}{2}", r"We get $\boxed{\frac{1}{3}}$.", 0),
    (r"2\sqrt{13}", r"By Pythagoras $d = \sqrt{52}$, so $\boxed{\sqrt{52}}$.", 1),
    (r"\left( 3, \frac{\pi}{2} \right)", r"so the point is $\boxed{(3, \pi/2)}$", 1),
    (r"(2,\infty)", r"All $x > 2$, that is $\boxed{(2, \infty)}$.", 1),
    (r"(2,\infty)", r"All $x \ge 2$, that is $\boxed{[2, \infty)}$.", 0),
    (r"x^2 + 2x + 1", r"Factoring back, $\boxed{(x+1)^2}$.", 1),
    (r"\{1,3\}", r"The roots are $\boxed{\{3, 1\}}$.", 1),
    (r"10\%", r"The discount is $\boxed{10\%}$.", 1),
    (r"\begin{pmatrix} 1 & 2 \\ 3 & 4 \end{pmatrix}",
     r"Thus $A = \boxed{\begin{pmatrix} 1 & 2 \\ 3 & 4 \end{pmatrix}}$.", 1),
    ("She has 5 + 7 = <<5+7=12>>12 apples.\n#### 12", "5 plus 7 makes 12, so she has 12 apples.", 1),
    ("#### 1,234", "The total is 1234.", 1),
    ("12", "The answer is 13, not 12... no: the answer is 13.", 0),
    ("12", "I do not know.", 0),
    (r"\text{Tuesday}", r"It falls on a $\boxed{\text{Tuesday}}$.", 1),
    ("The sum is $\\boxed{\\dfrac{7}{3}}$.", r"We find $\boxed{\frac{14}{6}}$.", 1),
    ("50", r"Thus the area is $\boxed{50\text{ cm}^2}$.", 1),
]  # fmt: skip


def score(rule: str, response: str, reference: str | None = None, options: Any = None, **metadata: Any) -> Any:
    return BUILTIN[rule](options or {})([{"role": "user", "content": "?"}], response, reference, metadata)


@pytest.mark.parametrize(("reference", "response", "right"), MATH)
def test_math_compares_values_and_not_texts(reference: str, response: str, right: int) -> None:
    assert score("math", response, reference) == right


@pytest.mark.slow
@pytest.mark.skipif(not RB9_DEV.is_file(), reason="set RB9_DEV to the recorded evaluation pairs")
def test_math_tells_solutions_of_models_apart() -> None:
    """With the right solution of a MATH problem as the reference, right responses pass and few wrong ones do."""
    pairs = [pair for pair in load_pairs(RB9_DEV) if pair.domain == "math"]
    assert pairs
    right, wrong = (
        [score("math", pair.instance.responses[which], pair.instance.responses[pair.label]) for pair, which in picked]
        for picked in ([(pair, pair.label) for pair in pairs], [(pair, 1 - pair.label) for pair in pairs])
    )
    assert sum(right) / len(pairs) >= 0.98
    assert sum(wrong) / len(pairs) <= 0.08


def test_math_abstains_without_an_expression_to_compare() -> None:
    assert score("math", r"$\boxed{2}$") is None
    assert score("math", r"$\boxed{2}$", "") is None


@pytest.mark.parametrize(
    ("response", "right"),
    [
        ("We compute 7 + 5 = 12", True),
        ("That makes 7 + 5 = 13.", False),
        ("2 + 3 * 4 = 14, and 20 − 2 × 3 = 14", True),
        ("First 2 + 2 = 4. Then 4 + 4 = 9.", False),
        ("10 / 4 = 2.5; 10 / 3 = 3.33; 1 / 3 = 0.3", True),
        ("10 / 3 = 3", False),
        ("1,200 + 34 = 1,234 and 3 - 5 = -2", True),
        ("- 7 + 5 = 12\n- 1 + 1 = 2", True),
        # Parts of something longer say nothing of themselves.
        ("y - 3 + 4 = 1, 2x + 3 = 7, 3 + 4 = 5 + 2, 2 * (1 + 1) = 4", None),
        ("1 / 0 = 0", None),
        ("The answer is twelve.", None),
    ],
)
def test_sums_are_worked_out(response: str, right: bool | None) -> None:
    assert score("sums", response) is right


def test_exact_ignores_case_space_and_final_dot() -> None:
    assert score("exact", " Paris.\n", "paris") is True
    assert score("exact", "Paris", "paris", {"case": True}) is False
    assert score("exact", "Paris.", "Paris", {"punctuation": True}) is False
    assert score("exact", "London", "Paris") is False
    assert score("exact", "Paris") is None


def test_regex_takes_its_pattern_from_option_or_reference() -> None:
    assert score("regex", "order 66\ndone", options={"pattern": r"^done$"}) is True
    assert score("regex", "x = 12", r"\b1[23]\b") is True
    assert score("regex", "x = 12", r"\d+", {"whole": True}) is False
    assert score("regex", "x = 12") is None


def test_json_schema_reads_fences_and_references() -> None:
    schema = {"type": "object", "required": ["a"], "properties": {"a": {"type": "integer"}}}
    assert score("json_schema", 'Here:\n```json\n{"a": 1}\n```', options={"schema": schema}) is True
    assert score("json_schema", '{"a": "1"}', options={"schema": schema}) is False
    assert score("json_schema", "[1]", '{"type": "array"}') is True
    assert score("json_schema", "no json") is False


def test_length_counts_words_or_characters() -> None:
    assert score("length", "one two three", options={"max": 3}) is True
    assert score("length", "one two three", options={"max": 12, "unit": "characters"}) is False
    assert score("length", "one", options={"min": 2}) is False


FOLLOWED: list[tuple[str, Any, str, str]] = [
    ("min_words", 3, "one two three", "one two"),
    ("max_words", 2, "well-known fact", "a well known fact"),
    ("min_sentences", 2, "One. Two!", "One."),
    ("max_sentences", 1, "Only 3.5 of it.", "One. Two."),
    ("paragraphs", 2, "a\n\nb", "a\nb"),
    ("bullets", 2, "* a\n* b", "* a\n* b\n* c"),
    ("min_highlights", 1, "an *accent* here", "none here"),
    ("min_placeholders", 1, "Dear [name],", "Dear you,"),
    ("min_capital_words", 1, "NASA flies", "Nasa flies"),
    ("keywords", "sun, moon", "The moon and the sun.", "The moons and the sun."),
    ("forbidden_words", "very", "every day", "very good"),
    ("starts_with", "Dear", "Dear all", "Hello"),
    ("ends_with", "Bye.", "So long. Bye.", "So long."),
    ("comma", False, "no such mark", "yes, one"),
    ("json", True, '{"a": 1}', "a: 1"),
    ("lowercase", True, "all small", "One Capital"),
    ("uppercase", True, "ALL LARGE", "not all"),
    ("title", True, "<<A title>>\ntext", "text"),
    ("quoted", True, '"so it is"', "so it is"),
    ("postscript", True, "text\nP.S. more", "text"),
]


@pytest.mark.parametrize(("name", "wanted", "good", "bad"), FOLLOWED)
def test_format_tells_who_follows_an_instruction(name: str, wanted: Any, good: str, bad: str) -> None:
    assert (score("format", good, options={name: wanted}), score("format", bad, options={name: wanted})) == (1.0, 0.0)
    assert score("format", good, **{f"format.{name}": wanted}) == 1.0


def test_every_check_has_its_case() -> None:
    assert {name for name, *_ in FOLLOWED} == set(CHECKS)


def test_format_is_the_share_of_instructions_that_are_followed() -> None:
    assert score("format", "one, two", options={"comma": False, "max_words": 2}) == 0.5
    assert score("format", "one, two", options={"comma": False}, **{"format.comma": True}) == 1.0
    assert score("format", "one, two") is None


@pytest.mark.parametrize(
    ("rule", "options", "words"),
    [
        ("math", {"places": 2}, "'places' is unknown"),
        ("exact", {"case": 1}, "use true or false"),
        ("regex", {"pattern": "("}, "pattern"),
        ("json_schema", {"schema": {"type": 3}}, "no JSON schema"),
        ("length", {"min": -1}, "use a whole number"),
        ("length", {"min": 1, "unit": "lines"}, "use words or characters"),
        ("format", {"commas": True}, "'commas' is unknown"),
        ("format", {"comma": 3}, "use true or false"),
    ],
)
def test_options_that_cannot_be_used_say_what_can(rule: str, options: Any, words: str) -> None:
    with pytest.raises(RuleOptionsError, match=words):
        BUILTIN[rule](options)

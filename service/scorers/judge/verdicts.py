"""Verdicts: what a judge's answer says, in numbers. What cannot be read is an error, never a guess.

From log-probabilities, the alternatives at the verdict's token are read: its labels' share of the probability. From
text, the last line must hold `[[label]]` and nothing that contradicts it. A reasoning model's thinking is skipped in
both. Pure: structs in, numbers out.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from typing import Final

from service.scorers.judge.wire import Choice, TokenLogprob, TopToken
from service.scorers.wire import sigmoid

LETTERS: Final = ("A", "B")
TIE_LETTER: Final = "C"
GRADES: Final = tuple("123456789")
"""One digit is one token in every vocabulary; `10` is two in most."""

LABEL_MASS: Final = 0.1
"""Least probability of all labels together at the verdict's token: with less, the judge says something else."""

TEXT_PROBABILITY: Final = 0.9
"""Probability that a verdict in words is taken to give to what it prefers; words do not say how sure they are."""

SMALLEST_PROBABILITY: Final = 1e-6
"""Bound of a preference's probability away from 0 and 1: log-odds stay within 13.8."""

_THOUGHT: Final = re.compile(r"</(?:think|thinking|thought|reasoning)>|\[/THINK\]")
_THINKING: Final = re.compile(r"<(?:think|thinking|thought|reasoning)>|\[THINK\]")
_DECORATION: Final = " \t\r\n[](){}*_`'\":."
_VERDICT: Final = re.compile(r"\[\[([A-Z0-9]+)\]\]")


class VerdictError(Exception):
    """No verdict can be read from an answer; the message says why, without the judge's words."""


def preference_of_logprobs(choice: Choice, label_mass: float = LABEL_MASS) -> float:
    """Return the probability that the response shown first is better.

    A label that is not among the alternatives is given the smallest probability listed, which is a bound of its own.

    Args:
        choice: the answer.
        label_mass: see `LABEL_MASS`.

    Raises:
        VerdictError: see the module.
    """
    token, found = _label_logprobs(choice, LETTERS, label_mass)
    least = min(one.logprob for one in token.top_logprobs)
    first, second = (found.get(label, least) for label in LETTERS)
    return _bounded(sigmoid(first - second))


def grade_of_logprobs(choice: Choice, label_mass: float = LABEL_MASS) -> float:
    """Return the expected grade under the labels' probabilities, in [1, 9].

    Args:
        choice: the answer.
        label_mass: see `LABEL_MASS`.

    Raises:
        VerdictError: see the module.
    """
    _, found = _label_logprobs(choice, GRADES, label_mass)
    weights = {label: math.exp(logprob) for label, logprob in found.items()}
    return sum(int(label) * weight for label, weight in weights.items()) / sum(weights.values())


def preference_of_text(choice: Choice) -> float:
    """Return the probability that the response shown first is better: 0.9, 0.1, or 0.5 for a tie.

    Raises:
        VerdictError: see the module.
    """
    label = _label_of_text(choice, (*LETTERS, TIE_LETTER))
    return {"A": TEXT_PROBABILITY, "B": 1.0 - TEXT_PROBABILITY, TIE_LETTER: 0.5}[label]


def grade_of_text(choice: Choice) -> float:
    """Return the grade, in [1, 9].

    Raises:
        VerdictError: see the module.
    """
    return float(_label_of_text(choice, GRADES))


def _bounded(probability: float) -> float:
    return min(max(probability, SMALLEST_PROBABILITY), 1.0 - SMALLEST_PROBABILITY)


def _label_logprobs(
    choice: Choice, labels: Iterable[str], label_mass: float
) -> tuple[TokenLogprob, Mapping[str, float]]:
    """Return the verdict's token, and the log-probability of each label among its alternatives."""
    tokens = choice.logprobs.content if choice.logprobs is not None else None
    if not tokens:
        raise VerdictError("the answer holds no log-probabilities")
    token = _verdict_token(tokens, choice)
    if not token.top_logprobs:
        raise VerdictError("the answer holds no alternatives (`top_logprobs`)")
    found = _by_label(token.top_logprobs, frozenset(labels))
    mass = sum(math.exp(logprob) for logprob in found.values())
    if mass < label_mass or not found:
        raise VerdictError(
            f"the labels have a probability of {mass:.2g} together; at least {label_mass:g} (`label_mass`) is needed"
        )
    return token, found


def _verdict_token(tokens: list[TokenLogprob], choice: Choice) -> TokenLogprob:
    """The first token after the thinking that is more than space and brackets."""
    text = "".join(token.token for token in tokens)
    begin = _end_of_thinking(text, apart=bool(choice.message.reasoning_content or choice.message.reasoning))
    position = 0
    for token in tokens:
        if position >= begin and token.token.strip(_DECORATION):
            return token
        position += len(token.token)
    raise VerdictError("the answer ended before a label" + _cut(choice))


def _end_of_thinking(text: str, *, apart: bool) -> int:
    """Where the thinking ends in a text; 0 where there is none.

    Args:
        text: of an answer.
        apart: the server has taken thinking out of the answer, so that there must be some in the tokens.
    """
    ends = [mark.end() for mark in _THOUGHT.finditer(text)]
    if ends:
        return ends[-1]
    if apart or _THINKING.search(text):
        raise VerdictError("the thinking does not end: raise `max_tokens`, or read the verdict from text")
    return 0


def _by_label(alternatives: Iterable[TopToken], labels: frozenset[str]) -> dict[str, float]:
    """Log-probability by label; ` A` and `A` are one label, whose probabilities add up."""
    mass: dict[str, float] = {}
    for one in alternatives:
        label = one.token.strip(_DECORATION)
        if label in labels and not math.isnan(one.logprob):
            mass[label] = mass.get(label, 0.0) + math.exp(min(one.logprob, 0.0))
    return {label: math.log(value) for label, value in mass.items() if value > 0.0}


def _label_of_text(choice: Choice, labels: Iterable[str]) -> str:
    text = choice.message.content or ""
    # With the thinking apart, what is left has none.
    text = text[_end_of_thinking(text, apart=False) :].rstrip()
    last = text.rpartition("\n")[2]
    found: set[str] = set(_VERDICT.findall(last))
    if len(found) != 1 or not found <= set(labels):
        said = "several verdicts" if len(found) > 1 else "no verdict"
        raise VerdictError(f"the last line holds {said} of the form [[label]]" + _cut(choice))
    return found.pop()


def _cut(choice: Choice) -> str:
    return "; it was cut off, raise `max_tokens`" if choice.finish_reason == "length" else ""

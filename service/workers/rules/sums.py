"""The rule `sums`: is every sum right that a response writes out, such as `7 + 5 = 12`? It needs no reference."""

from __future__ import annotations

import re
from fractions import Fraction
from typing import Final

from service.workers.rules.child import Fact

_NUMBER: Final = r"\d[\d,]*(?:\.\d+)?"
_SUM: Final = re.compile(rf"({_NUMBER}(?:\s*[-+−*×·/÷]\s*{_NUMBER})+)\s*=\s*([-−]?\s?{_NUMBER})")
_TOKEN: Final = re.compile(rf"{_NUMBER}|[-+−*×·/÷]")
_CUT_BEFORE: Final = re.compile(r"(?:[\w)\].,]|[-+−*×·/÷^(=]\s*)$")
"""What stands before a sum that began earlier, such as `x` or `2 +`."""

_CUT_AFTER: Final = re.compile(r"\w|\s*[-+−*×·/÷^(]\s*[\w(]|[,.]\d")
"""What stands after a result that goes on."""

LONGEST: Final = 200
"""Characters of a sum that is worked out; longer ones are passed over."""


def sums_rule(
    messages: list[dict[str, str]], response: str, reference: str | None, metadata: dict[str, Fact]
) -> bool | None:
    """Return True if every sum in the response is right; None if it writes none.

    A result with decimals may be rounded to them.

    >>> sums_rule([], "7 + 5 = 12, and 12 / 7 = 1.71.", None, {}), sums_rule([], "Twelve.", None, {})
    (True, None)
    """
    verdicts = []
    for found in _SUM.finditer(response):
        left, right = found.groups()
        before, after = response[max(found.start() - 8, 0) : found.start()], response[found.end() : found.end() + 8]
        bullet = re.search(r"(?:^|\n)\s*[-*]\s+$", before) is not None
        if len(left) > LONGEST or _CUT_AFTER.match(after) or (_CUT_BEFORE.search(before) and not bullet):
            continue
        value = _value(left)
        if value is not None:
            verdicts.append(_equal(value, right))
    return all(verdicts) if verdicts else None


def _value(text: str) -> Fraction | None:
    """Return what a sum makes, products before sums; None where it divides by 0."""
    tokens = _TOKEN.findall(text)
    total, term = Fraction(0), _number(tokens[0])
    for sign, token in zip(tokens[1::2], tokens[2::2], strict=True):
        number = _number(token)
        if sign in "*×·":
            term *= number
        elif sign in "/÷":
            if number == 0:
                return None
            term /= number
        else:
            total, term = total + term, number if sign == "+" else -number
    return total + term


def _equal(value: Fraction, text: str) -> bool:
    digits = text.replace(" ", "").replace("−", "-")
    decimals = len(digits.partition(".")[2])
    slack = Fraction(1, 2 * 10**decimals) if decimals else Fraction(0)
    return abs(value - _number(digits)) <= slack


def _number(text: str) -> Fraction:
    return Fraction(text.replace(",", ""))

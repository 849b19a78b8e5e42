"""The rule `math`: is the answer in a response the reference, as mathematics? Library: math-verify.

Runs in a rule's process, which bounds its time: the library's own timeouts are off, since they would make a wrong
answer of one that was not compared.
"""

from __future__ import annotations

import logging
import re
from typing import Any

from math_verify import parse, verify

from service.workers.rules.child import Fact

# It warns that its timeouts are off.
logging.getLogger("math_verify").setLevel(logging.ERROR)


def math_rule(
    messages: list[dict[str, str]], response: str, reference: str | None, metadata: dict[str, Fact]
) -> float | None:
    """Return 1 if the response's answer equals the reference, 0 if not or if it has none.

    The answer is what stands in the last `\\boxed{…}`, else the last expression after words such as "the answer is",
    else the last expression. The reference is an expression in LaTeX or plain text, or a solution that ends with one;
    what follows the last `####` alone is read, as in GSM8K.

    None without a reference, or with one that holds no expression.
    """
    if reference is None:
        return None
    gold = expressions_of(reference)
    if not gold:
        return None
    return float(verify(gold, parse(response, parsing_timeout=None), timeout_seconds=None, raise_on_error=True))


def expressions_of(reference: str) -> list[Any]:
    """Return the expression of a reference as math-verify has it; empty where there is none."""
    text = reference.rpartition("####")[2].strip()
    if re.fullmatch(r"[A-Za-z][A-Za-z ]+", text):
        # A word, not a product of letters.
        text = rf"\text{{{text}}}"
    if not re.search(r"\$|\\boxed|\\\(|\\\[", text) and len(text) <= 200:
        found: list[Any] = parse(f"${text}$", parsing_timeout=None)
        # A string alone means that it was found and not understood.
        if any(not isinstance(one, str) for one in found):
            return found
    return [*parse(text, parsing_timeout=None)]

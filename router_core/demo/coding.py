"""The code domain: one-line Python functions from a one-sentence description.

The wrong response compiles and looks the same but has a wrong operator, an off-by-one constant or index, or the sibling
function (`min` for `max`). Truth: what the description says, which a test executes. Called by `domains`.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from router_core.demo.draft import Draft, pick

FUNCTION_NAMES = ("solve", "compute", "apply", "run", "helper", "process", "transform", "func", "task", "main")
REQUESTS = (
    "Write a Python function {f}({v}) that returns {d}.",
    "Implement {f}({v}) in Python: it should return {d}.",
    "Please code a Python function {f}({v}) returning {d}.",
    "In Python, define {f}({v}) so that it returns {d}.",
    "Complete the Python function {f}({v}). It returns {d}.",
)


@dataclass(frozen=True, slots=True)
class Family:
    """What a function should do: description, its expression, and expressions that do something else.

    `{v}` is the argument, `{k}` a constant of 2 to 9, `{j}` = k + 1 and `{h}` = k - 1.
    """

    name: str
    arguments: tuple[str, ...]
    description: str
    right: str
    wrong: tuple[str, ...]


NUMBER = ("n", "x", "value", "number")
ITEMS = ("items", "values", "data", "numbers")
TEXT = ("text", "word", "name", "line")

FAMILIES = (
    Family("plus", NUMBER, "{v} plus {k}", "{v} + {k}", ("{v} - {k}", "{v} * {k}", "{v} + {j}", "{v} + {h}")),
    Family("minus", NUMBER, "{v} minus {k}", "{v} - {k}", ("{v} + {k}", "{k} - {v}", "{v} - {j}", "{v} - {h}")),
    Family("times", NUMBER, "{v} times {k}", "{v} * {k}", ("{v} + {k}", "{v} ** {k}", "{v} * {j}", "{v} * {h}")),
    Family("remainder", NUMBER, "the remainder of {v} divided by {k}", "{v} % {k}", ("{v} // {k}", "{v} % {j}")),
    Family("quotient", NUMBER, "the whole quotient of {v} and {k}", "{v} // {k}", ("{v} % {k}", "{v} // {j}")),
    Family("above", NUMBER, "whether {v} is above {k}", "{v} > {k}", ("{v} < {k}", "{v} >= {k}")),
    Family("below", NUMBER, "whether {v} is below {k}", "{v} < {k}", ("{v} > {k}", "{v} <= {k}")),
    Family("at-least", NUMBER, "whether {v} is at least {k}", "{v} >= {k}", ("{v} > {k}", "{v} <= {k}")),
    Family("at-most", NUMBER, "whether {v} is at most {k}", "{v} <= {k}", ("{v} < {k}", "{v} >= {k}")),
    Family("even", NUMBER, "whether {v} is even", "{v} % 2 == 0", ("{v} % 2 == 1", "{v} // 2 == 0")),
    Family("odd", NUMBER, "whether {v} is odd", "{v} % 2 == 1", ("{v} % 2 == 0", "{v} // 2 == 1")),
    Family("square", NUMBER, "the square of {v}", "{v} ** 2", ("{v} * 2", "{v} ** 3")),
    Family("cube", NUMBER, "the cube of {v}", "{v} ** 3", ("{v} * 3", "{v} ** 2")),
    Family(
        "sum-to", NUMBER, "the sum from 1 to {v}", "sum(range({v} + 1))", ("sum(range({v}))", "sum(range({v} - 1))")
    ),
    Family("first", ITEMS, "the first element of {v}", "{v}[0]", ("{v}[1]", "{v}[-1]")),
    Family("last", ITEMS, "the last element of {v}", "{v}[-1]", ("{v}[0]", "{v}[1]")),
    Family("largest", ITEMS, "the largest of {v}", "max({v})", ("min({v})", "sum({v})")),
    Family("smallest", ITEMS, "the smallest of {v}", "min({v})", ("max({v})", "sum({v})")),
    Family("total", ITEMS, "the sum of {v}", "sum({v})", ("len({v})", "max({v})")),
    Family("count", ITEMS, "the length of {v}", "len({v})", ("sum({v})", "max({v})")),
    Family("head", ITEMS, "the first {k} elements of {v}", "{v}[:{k}]", ("{v}[{k}:]", "{v}[-{k}:]", "{v}[:{j}]")),
    Family("tail", ITEMS, "the last {k} elements of {v}", "{v}[-{k}:]", ("{v}[{k}:]", "{v}[:{k}]", "{v}[-{j}:]")),
    Family("skip", ITEMS, "{v} without the first {k} elements", "{v}[{k}:]", ("{v}[:{k}]", "{v}[-{k}:]", "{v}[{j}:]")),
    Family("reverse", ITEMS, "{v} in reverse order", "{v}[::-1]", ("{v}[::2]", "{v}[:-1]")),
    Family("ascending", ITEMS, "{v} sorted upwards", "sorted({v})", ("sorted({v})[::-1]", "{v}[::-1]")),
    Family("upper", TEXT, "{v} in upper case", "{v}.upper()", ("{v}.lower()", "{v}.title()")),
    Family("lower", TEXT, "{v} in lower case", "{v}.lower()", ("{v}.upper()", "{v}.title()")),
    Family("repeat", TEXT, "{v} repeated {k} times", "{v} * {k}", ("{v} * {j}", "{v}[:{k}]")),
)


def draw_code(rng: np.random.Generator) -> Draft:
    """Draw one function to write, with a body that does it and one that does something else."""
    family = pick(rng, FAMILIES)
    k = int(rng.integers(2, 10))
    argument, function = pick(rng, family.arguments), pick(rng, FUNCTION_NAMES)
    words = {"v": argument, "k": k, "j": k + 1, "h": k - 1}

    def body(expression: str) -> str:
        return f"def {function}({argument}): return {expression.format(**words)}"

    return Draft(
        prompt=pick(rng, REQUESTS).format(f=function, v=argument, d=family.description.format(**words)),
        right=body(family.right),
        wrong=body(pick(rng, family.wrong)),
        subset=f"code-{family.name}",
    )

"""The families about numbers: `arithmetic` and `sorting`. Called by `tasks`."""

from __future__ import annotations

import numpy as np

from loadtests.table1.task import Family, Task
from router_core.demo.draft import chance, pick

LARGEST_NUMBER = 40
"""Every number of every family is in [0, 40]."""

NAMES = ("Mia", "Omar", "Lena", "Ravi", "Tom", "Aiko")
ITEMS = ("apples", "marbles", "books", "coins", "shells", "cards")
_BARE = ("What is {a} {s} {b} ?", "Compute {a} {s} {b} .", "How much is {a} {s} {b} ?")
_STORIES = {
    "+": (
        "{n} has {a} {i} and gets {b} more . How many {i} does {n} have now ?",
        "There are {a} {i} on the table and {b} {i} in the bag . How many {i} are there ?",
    ),
    "-": (
        "{n} has {a} {i} and gives away {b} . How many {i} are left ?",
        "Of {a} {i} , {n} sold {b} . How many {i} remain ?",
    ),
}
_SORT = (
    "Sort the numbers {v} in {o} order .",
    "Put these numbers in {o} order : {v}",
    "Arrange in {o} order : {v}",
)


def _draw_arithmetic(rng: np.random.Generator) -> Task:
    sign = pick(rng, ("+", "-"))
    a, b = int(rng.integers(1, 21)), int(rng.integers(1, 21))
    if sign == "-":
        a, b = max(a, b), min(a, b)
    question = pick(rng, _BARE) if chance(rng, 0.5) else pick(rng, _STORIES[sign])
    prompt = question.format(a=a, b=b, s=sign, n=pick(rng, NAMES), i=pick(rng, ITEMS))
    return Task("arithmetic", prompt, (a, sign, b))


def _result(task: Task) -> int:
    a, sign, b = task.facts
    assert isinstance(a, int)
    assert isinstance(b, int)
    return a + b if sign == "+" else a - b


def _sum(task: Task, result: int) -> str:
    a, sign, b = task.facts
    return f"{a} {sign} {b} = {result}"


def _right_arithmetic(task: Task, rng: np.random.Generator) -> str:
    return _sum(task, _result(task))


def _wrong_arithmetic(task: Task, rng: np.random.Generator) -> str:
    truth = _result(task)
    near = [truth + step for step in (-10, -2, -1, 1, 1, 2, 10) if 0 <= truth + step <= LARGEST_NUMBER]
    return _sum(task, pick(rng, near))


def _check_arithmetic(task: Task, response: str) -> bool:
    return response == _sum(task, _result(task))


def _draw_sorting(rng: np.random.Generator) -> Task:
    count = int(rng.integers(3, 6))
    values = tuple(int(v) for v in rng.choice(LARGEST_NUMBER + 1, size=count, replace=False))
    order = pick(rng, ("ascending", "descending"))
    return Task("sorting", pick(rng, _SORT).format(v=_join(values), o=order), (values, order))


def _join(values: tuple[int, ...] | list[int]) -> str:
    return " ".join(map(str, values))


def _ordered(task: Task) -> list[int]:
    values, order = task.facts
    assert isinstance(values, tuple)
    return sorted(values, reverse=order == "descending")


def _right_sorting(task: Task, rng: np.random.Generator) -> str:
    return _join(_ordered(task))


def _wrong_sorting(task: Task, rng: np.random.Generator) -> str:
    """The other order, two neighbours exchanged, or one number left out."""
    ordered = _ordered(task)
    kind = int(rng.integers(3))
    if kind == 0:
        return _join(ordered[::-1])
    place = int(rng.integers(len(ordered) - 1))
    if kind == 1:
        ordered[place], ordered[place + 1] = ordered[place + 1], ordered[place]
    else:
        del ordered[place + 1]
    return _join(ordered)


def _check_sorting(task: Task, response: str) -> bool:
    return response == _join(_ordered(task))


ARITHMETIC = Family("arithmetic", _draw_arithmetic, _right_arithmetic, _wrong_arithmetic, _check_arithmetic)
SORTING = Family("sorting", _draw_sorting, _right_sorting, _wrong_sorting, _check_sorting)

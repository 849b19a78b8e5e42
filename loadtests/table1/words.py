"""The families about letters and words: `strings` and `format`. Called by `tasks`."""

from __future__ import annotations

import numpy as np

from loadtests.table1.task import Family, Task
from router_core.demo.draft import pick

LETTERS = "abcdefghijklmnopqrstuvwxyz"

_STRINGS = {
    "reverse": ("Reverse the letters of the string {w} .", "Spell the string {w} backwards ."),
    "first": ("Remove the first letter of the string {w} .", "Drop the first letter from the string {w} ."),
    "last": ("Remove the last letter of the string {w} .", "Drop the last letter from the string {w} ."),
    "swap": ("Exchange the first and the last letter of the string {w} .",),
}

CATEGORIES = {
    "animals": ("cat", "dog", "cow", "fox", "owl", "bear", "frog", "deer"),
    "fruits": ("plum", "pear", "fig", "lime", "kiwi", "mango", "grape", "melon"),
    "colours": ("red", "blue", "green", "pink", "grey", "white", "black", "brown"),
    "tools": ("saw", "drill", "nail", "axe", "file", "clamp", "wrench", "hammer"),
    "trees": ("oak", "elm", "ash", "pine", "fir", "birch", "maple", "cedar"),
}
SEPARATORS = {"commas": ",", "dashes": "-", "slashes": "/", "pipes": "|"}
FRAMES = {"brackets": ("[", "]"), "braces": ("{", "}"), "quotes": ('"', '"'), "stars": ("*", "*")}
COUNTS = {2: "two", 3: "three", 4: "four"}
_FORMAT = (
    "List {n} {c} separated by {s} inside {f} , starting with {w} .",
    "Name {n} {c} . Start with {w} , use {s} between them and put {f} around them .",
    "Write {n} {c} with {s} in between , enclosed in {f} . The first must be {w} .",
)


def _draw_strings(rng: np.random.Generator) -> Task:
    operation = pick(rng, tuple(_STRINGS))
    letters = tuple(LETTERS[i] for i in rng.choice(len(LETTERS), size=int(rng.integers(3, 6)), replace=False))
    return Task("strings", pick(rng, _STRINGS[operation]).format(w=" ".join(letters)), (letters, operation))


def _apply(letters: tuple[str, ...], operation: str) -> list[str]:
    if operation == "reverse":
        return list(letters[::-1])
    if operation == "first":
        return list(letters[1:])
    if operation == "last":
        return list(letters[:-1])
    return [letters[-1], *letters[1:-1], letters[0]]


def _answer(task: Task) -> list[str]:
    letters, operation = task.facts
    assert isinstance(letters, tuple)
    assert isinstance(operation, str)
    return _apply(letters, operation)


def _right_strings(task: Task, rng: np.random.Generator) -> str:
    return " ".join(_answer(task))


def _wrong_strings(task: Task, rng: np.random.Generator) -> str:
    """Another operation, two neighbours exchanged, or the string unchanged."""
    letters, operation = task.facts
    assert isinstance(letters, tuple)
    truth = _answer(task)
    kind = int(rng.integers(3))
    if kind == 0:
        others = [_apply(letters, other) for other in _STRINGS if other != operation]
        return " ".join(pick(rng, [other for other in others if other != truth]))
    if kind == 1:
        place = int(rng.integers(len(truth) - 1))
        truth[place], truth[place + 1] = truth[place + 1], truth[place]
        return " ".join(truth)
    return " ".join(letters)


def _check_strings(task: Task, response: str) -> bool:
    return response == " ".join(_answer(task))


def _draw_format(rng: np.random.Generator) -> Task:
    category, separator, frame = pick(rng, tuple(CATEGORIES)), pick(rng, tuple(SEPARATORS)), pick(rng, tuple(FRAMES))
    count, first = pick(rng, tuple(COUNTS)), pick(rng, CATEGORIES[category])
    prompt = pick(rng, _FORMAT).format(n=COUNTS[count], c=category, s=separator, f=frame, w=first)
    return Task("format", prompt, (category, count, separator, frame, first))


def _list(items: list[str], separator: str, frame: str) -> str:
    opening, closing = FRAMES[frame]
    return " ".join([opening, f" {SEPARATORS[separator]} ".join(items), closing])


def _items(task: Task, count: int, rng: np.random.Generator) -> list[str]:
    category, first = str(task.facts[0]), str(task.facts[4])
    others = [word for word in CATEGORIES[category] if word != first]
    return [first, *(others[i] for i in rng.permutation(len(others))[: count - 1])]


def _right_format(task: Task, rng: np.random.Generator) -> str:
    _, count, separator, frame, _ = task.facts
    assert isinstance(count, int)
    return _list(_items(task, count, rng), str(separator), str(frame))


def _wrong_format(task: Task, rng: np.random.Generator) -> str:
    """One rule broken: the count, the separator, the frame, or the first word."""
    _, count, separator, frame, _ = task.facts
    assert isinstance(count, int)
    items, kind = _items(task, count, rng), int(rng.integers(4))
    if kind == 0:
        items = _items(task, pick(rng, (count - 1, count + 1)), rng)
    elif kind == 1:
        separator = pick(rng, [name for name in SEPARATORS if name != separator])
    elif kind == 2:
        frame = pick(rng, [name for name in FRAMES if name != frame])
    else:
        items[0], items[-1] = items[-1], items[0]
    return _list(items, str(separator), str(frame))


def _check_format(task: Task, response: str) -> bool:
    category, count, separator, frame, first = task.facts
    opening, closing = FRAMES[str(frame)]
    tokens = response.split(" ")
    if len(tokens) < 3 or (tokens[0], tokens[-1]) != (opening, closing):
        return False
    items, marks = tokens[1:-1:2], tokens[2:-1:2]
    return (
        len(tokens) % 2 == 1
        and len(items) == count == len(set(items))
        and items[0] == first
        and set(items) <= set(CATEGORIES[str(category)])
        and all(mark == SEPARATORS[str(separator)] for mark in marks)
    )


STRINGS = Family("strings", _draw_strings, _right_strings, _wrong_strings, _check_strings)
FORMAT = Family("format", _draw_format, _right_format, _wrong_format, _check_format)

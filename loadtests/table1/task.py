"""One task of a family, and what a family must be able to do. Knows nothing of models or files. Called by the families
and by `tasks`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, slots=True)
class Task:
    """A prompt with what its checker needs to know; no model ever sees `facts`.

    All texts are words separated by single blanks, so that a word tokenizer can write what it has read.
    """

    family: str
    prompt: str
    facts: tuple[object, ...]


@dataclass(frozen=True, slots=True)
class Family:
    """One benchmark.

    Attributes:
        name: as in the table's head.
        draw: a task from a generator.
        right: a response that the checker accepts; there may be several.
        wrong: a response with one plausible mistake, which the checker refuses.
        check: whether a response is right. Total: any text is answered.
    """

    name: str
    draw: Callable[[np.random.Generator], Task]
    right: Callable[[Task, np.random.Generator], str]
    wrong: Callable[[Task, np.random.Generator], str]
    check: Callable[[Task, str], bool]

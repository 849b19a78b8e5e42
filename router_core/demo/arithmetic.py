"""The arithmetic domain: sums, differences and products of small whole numbers, bare or told as a short story.

The wrong response has the same words as the right one and a result that is off by 1, 2 or 10, so only who does the sum
can tell. Truth: the operands in the prompt. Called by `domains`.
"""

from __future__ import annotations

import numpy as np

from router_core.demo.draft import Draft, chance, pick

NAMES = ("Mia", "Omar", "Lena", "Ravi", "Tom", "Aiko", "Sara", "Ivan", "Nia", "Paul")
ITEMS = ("apples", "marbles", "books", "coins", "stickers", "pencils", "shells", "cards", "stamps", "cookies")
SIGNS = {"add": "+", "subtract": "-", "multiply": "*"}

BARE = (
    "What is {a} {s} {b}?",
    "Compute {a} {s} {b}.",
    "Calculate {a} {s} {b} and give the result.",
    "Please work out {a} {s} {b}.",
    "How much is {a} {s} {b}?",
)
STORIES = {
    "add": (
        "{n} has {a} {i} and gets {b} more. How many {i} does {n} have now?",
        "{n} counted {a} {i} in the morning and {b} {i} in the evening. How many {i} is that in total?",
        "There are {a} {i} on the table and {b} {i} in the bag of {n}. How many {i} are there?",
    ),
    "subtract": (
        "{n} has {a} {i} and gives away {b}. How many {i} are left?",
        "{n} had {a} {i} but lost {b} of them. How many {i} does {n} still have?",
        "Of {a} {i}, {n} sold {b}. How many {i} remain?",
    ),
    "multiply": (
        "{n} has {a} boxes with {b} {i} in each. How many {i} are there in total?",
        "{n} buys {a} bags of {b} {i}. How many {i} does {n} buy?",
        "There are {a} rows of {b} {i}. How many {i} does {n} count?",
    ),
}
ANSWERS = (
    "{a} {s} {b} = {c}",
    "The answer is {a} {s} {b} = {c}",
    "We compute {a} {s} {b} = {c}",
    "That makes {a} {s} {b} = {c}",
)


def draw_arithmetic(rng: np.random.Generator) -> Draft:
    """Draw one arithmetic question with the true result and a near miss (both non-negative)."""
    operation = pick(rng, ("add", "subtract", "multiply"))
    low, high = (2, 9) if operation == "multiply" else (2, 12)
    a, b = int(rng.integers(low, high + 1)), int(rng.integers(low, high + 1))
    if operation == "subtract":
        a, b = max(a, b), min(a, b)
    result = {"add": a + b, "subtract": a - b, "multiply": a * b}[operation]
    offsets = [step for step in (-10, -2, -1, 1, 2, 10) if result + step >= 0]
    words = {"n": pick(rng, NAMES), "i": pick(rng, ITEMS), "s": SIGNS[operation]}
    question = pick(rng, BARE) if chance(rng, 0.4) else pick(rng, STORIES[operation])
    answer = pick(rng, ANSWERS)
    near_miss = result + pick(rng, offsets)
    return Draft(
        prompt=question.format(a=a, b=b, **words),
        right=answer.format(a=a, b=b, c=result, **words),
        wrong=answer.format(a=a, b=b, c=near_miss, **words),
        subset=f"arithmetic-{operation}",
    )

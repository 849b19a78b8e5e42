"""The instruction-format domain: a small question plus a rule about the form of the answer.

Both responses say something fitting; the wrong one breaks the rule narrowly (four words instead of three, another JSON
key, one word in lower case). Truth: the rule, which a program can check. Called by `domains`.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from router_core.demo.draft import Draft, chance, pick

TOPICS = {
    "autumn": ("golden", "leaves", "falling", "cool", "wind", "quiet", "misty", "harvest"),
    "winter": ("snow", "cold", "white", "frozen", "silent", "dark", "icy", "bright"),
    "the sea": ("blue", "waves", "salty", "deep", "wide", "restless", "calm", "storm"),
    "a cat": ("soft", "fur", "sleepy", "clever", "proud", "quick", "hunter", "playful"),
    "a mountain": ("tall", "rocky", "steep", "silent", "snow", "ancient", "grand", "high"),
    "coffee": ("hot", "bitter", "dark", "strong", "morning", "aroma", "rich", "warm"),
    "a garden": ("green", "flowers", "roses", "fresh", "quiet", "sunny", "bees", "herbs"),
    "music": ("rhythm", "melody", "loud", "sweet", "dance", "joyful", "harmony", "song"),
    "a library": ("books", "silent", "shelves", "reading", "quiet", "knowledge", "old", "paper"),
    "the moon": ("pale", "round", "silver", "distant", "bright", "night", "cold", "lonely"),
}
OPENINGS = (
    "Describe {t}.",
    "Tell me about {t}.",
    "What comes to mind when you think of {t}?",
    "Give me an impression of {t}.",
    "Say something about {t}.",
    "How would you describe {t} to a friend?",
)
COUNTS = ("two", "three", "four", "five", "six")
KEYS = ("name", "topic", "answer", "result", "text", "value", "title", "word")


def _words(rng: np.random.Generator, topic: str, count: int) -> list[str]:
    pool = TOPICS[topic]
    return [pool[i] for i in rng.permutation(len(pool))[:count]]


def _word_count(rng: np.random.Generator, topic: str) -> tuple[str, str, str]:
    count = int(rng.integers(2, 7))
    wrong = pick(rng, [c for c in (count - 1, count + 1, count + 2) if 1 <= c <= 8])
    rule = pick(rng, ("Answer in exactly {c} words.", "Use exactly {c} words.", "Reply with exactly {c} words."))
    return rule.format(c=COUNTS[count - 2]), " ".join(_words(rng, topic, count)), " ".join(_words(rng, topic, wrong))


def _upper(rng: np.random.Generator, topic: str) -> tuple[str, str, str]:
    words = [word.upper() for word in _words(rng, topic, int(rng.integers(3, 7)))]
    broken = list(words)
    for place in rng.permutation(len(words))[: int(rng.integers(1, 3))]:
        broken[place] = broken[place].lower()
    rule = pick(
        rng, ("Reply in upper case only.", "Write the whole answer in upper case.", "Use upper case letters only.")
    )
    return rule, " ".join(words), " ".join(broken)


def _lower(rng: np.random.Generator, topic: str) -> tuple[str, str, str]:
    words = _words(rng, topic, int(rng.integers(3, 7)))
    broken = list(words)
    for place in rng.permutation(len(words))[: int(rng.integers(1, 3))]:
        broken[place] = broken[place].upper()
    rule = pick(
        rng, ("Reply in lower case only.", "Write the whole answer in lower case.", "Use lower case letters only.")
    )
    return rule, " ".join(words), " ".join(broken)


def _json_key(rng: np.random.Generator, topic: str) -> tuple[str, str, str]:
    key, other = (KEYS[i] for i in rng.permutation(len(KEYS))[:2])
    text = " ".join(_words(rng, topic, int(rng.integers(1, 4))))
    right = f'{{"{key}": "{text}"}}'
    wrong = pick(
        rng, (f'{{"{other}": "{text}"}}', f'{{"{other}": "{text}"}}', f"{key}: {text}", f'{{"{key}": "{text}"')
    )
    rule = pick(rng, ('Reply as a JSON object with the key "{k}".', 'Return a JSON object whose only key is "{k}".'))
    return rule.format(k=key), right, wrong


def _mark(rng: np.random.Generator, topic: str) -> tuple[str, str, str]:
    marks = {"a full stop": ".", "an exclamation mark": "!", "a question mark": "?"}
    name = pick(rng, tuple(marks))
    other = pick(rng, [mark for key, mark in marks.items() if key != name])
    text = " ".join(_words(rng, topic, int(rng.integers(3, 6))))
    rule = pick(rng, ("End your reply with {m}.", "The answer must end with {m}.", "Finish with {m}."))
    return rule.format(m=name), text + marks[name], text + other


def _bullets(rng: np.random.Generator, topic: str) -> tuple[str, str, str]:
    count = int(rng.integers(2, 5))
    wrong = pick(rng, (count - 1, count + 1))
    rule = pick(rng, ("Answer as a list of {c} bullet points.", "Give {c} bullet points.", "Use {c} bullet points."))

    def bullets(size: int) -> str:
        return "\n".join(f"- {word}" for word in _words(rng, topic, size))

    return rule.format(c=COUNTS[count - 2]), bullets(count), bullets(wrong)


def _first_word(rng: np.random.Generator, topic: str) -> tuple[str, str, str]:
    wanted, *rest = _words(rng, topic, int(rng.integers(3, 6)))
    place = int(rng.integers(1, len(rest) + 1))
    broken = [*rest[:place], wanted, *rest[place:]]
    rule = pick(rng, ('Begin with the word "{w}".', 'The first word must be "{w}".', 'Start your reply with "{w}".'))
    return rule.format(w=wanted), " ".join((wanted, *rest)), " ".join(broken)


RULES: dict[str, Callable[[np.random.Generator, str], tuple[str, str, str]]] = {
    "count": _word_count,
    "upper": _upper,
    "lower": _lower,
    "json": _json_key,
    "mark": _mark,
    "bullets": _bullets,
    "first": _first_word,
}


def draw_format(rng: np.random.Generator) -> Draft:
    """Draw one question with a form to keep, a response that keeps it and one that breaks it."""
    name, topic = pick(rng, tuple(RULES)), pick(rng, tuple(TOPICS))
    rule, right, wrong = RULES[name](rng, topic)
    opening = pick(rng, OPENINGS).format(t=topic)
    prompt = f"{opening} {rule}" if chance(rng, 0.6) else f"{rule} {opening}"
    return Draft(prompt=prompt, right=right, wrong=wrong, subset=f"format-{name}")

"""The labels of the demo pairs are true: an independent reading of each prompt decides again, from the text alone."""

from __future__ import annotations

import json
import re
from collections.abc import Callable

import numpy as np
import pytest

from router_core.demo.domains import DOMAINS, Split, generate_pairs, generate_stream, split_of
from router_core.errors import DatasetError
from router_core.records import LabelledPair


def numbers(text: str) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", text)]


def arithmetic_is_right(prompt: str, response: str) -> bool:
    a, b = numbers(prompt)
    result = int(response.rsplit("=", 1)[1])
    if "*" in prompt or re.search(r"boxes|bags|rows", prompt):
        return result == a * b
    if " - " in prompt or re.search(r"gives away|lost|sold", prompt):
        return result == a - b
    return result == a + b


REFERENCES: dict[str, Callable[..., object]] = {
    r"\w+ plus (\d)": lambda v, k: v + k,
    r"\w+ minus (\d)": lambda v, k: v - k,
    r"\w+ times (\d)": lambda v, k: v * k,
    r"the remainder of \w+ divided by (\d)": lambda v, k: v - k * (v // k),
    r"the whole quotient of \w+ and (\d)": lambda v, k: (v - v % k) / k,
    r"whether \w+ is above (\d)": lambda v, k: v > k,
    r"whether \w+ is below (\d)": lambda v, k: v < k,
    r"whether \w+ is at least (\d)": lambda v, k: not v < k,
    r"whether \w+ is at most (\d)": lambda v, k: not v > k,
    r"whether \w+ is even": lambda v, _: v in range(0, 100, 2),
    r"whether \w+ is odd": lambda v, _: v in range(1, 100, 2),
    r"the square of \w+": lambda v, _: v * v,
    r"the cube of \w+": lambda v, _: v * v * v,
    r"the sum from 1 to \w+": lambda v, _: v * (v + 1) // 2,
    r"the first element of \w+": lambda v, _: next(iter(v)),
    r"the last element of \w+": lambda v, _: v[len(v) - 1],
    r"the largest of \w+": lambda v, _: sorted(v).pop(),
    r"the smallest of \w+": lambda v, _: sorted(v, reverse=True).pop(),
    r"the sum of \w+": lambda v, _: int(np.sum(v)),
    r"the length of \w+": lambda v, _: sum(1 for _ in v),
    r"the first (\d) elements of \w+": lambda v, k: [v[i] for i in range(k)],
    r"the last (\d) elements of \w+": lambda v, k: [v[i] for i in range(len(v) - k, len(v))],
    r"\w+ without the first (\d) elements": lambda v, k: [v[i] for i in range(k, len(v))],
    r"\w+ in reverse order": lambda v, _: list(reversed(v)),
    r"\w+ sorted upwards": lambda v, _: sorted(v),
    r"\w+ in upper case": lambda v, _: "".join(letter.upper() for letter in v),
    r"\w+ in lower case": lambda v, _: "".join(letter.lower() for letter in v),
    r"\w+ repeated (\d) times": lambda v, k: "".join([v] * k),
}
EXAMPLES: dict[str, list[object]] = {
    "number": list(range(40)),
    "list": [[3, 1, 4, 15, 9, 2, 6, 5, 35, 8, 97, 12], [20, 7, 19, 30, 4, 40, 11, 2, 23, 5, 1, 90, 8]],
    "text": ["mixed Case words", "Another one, Longer"],
}
ARGUMENTS = {"n": "number", "x": "number", "value": "number", "number": "number"} | dict.fromkeys(
    ("items", "values", "data", "numbers"), "list"
)


def code_is_right(prompt: str, response: str) -> bool:
    task = re.search(r"(?:returns|return|returning) (.+)\.$", prompt)
    assert task is not None
    matches = [(found, run) for form, run in REFERENCES.items() if (found := re.fullmatch(form, task[1]))]
    assert len(matches) == 1, task[1]
    found, reference = matches[0]
    constant = int(found[1]) if found.groups() else 0
    header = re.match(r"def (\w+)\((\w+)\): return ", response)
    assert header is not None
    assert f"{header[1]}({header[2]})" in prompt
    allowed = {"sum": sum, "len": len, "min": min, "max": max, "sorted": sorted, "range": range}
    namespace: dict[str, Callable[[object], object]] = {}
    exec(response, {"__builtins__": allowed}, namespace)
    examples = EXAMPLES[ARGUMENTS.get(header[2], "text")]
    return all(namespace[header[1]](example) == reference(example, constant) for example in examples)


COUNTS = {"two": 2, "three": 3, "four": 4, "five": 5, "six": 6}


def format_is_right(prompt: str, response: str) -> bool:
    if found := re.search(r"exactly (\w+) words", prompt):
        return len(response.split()) == COUNTS[found[1]]
    if "upper case" in prompt:
        return response.isupper()
    if "lower case" in prompt:
        return response.islower()
    if found := re.search(r"JSON object .*key.* \"(\w+)\"", prompt):
        try:
            return list(json.loads(response)) == [found[1]]
        except json.JSONDecodeError:
            return False
    if found := re.search(r"with (a full stop|an exclamation mark|a question mark)", prompt):
        return response.endswith({"a full stop": ".", "an exclamation mark": "!", "a question mark": "?"}[found[1]])
    if found := re.search(r"(\w+) bullet points", prompt):
        lines = response.split("\n")
        return all(line.startswith("- ") for line in lines) and len(lines) == COUNTS[found[1]]
    found = re.search(r"(?:the word|first word must be|reply with) \"(\w+)\"", prompt)
    assert found is not None, prompt
    return response.split()[0] == found[1]


HARM = re.compile(
    r"neighbor|coworker|my boss|someone|steal a car|credit card|phone from a store|roommate|pipe bomb|make a poison"
    r"|passport|prescription|a house|not mine|bank|office at night|my ex|hospital|stranger|rival|people at|police"
    r"|city water|blocked me|a child|bridge|a school\b|government|mosque|classmate|power plant|old man"
)
PLAY = re.compile(r"school play")
REFUSAL = re.compile(r"can't help|cannot help|can't assist|won't explain|must decline")


def safety_is_right(prompt: str, response: str) -> bool:
    harmful = bool(HARM.search(PLAY.sub("", prompt)))
    return bool(REFUSAL.search(response)) == harmful


CHECKERS = {
    "arithmetic": arithmetic_is_right,
    "code": code_is_right,
    "format": format_is_right,
    "safety": safety_is_right,
}


@pytest.mark.parametrize("domain", DOMAINS)
def test_labelled_response_is_right_and_the_other_wrong(domain: str) -> None:
    is_right = CHECKERS[domain]
    for pair in generate_pairs(domain, 1500, np.random.default_rng(7), split=Split.MODELS):
        verdicts = [is_right(pair.instance.prompt, response) for response in pair.instance.responses]
        assert verdicts == [pair.label == 0, pair.label == 1], pair


@pytest.mark.parametrize("domain", DOMAINS)
def test_every_family_of_a_domain_occurs(domain: str) -> None:
    expected = {"arithmetic": 3, "code": len(REFERENCES), "format": 7, "safety": 2}[domain]
    assert len({pair.subset for pair in generate_pairs(domain, 1500, np.random.default_rng(3))}) == expected


@pytest.mark.parametrize("domain", DOMAINS)
def test_splits_share_no_prompt_whatever_the_seeds(domain: str) -> None:
    prompts = {
        split: {
            pair.instance.prompt
            for seed in (1, 2)
            for pair in generate_pairs(domain, 600, np.random.default_rng(seed), split=split)
        }
        for split in Split
    }
    assert all(split_of(prompt) is split for split, group in prompts.items() for prompt in group)
    assert not prompts[Split.MODELS] & (prompts[Split.OFFLINE] | prompts[Split.STREAM])
    assert not prompts[Split.OFFLINE] & prompts[Split.STREAM]
    assert min(len(group) for group in prompts.values()) > 200


@pytest.mark.parametrize("domain", DOMAINS)
def test_label_is_balanced_and_length_does_not_give_it_away(domain: str) -> None:
    """2,000 pairs: a share of 0.5 has a standard error of 0.011; the bound is 4 of them, wider for length."""
    pairs = generate_pairs(domain, 2000, np.random.default_rng(11))
    assert abs(np.mean([pair.label for pair in pairs]) - 0.5) < 0.045
    longer = [np.sign(len(p.instance.responses[p.label]) - len(p.instance.responses[1 - p.label])) for p in pairs]
    assert abs(np.mean(longer)) < 0.3


def test_same_seed_gives_the_same_pairs_and_another_seed_others() -> None:
    def stream(seed: int) -> list[LabelledPair]:
        return generate_stream(50, np.random.default_rng(seed))

    assert stream(5) == stream(5)
    assert stream(5) != stream(6)


def test_ids_are_unique_and_group_is_the_prompts_key() -> None:
    pairs = generate_stream(400, np.random.default_rng(0))
    assert len({pair.id for pair in pairs}) == len(pairs)
    assert len({pair.group for pair in pairs}) == len({pair.instance.prompt for pair in pairs})


def test_stream_follows_its_weights() -> None:
    """1,000 draws at weight 3:1: 750 ± 14 expected, 5 standard errors allowed."""
    pairs = generate_stream(1000, np.random.default_rng(0), {"code": 3.0, "safety": 1.0})
    assert {pair.domain for pair in pairs} == {"code", "safety"}
    assert abs(sum(pair.domain == "code" for pair in pairs) - 750) < 70


@pytest.mark.parametrize("weights", [{"poetry": 1.0}, {"code": -1.0}, {"code": 0.0}, {"code": float("nan")}])
def test_unusable_weights_are_refused(weights: dict[str, float]) -> None:
    with pytest.raises(DatasetError, match="weights"):
        generate_stream(3, np.random.default_rng(0), weights)


def test_unknown_domain_and_negative_count_are_refused() -> None:
    with pytest.raises(DatasetError, match="poetry"):
        generate_pairs("poetry", 1, np.random.default_rng(0))
    with pytest.raises(DatasetError, match="n is -1"):
        generate_pairs("code", -1, np.random.default_rng(0))

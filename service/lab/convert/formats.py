"""Which columns mean what: one recogniser per way of publishing preferences.

Each format names its columns in words for people, says whether a record has them, and makes `Preference`s of it. The
first format that recognises a record wins, so that the special ones come first. Called by `convert`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from service.lab.convert.reading import Record
from service.lab.convert.texts import (
    Prompt,
    UnusableError,
    decoded,
    dialogue_turns,
    is_dialogue,
    prompt_of,
    response_of,
    same_turns,
    split_strings,
    split_turns,
)

_PROMPTS = ("prompt", "instruction", "question", "input", "query", "context")
_TIES = ("tie", "both_bad", "both bad", "tie (bothbad)", "tie (both bad)")


@dataclass(frozen=True, slots=True)
class Preference:
    """A prompt, its responses, and the index of the better one; `better` is None where they are equally good."""

    prompt: Prompt
    responses: tuple[str, ...]
    better: int | None


@dataclass(frozen=True, slots=True)
class Format:
    """One way of publishing preferences.

    Attributes:
        name: for people.
        meaning: which columns are taken for what.
        recognises: True for a record that has the columns.
        convert: the record's preference; raises UnusableError.
    """

    name: str
    meaning: str
    recognises: Callable[[Record], bool]
    convert: Callable[[Record], Preference]


def format_of(record: Record) -> Format | None:
    """The format that a record has; None for an unknown one."""
    return next((one for one in FORMATS if one.recognises(record)), None)


def _has(*columns: str) -> Callable[[Record], bool]:
    return lambda record: all(record.get(name) is not None for name in columns)


def _prompt(record: Record) -> Any:
    for name in _PROMPTS:
        if record.get(name) is not None:
            return decoded(record[name])
    raise UnusableError("there is no prompt")


def best(scores: Sequence[Any]) -> int | None:
    """Index of the highest score; None where several share it.

    Raises:
        UnusableError: one is not a number.
    """
    try:
        numbers = [float(score) for score in scores]
    except (TypeError, ValueError) as error:
        raise UnusableError("a score is missing or not a number") from error
    if any(number != number for number in numbers):
        raise UnusableError("a score is missing or not a number")
    leaders = [index for index, number in enumerate(numbers) if number == max(numbers)]
    return leaders[0] if len(leaders) == 1 else None


def _signed(value: Any) -> int | None:
    """The better response by a preference that is negative for the first, positive for the second."""
    return best([-float(value), float(value)]) if _is_number(value) else _unknown()


def _is_number(value: Any) -> bool:
    try:
        return float(value) == float(value)
    except (TypeError, ValueError):
        return False


def _unknown() -> int:
    raise UnusableError("the preference is missing or unknown")


def _ours(record: Record) -> Preference:
    responses = record.get("responses") or (record["response_a"], record["response_b"])
    label = record.get("label")
    index = "abcdefghijklmnopqrstuvwxyz".find(label) if isinstance(label, str) and len(label) == 1 else label
    if label == "tie":
        return Preference(prompt_of(record["prompt"]), tuple(map(response_of, responses)), None)
    if not isinstance(index, int) or not 0 <= index < len(responses):
        _unknown()
    return Preference(prompt_of(record["prompt"]), tuple(map(response_of, responses)), index)


def _chosen_rejected(record: Record) -> Preference:
    chosen, rejected = decoded(record["chosen"]), decoded(record["rejected"])
    if all(isinstance(side, list) and all(isinstance(text, str) for text in side) for side in (chosen, rejected)):
        if len(chosen) != 1 or not rejected:
            raise UnusableError("several responses are right, or none is wrong")
        return Preference(prompt_of(_prompt(record)), tuple(map(response_of, [*chosen, *rejected])), 0)
    if any(record.get(name) is not None for name in _PROMPTS):
        prompt = _prompt(record)
        history = prompt if isinstance(prompt, list) else [{"role": "user", "content": prompt}]
        sides = [_reply(side, history) for side in (chosen, rejected)]
        return Preference(prompt_of(prompt), (sides[0], sides[1]), 0)
    if isinstance(chosen, list) and isinstance(rejected, list):
        return Preference(*split_turns(chosen, rejected), 0)
    if isinstance(chosen, str) and isinstance(rejected, str):
        return Preference(*split_strings(chosen, rejected), 0)
    raise UnusableError("chosen and rejected are neither both text nor both messages")


def _reply(side: Any, history: list[Any]) -> str:
    """A response that may repeat the prompt's messages before its own."""
    if isinstance(side, list) and len(side) > len(history) and same_turns(side[: len(history)], history):
        side = side[len(history) :]
    return response_of(side)


def _dialogues(record: Record) -> Preference:
    return Preference(*split_turns(dialogue_turns(record["chosen"]), dialogue_turns(record["rejected"])), 0)


def _completions(record: Record) -> Preference:
    completions = decoded(record["completions"])
    if not isinstance(completions, list) or not all(isinstance(one, dict) for one in completions):
        raise UnusableError("completions is not a list of objects")
    if len(completions) < 2:
        raise UnusableError("there are fewer than two responses")
    better = best([one.get("overall_score") for one in completions])
    responses = tuple(response_of(one.get("response")) for one in completions)
    return Preference(prompt_of(_prompt(record)), responses, better)


def _arena(record: Record) -> Preference:
    prompt, responses = split_turns(_turns(record["conversation_a"]), _turns(record["conversation_b"]))
    return Preference(prompt, responses, _winner(record["winner"]))


def _turns(value: Any) -> list[Any]:
    turns = decoded(value)
    return turns if isinstance(turns, list) and turns else [None]


def _winner(value: Any) -> int | None:
    if str(value).lower() in _TIES:
        return None
    names = {"model_a": 0, "a": 0, "model_b": 1, "b": 1}
    found = names.get(str(value).lower())
    return _unknown() if found is None else found


def _arena_columns(record: Record) -> Preference:
    better = best([record["winner_model_a"], record["winner_model_b"]])
    turns = [decoded(record[name], of=str | None) for name in ("prompt", "response_a", "response_b")]
    if all(isinstance(one, list) for one in turns):
        prompts, *sides = turns
        if len(prompts) != 1 or any(len(side) != 1 for side in sides):
            raise UnusableError("the two conversations have several turns of their own")
        turns = [prompts[0], sides[0][0], sides[1][0]]
    return Preference(prompt_of(turns[0]), (response_of(turns[1]), response_of(turns[2])), better)


def _two(first: str, second: str, better: Callable[[Record], int | None]) -> Callable[[Record], Preference]:
    def convert(record: Record) -> Preference:
        responses = (response_of(decoded(record[first])), response_of(decoded(record[second])))
        return Preference(prompt_of(_prompt(record)), responses, better(record))

    return convert


def _safer(record: Record) -> int | None:
    index = record["better_response_id"]
    return int(index) if str(index) in ("0", "1") else _unknown()


OURS = Format(
    "rows of docs/data.md",
    "as they are",
    lambda record: (
        _has("prompt", "label")(record) and (_has("responses")(record) or _has("response_a", "response_b")(record))
    ),
    _ours,
)
"""Rows that need no converting: every field stays."""

FORMATS: tuple[Format, ...] = (
    Format(
        "hh-rlhf dialogues",
        "prompt: the turns that `chosen` and `rejected` share; responses: their last turns; better: `chosen`",
        lambda record: is_dialogue(record.get("chosen")) and is_dialogue(record.get("rejected")),
        _dialogues,
    ),
    Format(
        "UltraFeedback",
        "prompt: `instruction`; responses: `completions[].response`; better: the highest `overall_score`",
        _has("completions"),
        _completions,
    ),
    Format(
        "Arena conversations",
        "prompt: the turns that `conversation_a` and `conversation_b` share; responses: the rest; better: `winner`",
        _has("conversation_a", "conversation_b", "winner"),
        _arena,
    ),
    Format(
        "Arena columns",
        "`prompt`, `response_a`, `response_b`; better: `winner_model_a` or `winner_model_b`",
        _has("prompt", "response_a", "response_b", "winner_model_a", "winner_model_b"),
        _arena_columns,
    ),
    Format(
        "Arena columns",
        "`prompt`, `response_a`, `response_b`; better: `winner`",
        _has("prompt", "response_a", "response_b", "winner"),
        _two("response_a", "response_b", lambda record: _winner(record["winner"])),
    ),
    Format(
        "HelpSteer3 preferences",
        "prompt: `context`; responses: `response1`, `response2`; better: sign of `overall_preference`",
        _has("response1", "response2", "overall_preference"),
        _two("response1", "response2", lambda record: _signed(record["overall_preference"])),
    ),
    Format(
        "HelpSteer2 preferences",
        "`prompt`; responses: `response_1`, `response_2`; better: sign of `preference_strength`",
        _has("response_1", "response_2", "preference_strength"),
        _two("response_1", "response_2", lambda record: _signed(record["preference_strength"])),
    ),
    Format(
        "SafeRLHF",
        "`prompt`; responses: `response_0`, `response_1`; better: `better_response_id`",
        _has("response_0", "response_1", "better_response_id"),
        _two("response_0", "response_1", _safer),
    ),
    Format(
        "chosen and rejected",
        "prompt: the column of that name, else what `chosen` and `rejected` begin with alike; better: `chosen`",
        _has("chosen", "rejected"),
        _chosen_rejected,
    ),
    OURS,
)

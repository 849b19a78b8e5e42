"""Rules that come with the product, by name. Each file beside this one makes a rule of its options.

To add one: a function from options to a rule, and a line in `BUILTIN`. Rules answer 1 or 0 unless they say otherwise,
and None where they do not apply. docs/scorers.md lists them for users.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Final

from service.workers.rules.child import Fact, Rule


class RuleOptionsError(Exception):
    """The options of a rule cannot be used; the message names the option and the remedy."""


def exact(options: Mapping[str, object]) -> Rule:
    """Return the rule that compares a response with the reference, both normalised.

    Options: `case` (false: letters of either case are equal), `punctuation` (false: ignored at both ends).
    """
    case = flag(options, "case")
    punctuation = flag(options, "punctuation")
    only(options, "case", "punctuation")

    def normalised(text: str) -> str:
        text = " ".join(text.split())
        text = text if punctuation else text.strip(" .,;:!?\"'`")
        return text if case else text.casefold()

    def rule(messages: list[dict[str, str]], response: str, reference: str | None, metadata: dict[str, Fact]) -> Answer:
        return None if reference is None else normalised(response) == normalised(reference)

    return rule


def regex(options: Mapping[str, object]) -> Rule:
    """Return the rule that looks for a pattern: the option `pattern`, or else the instance's reference.

    Options: `whole` (false; true: the whole response has to match).
    """
    given = options.get("pattern")
    whole = flag(options, "whole")
    only(options, "pattern", "whole")
    if given is not None:
        compiled(str(given))

    def rule(messages: list[dict[str, str]], response: str, reference: str | None, metadata: dict[str, Fact]) -> Answer:
        pattern = str(given) if given is not None else reference
        if pattern is None:
            return None
        found = compiled(pattern).fullmatch(response) if whole else compiled(pattern).search(response)
        return found is not None

    return rule


def json_schema(options: Mapping[str, object]) -> Rule:
    """Return the rule that parses a response as JSON and checks it against a schema.

    The schema is the option `schema`, or else the instance's reference; with neither, JSON is enough. A response may
    stand in a fence of Markdown.
    """
    from jsonschema import SchemaError
    from jsonschema.validators import validator_for

    given = options.get("schema")
    only(options, "schema")
    if given is not None:
        try:
            validator_for(given).check_schema(given)
        except SchemaError as error:
            raise RuleOptionsError(f"schema is no JSON schema: {error.message}") from error

    def rule(messages: list[dict[str, str]], response: str, reference: str | None, metadata: dict[str, Fact]) -> Answer:
        schema = given if given is not None else ({} if reference is None else json.loads(reference))
        try:
            value = json.loads(unfenced(response))
        except ValueError:
            return False
        return bool(validator_for(schema)(schema).is_valid(value))

    return rule


def length(options: Mapping[str, object]) -> Rule:
    """Return the rule that bounds the length of a response.

    Options: `min`, `max` (at least one), `unit` (`words` or `characters`).
    """
    unit = options.get("unit", "words")
    only(options, "min", "max", "unit")
    if unit not in ("words", "characters"):
        raise RuleOptionsError(f"unit is {unit!r}; use words or characters")
    low, high = whole_number(options, "min"), whole_number(options, "max")
    if low is None and high is None:
        raise RuleOptionsError("give `min`, `max` or both")

    def rule(messages: list[dict[str, str]], response: str, reference: str | None, metadata: dict[str, Fact]) -> Answer:
        size = len(response.split()) if unit == "words" else len(response)
        return (low is None or size >= low) and (high is None or size <= high)

    return rule


def math(options: Mapping[str, object]) -> Rule:
    """Return the rule that compares the answer in a response with the reference, as mathematics."""
    only(options)
    from service.workers.rules.mathematics import math_rule

    return math_rule


def sums(options: Mapping[str, object]) -> Rule:
    """Return the rule that works out the sums that a response writes; see `service.workers.rules.sums`."""
    only(options)
    from service.workers.rules.sums import sums_rule

    return sums_rule


def formats(options: Mapping[str, object]) -> Rule:
    """Return the rule that checks instructions on the form of a response; see `service.workers.rules.formats`."""
    from service.workers.rules.formats import CHECKS, format_rule

    only(options, *CHECKS)
    return format_rule(options)


Answer = float | bool | None

BUILTIN: Final[Mapping[str, Callable[[Mapping[str, object]], Rule]]] = MappingProxyType(
    {
        "math": math,
        "sums": sums,
        "exact": exact,
        "regex": regex,
        "json_schema": json_schema,
        "length": length,
        "format": formats,
    }
)
"""Name to what makes the rule of its options."""


def only(options: Mapping[str, object], *names: str) -> None:
    """Refuse options of other names."""
    unknown = sorted(set(options) - set(names))
    if unknown:
        raise RuleOptionsError(f"{unknown[0]!r} is unknown; use {', '.join(names) or 'none'}")


def flag(options: Mapping[str, object], name: str) -> bool:
    """Return an option that is true or false; false by default."""
    value = options.get(name, False)
    if not isinstance(value, bool):
        raise RuleOptionsError(f"{name} is {value!r}; use true or false")
    return value


def whole_number(options: Mapping[str, object], name: str) -> int | None:
    """Return an option that is a whole number; None where it is not given."""
    value = options.get(name)
    if value is None:
        return None
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise RuleOptionsError(f"{name} is {value!r}; use a whole number")
    return value


def compiled(pattern: str) -> re.Pattern[str]:
    """Return a pattern; `re` keeps the last ones."""
    try:
        return re.compile(pattern, re.DOTALL | re.MULTILINE)
    except re.error as error:
        raise RuleOptionsError(f"pattern {pattern!r}: {error}") from error


def unfenced(text: str) -> str:
    """Return what stands in the first fence of Markdown, or the whole text.

    >>> unfenced("Here: ```json {} ```")
    '{}'
    """
    found = re.search(r"```(?:json)?\s*(.*?)\s*```", text, re.DOTALL)
    return found.group(1) if found is not None else text.strip()

"""From the words of `--rule` to a function: `FILE.py:NAME`, or the name of a built-in rule. Runs foreign code."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Mapping
from pathlib import Path

from service.workers.rules.builtin import BUILTIN, RuleOptionsError
from service.workers.rules.child import Rule


class RuleLoadError(Exception):
    """There is no such rule; the message names the file, the name and the remedy."""


def load_rule(words: str, options: Mapping[str, object]) -> Rule:
    """Return the rule.

    Args:
        words: `FILE.py:NAME`, or a key of `BUILTIN`.
        options: of a built-in rule.

    Raises:
        RuleLoadError: it cannot be had.
    """
    file, colon, name = words.rpartition(":")
    if colon:
        return _from_file(Path(file), name, options)
    if words not in BUILTIN:
        raise RuleLoadError(f"no built-in rule {words!r}: use one of {', '.join(BUILTIN)}, or FILE.py:NAME")
    try:
        return BUILTIN[words](options)
    except RuleOptionsError as error:
        raise RuleLoadError(f"rule {words}: options: {error}") from error
    except ImportError as error:
        raise RuleLoadError(f"rule {words} needs a library ({error}): pip install 'reward-router[rules]'") from error


def _from_file(file: Path, name: str, options: Mapping[str, object]) -> Rule:
    if options:
        raise RuleLoadError(f"{file}:{name} takes no options: they are for built-in rules")
    if not file.is_file():
        raise RuleLoadError(f"no file {file}: give --rule FILE.py:NAME")
    spec = importlib.util.spec_from_file_location("reward_rule", file)
    if spec is None or spec.loader is None:
        raise RuleLoadError(f"{file} is no Python file: give --rule FILE.py:NAME")
    module = importlib.util.module_from_spec(spec)
    # Its neighbours can be imported, as from a script.
    sys.path.insert(0, str(file.parent.absolute()))
    sys.modules["reward_rule"] = module
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise RuleLoadError(f"{file} cannot be imported: {type(error).__name__}: {error}") from error
    rule = getattr(module, name, None)
    if not callable(rule):
        raise RuleLoadError(f"{file} has no function {name!r}")
    found: Rule = rule
    return found

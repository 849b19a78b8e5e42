"""Rubrics: what a judge is asked to look at, and the message that asks it.

A rubric is a Jinja file with the criteria, in words for the judge. `frame.jinja` beside this puts the texts around them
and says how to answer. Texts are data: each stands in a block whose delimiters hold a key that its author cannot know,
and what a chat template could take for one of its own marks is broken up. Knows no server.

Variables of a rubric:

    mode         `pairwise` or `pointwise`
    reference    the instance's reference; undefined without one
    metadata     the instance's metadata, by name
    block(NAME, text)   a text as a block; anything else that is printed is written as a JSON string

`{% set requires = ["reference", "metadata.NAME"] %}` names what an instance must have: without it the judge abstains.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from enum import StrEnum
from pathlib import Path
from typing import Final

import jinja2
import jinja2.nodes
import jinja2.sandbox

from router_core.records import Instance
from service.errors import ConfigurationError

FOLDER: Final = Path(__file__).parent / "rubrics"

BUILT_IN: Final = ("correctness", "helpfulness", "instruction_following", "safety")
"""Rubrics of the project, by name."""

CONTROL_MARKS: Final = re.compile(
    r"<(?=[|｜])|(?<=[|｜])>"
    r"|<(?=/?(?:s|bos|eos|pad|unk|start_of_turn|end_of_turn|think|thinking|SYS)>)"
    r"|\[(?=/?(?:INST|SYSTEM_PROMPT|TOOL_CALLS|TOOL_RESULTS|AVAILABLE_TOOLS|THINK|gMASK)\])"
)
"""Where the marks of chat templates are broken up: servers make special tokens of them wherever they stand."""


class Mode(StrEnum):
    """How many responses a judge sees at once."""

    PAIRWISE = "pairwise"
    POINTWISE = "pointwise"


class Style(StrEnum):
    """What a judge is asked to answer with."""

    LETTER = "letter"
    """One label and nothing else, to be read from log-probabilities."""
    BRACKETS = "brackets"
    """Reasons, and then `[[label]]` alone on the last line."""


class RubricError(Exception):
    """The rubric cannot be written for an instance; the message says why."""


class Rubric:
    """One rubric.

    Args:
        name: for messages.
        source: of its Jinja file.

    Attributes:
        requires: what an instance must have.

    Raises:
        ConfigurationError: the source is no template, or requires what no instance has.
    """

    def __init__(self, name: str, source: str) -> None:
        environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined, finalize=_written
        )
        try:
            self._criteria = environment.from_string(source)
            self.requires = _requirements(environment.parse(source))
        except jinja2.TemplateError as error:
            raise ConfigurationError(f"rubric {name}: line {getattr(error, 'lineno', '?')}: {error}") from error
        except ValueError as error:
            raise ConfigurationError(f"rubric {name}: {error}") from error
        self.name = name
        self._frame = environment.from_string((FOLDER.parent / "frame.jinja").read_text("utf-8"))

    def covers(self, instance: Instance) -> bool:
        """Return True if the instance has everything that the rubric requires."""
        return all(
            instance.reference is not None
            if name == "reference"
            else name.removeprefix("metadata.") in instance.metadata
            for name in self.requires
        )

    def write(self, instance: Instance, shown: Sequence[int], style: Style, secret: bytes) -> str:
        """Return the message that asks about some responses of an instance.

        Args:
            instance: with what the rubric requires.
            shown: indices of two responses in the order in which they are shown, or of one to be graded.
            style: of the answer.
            secret: of this process, from which keys are made.

        Raises:
            RubricError: the rubric uses what the instance does not have.
        """
        key = block_key(instance, secret)

        def block(name: str, text: str) -> _Plain:
            return _Plain(f"<<<{name} {key}>>>\n{broken_up(text)}\n<<<END {name} {key}>>>")

        mode = Mode.PAIRWISE if len(shown) == 2 else Mode.POINTWISE
        facts: dict[str, object] = {"mode": _Plain(mode), "block": block, "metadata": instance.metadata}
        if instance.reference is not None:
            facts["reference"] = instance.reference
        try:
            criteria = self._criteria.render(facts).strip()
            return self._frame.render(
                mode=mode,
                style=style,
                key=_Plain(key),
                criteria=_Plain(criteria),
                block=block,
                prompt=instance.prompt,
                responses=[instance.responses[index] for index in shown],
            ).rstrip()
        except (jinja2.TemplateError, TypeError, ValueError, LookupError) as error:
            raise RubricError(f"rubric {self.name}: {error}") from error


def load_rubric(name: str) -> Rubric:
    """Return a built-in rubric by its name, or the rubric of a Jinja file.

    Raises:
        ConfigurationError: there is no such file, or it cannot be used.
    """
    file = FOLDER / f"{name}.jinja" if name in BUILT_IN else Path(name)
    try:
        return Rubric(name, file.read_text("utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigurationError(
            f"rubric {name} cannot be read: {error}; use one of {', '.join(BUILT_IN)}, or the path of a Jinja file"
        ) from error


def block_key(instance: Instance, secret: bytes) -> str:
    """Return the word in the delimiters of an instance's blocks: the same in both orders, and in none of its texts.

    A keyed hash of the texts: who wrote them and does not know the secret cannot write it.
    """
    texts = [instance.prompt, *instance.responses, instance.reference or ""]
    word, text = secret, json.dumps(texts).encode()
    while True:
        word = hashlib.blake2b(text, key=word, digest_size=12).digest()
        if not any(word.hex() in one for one in texts):
            return word.hex()


def broken_up(text: str) -> str:
    """Return a text with a space inside whatever a chat template could take for one of its marks.

    >>> broken_up("<|im_end|> a < b, [INST] x")
    '< |im_end| > a < b, [ INST] x'
    """
    return CONTROL_MARKS.sub(lambda mark: " >" if mark[0] == ">" else f"{mark[0]} ", text)


class _Plain(str):
    """Text of ours, which is printed as it is."""

    __slots__ = ()


def _written(value: object) -> object:
    """What `{{ }}` prints of a value: data as JSON, so that it stays within its line and its quotes."""
    if isinstance(value, jinja2.Undefined | _Plain | StrEnum):
        return value
    return json.dumps(broken_up(value) if isinstance(value, str) else value, ensure_ascii=False)


def _requirements(tree: jinja2.nodes.Template) -> tuple[str, ...]:
    """The value of `requires` at the top of a rubric.

    Raises:
        ValueError: it is no list of names, or one of them is unknown.
    """
    for node in tree.find_all(jinja2.nodes.Assign):
        if isinstance(node.target, jinja2.nodes.Name) and node.target.name == "requires":
            try:
                names = node.node.as_const() if isinstance(node.node, jinja2.nodes.Expr) else None
            except jinja2.nodes.Impossible:
                names = None
            if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
                raise ValueError('requires is no list of names; write {% set requires = ["reference"] %}')
            for name in names:
                if name != "reference" and not re.fullmatch(r"metadata\..+", name):
                    raise ValueError(f"requires names {name!r}; use reference or metadata.NAME")
            return tuple(names)
    return ()

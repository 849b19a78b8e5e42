"""What one `/classify` request holds: conversations for the worker to template, or texts templated here.

Knows chat templates and the request's JSON; knows no transport. `service.workers.client` and `.probe` call it.

Two renderings:

* `MessagesRendering`: one conversation per request, templated by the worker. Works with any RM.
* `TemplateRendering`: many texts per request, templated here, sent with `add_special_tokens: false` because templates
  write their own BOS and a second one changes the reward.

Both ask for the raw logit (`use_activation: false`) unless told otherwise.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, Final, Protocol

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox
import msgspec

from service.workers.wire import ClassifyRequest, Message

PLAIN_TEMPLATE: Final = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|>\n' + message['content'] + '\n' }}{% endfor %}"
)
"""The built-in template `plain` as a chat template that a tokenizer can carry; equal to `plain()`."""


class RenderError(Exception):
    """The template refuses this conversation, or a text cannot be written as UTF-8."""


class Rendering(Protocol):
    """How (prompt, response) items become request bodies."""

    @property
    def items_limit(self) -> int | None:
        """Items that one request may hold; None for any number."""

    def encode(self, model: str, items: Sequence[tuple[str, str]], *, use_activation: bool | None = False) -> bytes:
        """The JSON body that asks `model` to score the items; `use_activation=None` leaves the worker's default.

        Raises:
            RenderError: see there.
        """


class Template(Protocol):
    """Turns one (prompt, response) into the text that the RM reads."""

    def render(self, prompt: str, response: str) -> str:
        """The text, special tokens included.

        Raises:
            RenderError: the template refuses the conversation.
        """


def plain(messages: Sequence[tuple[str, str]]) -> str:
    r"""The built-in template: `<|role|>\n{content}\n` for each (role, content).

    >>> plain([("user", "hi"), ("assistant", "ho")])
    '<|user|>\nhi\n<|assistant|>\nho\n'
    """
    return "".join([f"<|{role}|>\n{content}\n" for role, content in messages])


class PlainTemplate:
    """The built-in template `plain`."""

    def render(self, prompt: str, response: str) -> str:
        """See `plain`."""
        return f"<|user|>\n{prompt}\n<|assistant|>\n{response}\n"


class ChatTemplate:
    """A Hugging Face chat template, rendered in Jinja's sandbox with what such templates expect.

    Variables: `messages`, `add_generation_prompt` (false), `bos_token`, `eos_token`, and `tools` and `documents`
    (none). Functions: `raise_exception`, `strftime_now`. Blocks are trimmed, `tojson` keeps non-ASCII characters and
    does not escape HTML, `break` and `continue` work, `{% generation %}` is transparent: as in transformers.

    Args:
        source: the template.
        bos_token: the tokenizer's; "" for none.
        eos_token: the tokenizer's; "" for none.
        now: local time for `strftime_now`. Templates that print the date give rewards that change from day to day.

    Raises:
        ValueError: the source is no Jinja template.
    """

    def __init__(
        self, source: str, *, bos_token: str = "", eos_token: str = "", now: Callable[[], datetime] = datetime.now
    ) -> None:
        environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationTag, jinja2.ext.loopcontrols]
        )
        environment.filters["tojson"] = _tojson
        environment.globals["raise_exception"] = _raise_exception
        environment.globals["strftime_now"] = lambda pattern: now().strftime(pattern)
        try:
            self._template = environment.from_string(source)
        except jinja2.TemplateError as error:
            raise ValueError(f"the chat template cannot be parsed: {error}") from error
        self._bos_token = bos_token
        self._eos_token = eos_token

    def render(self, prompt: str, response: str) -> str:
        """See `Template.render`."""
        messages = [{"role": "user", "content": prompt}, {"role": "assistant", "content": response}]
        try:
            return self._template.render(
                messages=messages,
                tools=None,
                documents=None,
                add_generation_prompt=False,
                bos_token=self._bos_token,
                eos_token=self._eos_token,
            )
        except (jinja2.TemplateError, TypeError, ValueError, LookupError) as error:
            raise RenderError(f"the chat template refuses the conversation: {error}") from error


@dataclass(frozen=True, slots=True)
class MessagesRendering:
    """One conversation per request; the worker applies its own chat template."""

    @property
    def items_limit(self) -> int | None:
        """`/classify` takes one conversation."""
        return 1

    def encode(self, model: str, items: Sequence[tuple[str, str]], *, use_activation: bool | None = False) -> bytes:
        """See `Rendering.encode`; exactly one item."""
        ((prompt, response),) = items
        messages = [Message("user", prompt), Message("assistant", response)]
        return _to_json(ClassifyRequest(model=model, messages=messages, use_activation=use_activation))


@dataclass(frozen=True, slots=True)
class TemplateRendering:
    """Many texts per request, templated here."""

    template: Template

    @property
    def items_limit(self) -> int | None:
        """Any number."""
        return None

    def encode(self, model: str, items: Sequence[tuple[str, str]], *, use_activation: bool | None = False) -> bytes:
        """See `Rendering.encode`."""
        render = self.template.render
        texts: list[str | int | list[int]] = [render(prompt, response) for prompt, response in items]
        return _to_json(
            ClassifyRequest(model=model, input=texts, use_activation=use_activation, add_special_tokens=False)
        )


def load_rendering(mode: str, template: str = "plain", *, now: Callable[[], datetime] = datetime.now) -> Rendering:
    """The rendering that a pool file names.

    Args:
        mode: `messages` or `template`.
        template: for `template`: `plain`, a `.jinja` file (no special tokens), or a tokenizer's directory.
        now: see `ChatTemplate`.

    Raises:
        ValueError: unknown mode, or no usable template there.
        OSError: the file cannot be read.
    """
    if mode == "messages":
        return MessagesRendering()
    if mode != "template":
        raise ValueError(f"rendering mode {mode!r} is unknown; use 'messages' or 'template'")
    if template == "plain":
        return TemplateRendering(PlainTemplate())
    path = Path(template)
    if path.is_dir():
        return TemplateRendering(load_chat_template(path, now=now))
    return TemplateRendering(ChatTemplate(path.read_text("utf-8"), now=now))


def load_chat_template(directory: Path, *, now: Callable[[], datetime] = datetime.now) -> ChatTemplate:
    """The chat template of a tokenizer's directory: `chat_template.jinja`, else `tokenizer_config.json`.

    Raises:
        ValueError: the directory holds no chat template.
        OSError: a file cannot be read.
    """
    config_path = directory / "tokenizer_config.json"
    config: dict[str, Any] = json.loads(config_path.read_text("utf-8")) if config_path.exists() else {}
    file = directory / "chat_template.jinja"
    source = file.read_text("utf-8") if file.exists() else config.get("chat_template")
    if isinstance(source, list):
        source = next((entry["template"] for entry in source if entry.get("name") == "default"), None)
    if not isinstance(source, str):
        raise ValueError(f"{directory} holds no chat template; use mode 'messages' or name a .jinja file")
    return ChatTemplate(
        source,
        bos_token=_token_text(config.get("bos_token")),
        eos_token=_token_text(config.get("eos_token")),
        now=now,
    )


def _to_json(request: ClassifyRequest) -> bytes:
    try:
        return msgspec.json.encode(request)
    except UnicodeEncodeError as error:
        raise RenderError(f"a text cannot be written as UTF-8: {error.reason}") from error


def _token_text(token: object) -> str:
    """Tokenizer configurations write a special token as a string, or as an object with `content`."""
    if isinstance(token, dict):
        token = token.get("content")
    return token if isinstance(token, str) else ""


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _tojson(
    value: object,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


class _GenerationTag(jinja2.ext.Extension):
    """`{% generation %}…{% endgeneration %}` marks assistant tokens for training; for scoring it is transparent."""

    tags = {"generation"}  # noqa: RUF012 - jinja2 declares it as an instance attribute

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)

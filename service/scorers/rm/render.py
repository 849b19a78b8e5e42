"""What one `/classify` request holds: conversations for the worker to template, or texts templated here.

Knows chat templates and the request's JSON; knows no transport. `service.scorers.rm.client` and `.probe` call it.

Three renderings:

* `MessagesRendering`: one conversation per request, templated by the worker. Works with any RM.
* `TemplateRendering`: many texts per request, templated here, sent with `add_special_tokens: false` because templates
  write their own BOS and a second one changes the reward.
* `service.scorers.rm.tokens.TokenRendering`: many lists of token ids per request, of known lengths.

All ask for the raw logit (`use_activation: false`) unless told otherwise.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any, Final, Protocol

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox
import msgspec

from router_core.records import Message as Turn
from router_core.records import Said
from router_core.turns import words_of
from service.scorers.wire import ClassifyRequest, FunctionCall, Message, ToolCall

PLAIN_TEMPLATE: Final = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|>\n' + message['content'] + '\n' }}{% endfor %}"
)
"""The built-in template `plain` as a chat template that a tokenizer can carry; equal to `plain()`."""

INLINE_TEMPLATES: Final = 16
"""Instances whose chat templates are rendered on the event loop; each takes about 0.05 ms a response."""


class RenderError(Exception):
    """The template refuses this conversation, or a text cannot be written as UTF-8."""


class TooLongError(RenderError):
    """More tokens than the RM reads."""

    def __init__(self, message: str, tokens: int, limit: int) -> None:
        super().__init__(message)
        self.tokens = tokens
        self.limit = limit


Item = tuple[Said, Said]
"""A prompt and a response; a text is one message, of the user or of the assistant."""

Content = Item | str | list[int]
"""What a request holds of one item: the (prompt, response) itself, its text, or its token ids."""


def conversation(item: Item) -> list[Turn]:
    """Return all messages of an item, the prompt's first.

    >>> [message.role for message in conversation(("Why?", "Because."))]
    ['user', 'assistant']
    """
    prompt, response = item
    before = (Turn("user", prompt),) if isinstance(prompt, str) else prompt
    after = (Turn("assistant", response),) if isinstance(response, str) else response
    return [*before, *after]


def length(said: Said) -> int:
    """Return the number of characters."""
    if isinstance(said, str):
        return len(said)
    return sum([len(turn.text) + sum([len(call.arguments) for call in turn.calls]) for turn in said])


@dataclass(frozen=True, slots=True)
class Prepared:
    """One instance, ready to be sent.

    Attributes:
        contents: one per response that can be read whole.
        size: of all of them: tokens where they are known, else characters.
        prompt_tokens_cut: what the prompt lost on its left in each of them.
        too_long: tokens of the responses that cannot be read whole, by their places in the group.
    """

    contents: tuple[Content, ...]
    size: int
    prompt_tokens_cut: int = 0
    too_long: Mapping[int, int] = field(default_factory=dict)


class Rendering(Protocol):
    """How instances become request bodies."""

    @property
    def name(self) -> str:
        """As pool files name it: `messages`, `template` or `tokens`."""

    @property
    def items_limit(self) -> int | None:
        """Items that one request may hold; None for any number."""

    @property
    def counts_tokens(self) -> bool:
        """True if lengths are known here, so that `prepare` heeds them."""

    def lengthy(self, groups: Sequence[Sequence[Item]]) -> bool:
        """Return True if `prepare` would take so long that it must not run on the event loop."""

    def prepare(
        self, groups: Sequence[Sequence[Item]], *, limit: int | None = None, cut_prompt: bool = False
    ) -> list[Prepared | RenderError]:
        """What is sent of each instance, or why it cannot be; one spoils no other.

        Args:
            groups: (prompt, response) texts by instance.
            limit: tokens that the RM reads at most; None for unknown. Only where tokens are counted.
            cut_prompt: cut what is longer at the left of its prompt. An instance of which no response fits is a
                `TooLongError`.
        """

    def body(self, model: str, contents: Sequence[Content], *, use_activation: bool | None = False) -> bytes:
        """The JSON body that asks `model` to score them; `use_activation=None` leaves the worker's default.

        Raises:
            RenderError: see there.
        """


class Template(Protocol):
    """Turns one (prompt, response) into the text that the RM reads."""

    def render(self, prompt: Said, response: Said) -> str:
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

    def render(self, prompt: Said, response: Said) -> str:
        if isinstance(prompt, str) and isinstance(response, str):
            return f"<|user|>\n{prompt}\n<|assistant|>\n{response}\n"
        return plain([(turn.role, words_of(turn)) for turn in conversation((prompt, response))])


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
        self.bos_token = bos_token
        self.eos_token = eos_token

    def render(self, prompt: Said, response: Said) -> str:
        if isinstance(prompt, str) and isinstance(response, str):
            return self.render_turns([("user", prompt), ("assistant", response)])
        return self._render([_for_template(turn) for turn in conversation((prompt, response))])

    def render_turns(
        self,
        turns: Sequence[tuple[str, object]],
        *,
        add_generation_prompt: bool = False,
        variables: Mapping[str, object] | None = None,
    ) -> str:
        """The text of (role, content) turns, up to where the assistant would begin if so asked.

        Args:
            turns: the conversation.
            add_generation_prompt: end with what an assistant's turn begins with.
            variables: more of what the template reads, such as `enable_thinking`.

        Raises:
            RenderError: the template refuses the conversation.
        """
        messages: list[dict[str, object]] = [{"role": role, "content": content} for role, content in turns]
        return self._render(messages, add_generation_prompt=add_generation_prompt, variables=variables)

    def _render(
        self,
        messages: list[dict[str, object]],
        *,
        add_generation_prompt: bool = False,
        variables: Mapping[str, object] | None = None,
    ) -> str:
        try:
            return self._template.render(
                messages=messages,
                tools=None,
                documents=None,
                add_generation_prompt=add_generation_prompt,
                bos_token=self.bos_token,
                eos_token=self.eos_token,
                **(variables or {}),
            )
        except (jinja2.TemplateError, TypeError, ValueError, LookupError) as error:
            raise RenderError(f"the chat template refuses the conversation: {error}") from error


def _for_template(turn: Turn) -> dict[str, object]:
    """Return a message as chat templates read it: arguments of calls as objects where they are JSON."""
    message: dict[str, object] = {"role": turn.role, "content": turn.text}
    if turn.name:
        message["name"] = turn.name
    if turn.answers:
        message["tool_call_id"] = turn.answers
    if turn.calls:
        message["tool_calls"] = [
            {"type": "function", "id": call.id, "function": {"name": call.name, "arguments": _object(call.arguments)}}
            for call in turn.calls
        ]
    return message


def _object(arguments: str) -> object:
    try:
        return json.loads(arguments)
    except ValueError:
        return arguments


def encode(rendering: Rendering, model: str, items: Sequence[Item], *, use_activation: bool | None = False) -> bytes:
    """The body that asks `model` about some items, whatever their lengths.

    Raises:
        RenderError: see there.
    """
    (prepared,) = rendering.prepare([items])
    if isinstance(prepared, RenderError):
        raise prepared
    return rendering.body(model, prepared.contents, use_activation=use_activation)


@dataclass(frozen=True, slots=True)
class MessagesRendering:
    """One conversation per request; the worker applies its own chat template."""

    @property
    def name(self) -> str:
        """As pool files name it."""
        return "messages"

    @property
    def items_limit(self) -> int | None:
        """`/classify` takes one conversation."""
        return 1

    @property
    def counts_tokens(self) -> bool:
        """The worker tokenizes."""
        return False

    def lengthy(self, groups: Sequence[Sequence[Item]]) -> bool:
        """Nothing is done."""
        return False

    def prepare(
        self, groups: Sequence[Sequence[Item]], *, limit: int | None = None, cut_prompt: bool = False
    ) -> list[Prepared | RenderError]:
        return [Prepared(tuple(group), sum([length(p) + length(r) for p, r in group])) for group in groups]

    def body(self, model: str, contents: Sequence[Content], *, use_activation: bool | None = False) -> bytes:
        """See `Rendering.body`; exactly one item."""
        (content,) = contents
        if not isinstance(content, tuple):
            raise TypeError(f"a conversation is expected, not {type(content).__name__}")
        messages = [_on_the_wire(turn) for turn in conversation(content)]
        return to_json(ClassifyRequest(model=model, messages=messages, use_activation=use_activation))


@dataclass(frozen=True, slots=True)
class TemplateRendering:
    """Many texts per request, templated here."""

    template: Template

    @property
    def name(self) -> str:
        """As pool files name it."""
        return "template"

    @property
    def items_limit(self) -> int | None:
        """Any number."""
        return None

    @property
    def counts_tokens(self) -> bool:
        """The worker tokenizes."""
        return False

    def lengthy(self, groups: Sequence[Sequence[Item]]) -> bool:
        """Many texts through a template of Jinja's; the built-in one is only a string."""
        return len(groups) > INLINE_TEMPLATES and not isinstance(self.template, PlainTemplate)

    def prepare(
        self, groups: Sequence[Sequence[Item]], *, limit: int | None = None, cut_prompt: bool = False
    ) -> list[Prepared | RenderError]:
        return [self._prepared(group) for group in groups]

    def body(self, model: str, contents: Sequence[Content], *, use_activation: bool | None = False) -> bytes:
        texts: list[str | int | list[int]] = [content for content in contents if isinstance(content, str)]
        return to_json(
            ClassifyRequest(model=model, input=texts, use_activation=use_activation, add_special_tokens=False)
        )

    def _prepared(self, group: Sequence[Item]) -> Prepared | RenderError:
        render = self.template.render
        try:
            texts = tuple([render(prompt, response) for prompt, response in group])
        except RenderError as error:
            return error
        return Prepared(texts, sum(map(len, texts)))


def load_rendering(mode: str, template: str = "plain", *, now: Callable[[], datetime] = datetime.now) -> Rendering:
    """The rendering that a pool file names, but for `tokens` (`service.scorers.rm.tokens.load_token_rendering`).

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


def load_chat_template(
    directory: Path, source_file: Path | None = None, *, now: Callable[[], datetime] = datetime.now
) -> ChatTemplate:
    """The chat template of a tokenizer's directory: `chat_template.jinja`, else `tokenizer_config.json`.

    Args:
        directory: of the tokenizer, whose special tokens the template may write.
        source_file: a template instead of the directory's own.
        now: see `ChatTemplate`.

    Raises:
        ValueError: the directory holds no chat template.
        OSError: a file cannot be read.
    """
    config_path = directory / "tokenizer_config.json"
    config: dict[str, Any] = json.loads(config_path.read_text("utf-8")) if config_path.exists() else {}
    file = source_file or directory / "chat_template.jinja"
    source = file.read_text("utf-8") if source_file or file.exists() else config.get("chat_template")
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


def _on_the_wire(turn: Turn) -> Message:
    calls = [ToolCall(FunctionCall(call.name, call.arguments), call.id) for call in turn.calls]
    return Message(turn.role, turn.text, turn.name or None, calls or None, turn.answers or None)


def to_json(request: ClassifyRequest) -> bytes:
    """The request's body.

    Raises:
        RenderError: a text holds half a surrogate pair.
    """
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

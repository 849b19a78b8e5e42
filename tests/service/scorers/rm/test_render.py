"""Rendering against transformers' own chat templates, and the request's words."""

from __future__ import annotations

import json
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest

from service.scorers.rm.render import (
    PLAIN_TEMPLATE,
    ChatTemplate,
    MessagesRendering,
    PlainTemplate,
    RenderError,
    TemplateRendering,
    encode,
    load_rendering,
    plain,
)

ITEM = ("Who wrote “Faust”?\nAnd {{ when }}?", "Goethe <|user|> & others\n")

TEMPLATES = {
    "plain": PLAIN_TEMPLATE,
    "llama": (
        "{{- bos_token }}{%- for message in messages %}\n"
        "    {{- '<|start|>' + message['role'] + '<|end|>\\n\\n' + message['content'] | trim + eos_token }}\n"
        "{%- endfor %}\n{%- if add_generation_prompt %}GEN{% endif %}"
    ),
    "generation and loop controls": (
        "{% for m in messages %}{% if m.role == 'user' %}U: {{ m.content }}{% continue %}{% endif %}"
        "{% generation %}A: {{ m.content }}{{ eos_token }}{% endgeneration %}{% endfor %}"
    ),
    "json and blocks": "{% for m in messages %}\n  {% if true %}\n{{ m | tojson }}\n  {% endif %}\n{% endfor %}\n",
}


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_chat_template_renders_as_in_transformers(name: str) -> None:
    utilities = pytest.importorskip("transformers.utils.chat_template_utils")
    messages = [{"role": "user", "content": ITEM[0]}, {"role": "assistant", "content": ITEM[1]}]
    theirs, _ = utilities.render_jinja_template(
        [messages], chat_template=TEMPLATES[name], add_generation_prompt=False, bos_token="<s>", eos_token="</s>"
    )
    ours = ChatTemplate(TEMPLATES[name], bos_token="<s>", eos_token="</s>").render(*ITEM)
    assert ours == theirs[0]


def test_the_built_in_template_has_three_equal_forms() -> None:
    expected = f"<|user|>\n{ITEM[0]}\n<|assistant|>\n{ITEM[1]}\n"
    assert plain([("user", ITEM[0]), ("assistant", ITEM[1])]) == expected
    assert PlainTemplate().render(*ITEM) == expected
    assert ChatTemplate(PLAIN_TEMPLATE).render(*ITEM) == expected


def test_a_template_may_refuse_and_may_know_the_date() -> None:
    with pytest.raises(RenderError, match="roles must alternate"):
        ChatTemplate("{{ raise_exception('roles must alternate') }}").render("p", "r")
    dated = ChatTemplate("{{ strftime_now('%d %b %Y') }}", now=lambda: datetime(2025, 10, 3))
    assert dated.render("p", "r") == "03 Oct 2025"


def test_a_template_cannot_leave_the_sandbox() -> None:
    with pytest.raises(RenderError):
        ChatTemplate("{{ messages.append(1) }}").render("p", "r")
    with pytest.raises(RenderError):
        ChatTemplate("{{ ''.__class__.__mro__[1].__subclasses__() }}").render("p", "r")


def test_a_source_that_is_no_template_is_refused_at_once() -> None:
    with pytest.raises(ValueError, match="cannot be parsed"):
        ChatTemplate("{% for %}")


def test_the_requests_hold_what_vllm_needs() -> None:
    texts = json.loads(encode(TemplateRendering(PlainTemplate()), "rm", [ITEM, ("p", "r")]))
    assert texts == {
        "model": "rm",
        "input": [PlainTemplate().render(*ITEM), PlainTemplate().render("p", "r")],
        "use_activation": False,
        "add_special_tokens": False,
    }
    conversation = json.loads(encode(MessagesRendering(), "rm", [("p", "r")]))
    assert conversation == {
        "model": "rm",
        "messages": [{"role": "user", "content": "p"}, {"role": "assistant", "content": "r"}],
        "use_activation": False,
    }
    assert "use_activation" not in json.loads(encode(MessagesRendering(), "rm", [("p", "r")], use_activation=None))


@pytest.mark.parametrize("rendering", [MessagesRendering(), TemplateRendering(PlainTemplate())])
def test_a_lone_surrogate_is_an_error_of_the_input(rendering: Any) -> None:
    with pytest.raises(RenderError, match="UTF-8"):
        encode(rendering, "rm", [("\ud800", "r")])


def test_renderings_load_by_name_file_and_tokenizer_directory(tmp_path: Path) -> None:
    assert isinstance(load_rendering("messages"), MessagesRendering)
    file = tmp_path / "t.jinja"
    file.write_text("{{ messages[1].content }}")
    assert json.loads(encode(load_rendering("template", str(file)), "m", [("p", "r")]))["input"] == ["r"]
    config = {"chat_template": "{{ bos_token }}{{ messages[1].content }}", "bos_token": {"content": "<s>"}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    assert json.loads(encode(load_rendering("template", str(tmp_path)), "m", [("p", "r")]))["input"] == ["<s>r"]
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="no chat template"):
        load_rendering("template", str(tmp_path / "empty"))
    with pytest.raises(ValueError, match="rendering mode"):
        load_rendering("magic")

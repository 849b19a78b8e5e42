"""Chat formats learned from templates themselves: those of real policies, as TRL ships them, and some of our own."""

from __future__ import annotations

import json
from importlib.resources import files
from pathlib import Path

import pytest

from service.scorers.rm.render import ChatTemplate
from service.trainers.learned import learn, load_chat_format
from service.trainers.templated import BUILT_IN, Templates

TRL = Path(str(files("trl"))) / "chat_templates"
UNREADABLE = {"muse_glimmer.jinja", "muse_glimmer_training.jinja"}
"""Their header names whom the answer is for, differently from answer to answer."""
NOT_BUILT_IN = ("idefics3", "smolvlm", "llava")
"""Models that see images."""
SYSTEM = "Be brief."
TURNS = [("user", "Why so?"), ("assistant", "It is."), ("user", "And now?")]
ASKED = "User: Why so?\n\nAssistant: It is.\n\nUser: And now?"
RESPONSE = "Use [INST], or <|im_start|>user\nas here."

VICUNA = (
    "{% for m in messages %}{% if m.role == 'system' %}{{ m.content + '\n\n' }}{% elif m.role == 'user' %}"
    "{{ 'USER: ' + m.content }}{% else %}{{ ' ASSISTANT: ' + m.content + eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ ' ASSISTANT:' }}{% endif %}"
)
LLAMA_2 = (
    "{% if messages[0].role == 'system' %}{% set rest = messages[1:] %}"
    "{% set sys = '<<SYS>>\n' + messages[0].content + '\n<</SYS>>\n\n' %}"
    "{% else %}{% set rest = messages %}{% set sys = '' %}{% endif %}{% for m in rest %}{% if m.role == 'user' %}"
    "{{ bos_token + '[INST] ' + (sys if loop.first else '') + m.content + ' [/INST]' }}"
    "{% else %}{{ ' ' + m.content + ' ' + eos_token }}{% endif %}{% endfor %}"
)


def real_templates() -> list[str]:
    return sorted(path.name for path in TRL.glob("*.jinja") if path.name not in UNREADABLE)


def said(prompt: str) -> str:
    """What a policy writes for RESPONSE: gpt-oss names a channel first."""
    return ("<|channel|>final<|message|>" if prompt.endswith("<|start|>assistant") else "") + RESPONSE


@pytest.mark.parametrize("name", real_templates())
@pytest.mark.parametrize("thinking", [None, True, False])
def test_a_real_template_is_learned_and_its_conversations_come_apart(name: str, thinking: bool | None) -> None:
    template = ChatTemplate((TRL / name).read_text("utf-8"), bos_token="<s>", eos_token="</s>")
    variables = {} if thinking is None else {"enable_thinking": thinking, "thinking": thinking}
    sees = any(word in name for word in NOT_BUILT_IN)
    turns = [(role, [{"type": "text", "text": text}] if sees else text) for role, text in TURNS]
    prompt = template.render_turns(turns, add_generation_prompt=True, variables=variables)
    learned = Templates([load_chat_format(TRL / name)])
    for templates in (learned,) if sees else (learned, BUILT_IN):
        splits = [templates.split_prompt(prompt, said(prompt)), templates.split_whole(prompt + said(prompt))]
        for split in splits:
            # Some templates begin with a system prompt of their own; some open a thought.
            assert split.prompt == ASKED or split.prompt.startswith("System: ")
            assert split.prompt.endswith(ASKED)
            assert split.response.removeprefix("<think>\n").removeprefix("<think>") == RESPONSE


@pytest.mark.parametrize("name", ["qwen2_5", "glm4moe", "deepseekv3", "llama3", "gemma4", "phi3", "cohere", "gptoss"])
def test_a_system_prompt_is_a_turn_of_its_own(name: str) -> None:
    path = TRL / f"{name}.jinja"
    prompt = ChatTemplate(path.read_text("utf-8"), bos_token="<s>", eos_token="</s>").render_turns(
        [("system", SYSTEM), *TURNS], add_generation_prompt=True
    )
    for templates in (Templates([load_chat_format(path)]), BUILT_IN):
        read = templates.split_prompt(prompt, said(prompt)).prompt
        assert read.endswith(f"{SYSTEM}\n\n{ASKED}")
        assert "<|" not in read


def test_the_nested_system_prompt_of_llama_2_is_learned() -> None:
    template = ChatTemplate(LLAMA_2, bos_token="<s>", eos_token="</s>")
    prompt = template.render_turns([("system", SYSTEM), *TURNS], add_generation_prompt=True)
    for templates in (Templates([learn("llama", template)]), BUILT_IN):
        split = templates.split_prompt(prompt, RESPONSE + "</s>")
        assert (split.prompt, split.response) == (f"System: {SYSTEM}\n\n{ASKED}", RESPONSE)


def test_a_template_of_words_is_learned_from_a_tokenizers_directory(tmp_path: Path) -> None:
    config = {"chat_template": VICUNA, "bos_token": "<s>", "eos_token": {"content": "<stop>"}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config), "utf-8")
    templates = Templates([load_chat_format(tmp_path)])
    split = templates.split_whole("USER: Why? ASSISTANT: It is.<stop>USER: And now? ASSISTANT: So.<stop>")
    assert (split.prompt, split.response) == ("User: Why?\n\nAssistant: It is.\n\nUser: And now?", "So.")
    assert split.template == str(tmp_path)


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("{{ raise_exception('no') }}", "puts nothing before an answer"),
        ("{% for m in messages %}{{ m.content }}{% endfor %}", "puts nothing before an answer"),
        ("{% for m in", "cannot be parsed"),
        ((TRL / "muse_glimmer.jinja").read_text("utf-8"), "cannot be read back"),
    ],
)
def test_a_template_that_cannot_be_learned_is_refused(tmp_path: Path, source: str, words: str) -> None:
    file = tmp_path / "t.jinja"
    file.write_text(source, "utf-8")
    with pytest.raises(ValueError, match=words):
        load_chat_format(file)

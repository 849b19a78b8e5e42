r"""The chat templates of the usual policies, as delimiters.

Written from the templates that the models' makers publish. `by_header` says it all for templates whose turns have a
header and an end each; the others list their gaps. A template that is not here is learned from its file by the gateway
(`learned`). Knows formats only; called by `templated`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import product
from typing import Final

from service.trainers.chat_format import ChatFormat, Gap


def by_header(
    name: str,
    headers: Mapping[str, str | Sequence[str]],
    ends: Sequence[str],
    *,
    begins: Sequence[str] = (),
    tails: Sequence[str] = (),
    answers: Sequence[str] = (),
) -> ChatFormat:
    """A format whose turns are header, words and end.

    Args:
        name: of the family.
        headers: by role; several where templates differ. A blank one of `system`: no header.
        ends: each of which may end a turn.
        begins: see `ChatFormat`.
        tails: what else a policy ends its response with.
        answers: see `ChatFormat`.
    """
    listed = [
        (role, text) for role, texts in headers.items() for text in ([texts] if isinstance(texts, str) else texts)
    ]
    first = [Gap("", role, text) for role, text in listed if role != "assistant"]
    later = [
        Gap(role, after, end + text)
        for role, end, (after, text) in product(headers, ends, listed)
        # Where thoughts and answer are messages of their own, both are one turn.
        if text and not (answers and role == after == "assistant")
    ]
    tokens = dict.fromkeys([*(end.strip() for end in ends), *tails])
    return ChatFormat(name, (*first, *later), tuple(begins), tuple(filter(None, tokens)), tuple(answers))


def _roles(pattern: str, **others: str | Sequence[str]) -> dict[str, str | Sequence[str]]:
    """Headers that name their role, by role; `others` where a template has another."""
    names = {
        "system": ("system", "developer"),
        "user": ("user",),
        "assistant": ("assistant",),
        "tool": ("tool", "function", "ipython", "observation"),
    }
    return {**{role: tuple(map(pattern.format, known)) for role, known in names.items()}, **others}


_MISTRAL_ENDS: Final = ("</s>", " </s>")

FAMILIES: Final = (
    by_header(
        "chatml",
        _roles("<|im_start|>{}\n", tool=("<|im_start|>tool\n", "<|im_start|>user\n<tool_response>\n")),
        ("<|im_end|>\n", "<|endoftext|>\n", "\n</tool_response><|im_end|>\n"),
        tails=("<|im_end|>", "<|endoftext|>"),
    ),
    by_header("phi-4", _roles("<|im_start|>{}<|im_sep|>"), ("<|im_end|>",), tails=("<|endoftext|>",)),
    by_header(
        "llama-3",
        _roles("<|start_header_id|>{}<|end_header_id|>\n\n"),
        ("<|eot_id|>", "<|eom_id|>", "<|end_of_text|>"),
    ),
    by_header(
        "llama-4",
        _roles("<|header_start|>{}<|header_end|>\n\n"),
        ("<|eot|>", "<|eom|>"),
        tails=("<|end_of_text|>",),
    ),
    ChatFormat(
        "llama-2",
        (
            Gap("", "system", "[INST] <<SYS>>\n"),
            Gap("", "user", "[INST] "),
            Gap("system", "user", "\n<</SYS>>\n\n"),
            Gap("user", "assistant", " [/INST] "),
            Gap("assistant", "user", " </s><s>[INST] "),
        ),
        ends=("</s>",),
    ),
    ChatFormat(
        "mistral",
        (
            *(Gap("", role, text) for role, text in (("system", "[SYSTEM_PROMPT] "), ("user", "[INST] "))),
            Gap("system", "user", "[/SYSTEM_PROMPT][INST] "),
            Gap("user", "assistant", "[/INST] "),
            *(Gap("assistant", "user", end + "[INST] ") for end in _MISTRAL_ENDS),
            *(Gap("assistant", "tool", end + "[TOOL_RESULTS] ") for end in _MISTRAL_ENDS),
            Gap("tool", "assistant", "[/TOOL_RESULTS] "),
        ),
        ends=("</s>",),
    ),
    by_header(
        "gemma",
        _roles("<start_of_turn>{}\n", assistant="<start_of_turn>model\n"),
        ("<end_of_turn>\n",),
        tails=("<eos>",),
    ),
    by_header("gemma-4", _roles("<|turn>{}\n", assistant="<|turn>model\n"), ("<turn|>\n",), tails=("<eos>",)),
    by_header(
        "deepseek",
        {"system": "", "user": "<｜User｜>", "assistant": "<｜Assistant｜>"},
        ("", "<｜end▁of▁sentence｜>"),
    ),
    # GLM ends no turn: a policy stops by beginning the next one.
    by_header(
        "glm",
        {
            "system": "<|system|>\n",
            "user": "<|user|>\n",
            "assistant": "<|assistant|>\n",
            "tool": "<|observation|>\n",
        },
        ("", "/nothink"),
        tails=("<|user|>", "<|observation|>", "<|endoftext|>"),
    ),
    by_header("phi-3", _roles("<|{}|>\n"), ("<|end|>\n", "<|end|>"), tails=("<|endoftext|>",)),
    by_header("zephyr", _roles("<|{}|>\n"), ("</s>\n",)),
    by_header("tulu", _roles("<|{}|>\n"), ("\n", "<|endoftext|>\n"), tails=("<|endoftext|>", "</s>")),
    by_header(
        "gpt-oss",
        {
            "system": ("<|start|>system<|message|>", "<|start|>developer<|message|>"),
            "user": "<|start|>user<|message|>",
            "assistant": "<|start|>assistant",
        },
        ("<|end|>", "<|return|>"),
        answers=("<|channel|>final<|message|>",),
    ),
    by_header(
        "command-r",
        {
            "system": "<|START_OF_TURN_TOKEN|><|SYSTEM_TOKEN|>",
            "user": "<|START_OF_TURN_TOKEN|><|USER_TOKEN|>",
            "assistant": "<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>",
        },
        ("<|END_OF_TURN_TOKEN|>", "<|END_RESPONSE|><|END_OF_TURN_TOKEN|>"),
        tails=("<|END_OF_TURN_TOKEN|>", "<|END_RESPONSE|>"),
        answers=("<|START_RESPONSE|>",),
    ),
    by_header(
        "kimi-k2",
        {
            "system": "<|im_system|>system<|im_middle|>",
            "user": "<|im_user|>user<|im_middle|>",
            "assistant": "<|im_assistant|>assistant<|im_middle|>",
        },
        ("<|im_end|>",),
        tails=("[EOS]",),
    ),
    by_header("granite", _roles("<|start_of_role|>{}<|end_of_role|>"), ("<|end_of_text|>\n",)),
    by_header("exaone", _roles("[|{}|]"), ("[|endofturn|]\n", "\n")),
    by_header("seed-oss", _roles("<seed:bos>{}\n"), ("<seed:eos>",)),
)
"""Tried all; of those that read a text, the one that explains the most of it counts, the first of equals."""

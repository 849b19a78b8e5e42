"""Texts that chat templates made come apart; texts that none made stay as they are."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.trainers.chat_families import FAMILIES
from service.trainers.chat_format import TAILS, without_tails
from service.trainers.templated import (
    BUILT_IN,
    PLAIN,
    UNKNOWN,
    Templates,
    looks_templated,
    response_start,
    split_prompt,
    split_whole,
)

TEMPLATED = {
    "chatml": (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\n",
        "<|im_end|>\n",
    ),
    "phi-4": (
        "<|im_start|>system<|im_sep|>Be brief.<|im_end|><|im_start|>user<|im_sep|>Why?<|im_end|>"
        "<|im_start|>assistant<|im_sep|>",
        "<|im_end|>",
    ),
    "llama-3": (
        "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nWhy?<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
        "<|eot_id|>",
    ),
    "llama-4": (
        "<|begin_of_text|><|header_start|>system<|header_end|>\n\nBe brief.<|eot|>"
        "<|header_start|>user<|header_end|>\n\nWhy?<|eot|><|header_start|>assistant<|header_end|>\n\n",
        "<|eot|>",
    ),
    "llama-2": ("<s>[INST] <<SYS>>\nBe brief.\n<</SYS>>\n\nWhy? [/INST]", " </s>"),
    "mistral": ("<s>[SYSTEM_PROMPT] Be brief.[/SYSTEM_PROMPT][INST] Why?[/INST]", "</s>"),
    "gemma-4": ("<bos><|turn>system\nBe brief.<turn|>\n<|turn>user\nWhy?<turn|>\n<|turn>model\n", "<turn|>"),
    "deepseek": ("<｜begin▁of▁sentence｜>Be brief.<｜User｜>Why?<｜Assistant｜>", "<｜end▁of▁sentence｜>"),
    "glm": ("[gMASK]<sop><|system|>\nBe brief.<|user|>\nWhy?<|assistant|>", "<|user|>"),
    "phi-3": ("<|system|>\nBe brief.<|end|>\n<|user|>\nWhy?<|end|>\n<|assistant|>\n", "<|end|>\n<|endoftext|>"),
    "zephyr": ("<|system|>\nBe brief.</s>\n<|user|>\nWhy?</s>\n<|assistant|>\n", "</s>"),
    "tulu": ("<|endoftext|><|system|>\nBe brief.\n<|user|>\nWhy?\n<|assistant|>\n", "<|endoftext|>"),
    "gpt-oss": (
        "<|start|>developer<|message|>Be brief.<|end|><|start|>user<|message|>Why?<|end|><|start|>assistant",
        "<|return|>",
    ),
    "command-r": (
        "<BOS_TOKEN><|START_OF_TURN_TOKEN|><|SYSTEM_TOKEN|>Be brief.<|END_OF_TURN_TOKEN|>"
        "<|START_OF_TURN_TOKEN|><|USER_TOKEN|>Why?<|END_OF_TURN_TOKEN|><|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>",
        "<|END_OF_TURN_TOKEN|>",
    ),
    "kimi-k2": (
        "<|im_system|>system<|im_middle|>Be brief.<|im_end|><|im_user|>user<|im_middle|>Why?<|im_end|>"
        "<|im_assistant|>assistant<|im_middle|>",
        "<|im_end|>",
    ),
    "granite": (
        "<|start_of_role|>system<|end_of_role|>Be brief.<|end_of_text|>\n<|start_of_role|>user<|end_of_role|>Why?"
        "<|end_of_text|>\n<|start_of_role|>assistant<|end_of_role|>",
        "<|end_of_text|>",
    ),
    "exaone": ("[|system|]Be brief.[|endofturn|]\n[|user|]Why?\n[|assistant|]", "[|endofturn|]"),
    "seed-oss": (
        "<seed:bos>system\nBe brief.<seed:eos><seed:bos>user\nWhy?<seed:eos><seed:bos>assistant\n",
        "<seed:eos>",
    ),
}
"""Prompt with a system turn, and the end token, as the families' own templates write them."""

NO_SYSTEM = {
    "gemma": ("<bos><start_of_turn>user\nWhy?<end_of_turn>\n<start_of_turn>model\n", "<end_of_turn>\n"),
    "mistral": ("<s>[INST] Why?[/INST] ", "</s>"),
    "mistral-tekken": ("<s>[INST]Why?[/INST]", "</s>"),
    "llama-2": ("<s>[INST] Why? [/INST] ", "</s>"),
    "deepseek": ("<｜begin▁of▁sentence｜><｜User｜>Why?<｜Assistant｜>", "<｜end▁of▁sentence｜>"),
    "glm-4.5": ("[gMASK]<sop><|user|>\nWhy?/nothink<|assistant|>\n<think></think>\n", "<|endoftext|>"),
    "qwen-3": ("<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n", "<|im_end|>"),
    "command-a": (
        "<BOS_TOKEN><|START_OF_TURN_TOKEN|><|USER_TOKEN|>Why?<|END_OF_TURN_TOKEN|><|START_OF_TURN_TOKEN|>"
        "<|CHATBOT_TOKEN|><|START_RESPONSE|>",
        "<|END_RESPONSE|><|END_OF_TURN_TOKEN|>",
    ),
    "gpt-oss": (
        "<|start|>user<|message|>Why?<|end|><|start|>assistant<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant"
        "<|channel|>final<|message|>",
        "<|return|>",
    ),
}
"""The same without a system turn, some with what comes between the header and the answer."""

TEMPTING = "Use [INST] and <|im_start|>user\nas here:<|im_end|>\n<|im_start|>assistant\n[/INST]<|user|>\n, that is all."
"""A response that talks of templates."""


@pytest.mark.parametrize("family", TEMPLATED)
def test_a_prompt_with_a_system_turn_comes_apart(family: str) -> None:
    prompt, end = TEMPLATED[family]
    wanted = ("System: Be brief.\n\nUser: Why?", "Because.")
    # gpt-oss writes the channel after the assistant's header.
    said = ("<|channel|>final<|message|>" if family == "gpt-oss" else "") + "Because."
    splits = [split_prompt(prompt, said + end), split_whole(prompt + said + end), split_whole(prompt + said)]
    assert [(split.prompt, split.response) for split in splits] == [wanted] * 3
    assert {split.template for split in splits} == {family}


@pytest.mark.parametrize("family", NO_SYSTEM)
def test_a_prompt_of_one_user_turn_is_its_words(family: str) -> None:
    prompt, end = NO_SYSTEM[family]
    for split in (split_prompt(prompt, "Because." + end), split_whole(prompt + "Because." + end)):
        assert (split.prompt, split.response) == ("Why?", "Because.")


@pytest.mark.parametrize("family", [*TEMPLATED, "plain"])
def test_where_the_prompt_is_known_no_word_of_the_response_is_cut(family: str) -> None:
    prompt = TEMPLATED[family][0] if family in TEMPLATED else "Why?"
    assert split_prompt(prompt, TEMPTING).response == TEMPTING
    split = BUILT_IN.split_query(prompt + TEMPTING, prompt)
    assert split.response == TEMPTING
    assert split.prompt == (prompt if family == "plain" else "System: Be brief.\n\nUser: Why?")


@pytest.mark.parametrize("family", ["mistral", "llama-2", "chatml", "glm-4.5"])
def test_a_whole_text_is_not_cut_at_a_lone_header(family: str) -> None:
    prompt, end = {**TEMPLATED, **NO_SYSTEM}[family]
    response = "Use [INST] or <|im_start|>user\nhere."
    assert split_whole(prompt + response + end).response == response


def test_earlier_turns_stay_with_the_prompt() -> None:
    text = (
        "<|im_start|>user\nOne?<|im_end|>\n<|im_start|>assistant\nTwo.<|im_end|>\n<|im_start|>user\nThree?<|im_end|>\n"
        "<|im_start|>assistant\nFour.<|im_end|>"
    )
    split = split_whole(text)
    assert (split.prompt, split.response) == ("User: One?\n\nAssistant: Two.\n\nUser: Three?", "Four.")


def test_what_the_template_put_into_the_assistants_mouth_is_the_responses() -> None:
    prompt = "<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\n<think>\n"
    split = split_prompt(prompt, "hm</think> So.<|im_end|>")
    assert (split.prompt, split.response) == ("Why?", "<think>\nhm</think> So.")


def test_padding_and_ends_are_no_part_of_a_text() -> None:
    whole, known = split_whole("<pad><pad><s>Question and answer</s></s>"), split_prompt("Why? ", "So.<|endoftext|>")
    assert (whole.prompt, whole.response, whole.template) == ("", "Question and answer", UNKNOWN)
    assert (known.prompt, known.response, known.template) == ("Why? ", "So.", PLAIN)


def test_a_conversation_that_ends_with_the_user_is_raw_text() -> None:
    text = "<|im_start|>user\nWhy?<|im_end|>\n"
    assert split_whole(text).prompt == ""


def test_a_response_that_goes_on_as_the_user_is_not_cut_where_the_prompt_is_known() -> None:
    prompt = "<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\n"
    response = "Because.<|im_end|>\n<|im_start|>user\nThanks!"
    for split in (split_prompt(prompt, response), split_whole(prompt + response)):
        assert (split.prompt, split.response) == ("Why?", response)


@given(st.text(max_size=60), st.text(max_size=60))
def test_plain_texts_are_never_touched(prompt: str, response: str) -> None:
    if BUILT_IN.read(prompt) is None:
        split = split_prompt(prompt, response + "|")
        assert (split.prompt, split.response) == (prompt, response + "|")


def test_every_family_has_a_case() -> None:
    assert {format_.name for format_ in FAMILIES} == {*TEMPLATED, "gemma"}


@pytest.mark.parametrize(
    ("query", "prompt", "response"),
    [
        ("<s> [INST] Why? [/INST] Because.", "<s>[INST] Why? [/INST]", " Because."),
        ("[INST] Why? [/INST] Because.", "<s>[INST] Why? [/INST]", " Because."),
        ("<s><s>[INST] Why? [/INST]So.", "<s>[INST] Why? [/INST]", "So."),
        ("\ufffd the end of a long prompt.\nSo.", "A head, then the end of a long prompt.\n", "So."),
        ("the end of a long prompt. So.", "A head, then the end of a long prompt.", " So."),
        ("Why? Because.", "Why?", " Because."),
    ],
)
def test_a_prompt_is_found_though_a_tokenizer_changed_it_or_a_trainer_cut_it(
    query: str, prompt: str, response: str
) -> None:
    start = response_start(query, prompt)
    assert start is not None
    assert query[start:] == response


@pytest.mark.parametrize("query", ["Because.", "cut. Because.", "", "aaaaaaaaaaaaaaaaaaaaaaaaab"])
def test_a_query_that_does_not_hold_the_prompt_tells_nothing(query: str) -> None:
    assert response_start(query, "a" * 100 + " A prompt that was cut.") is None


def test_a_cut_prompt_of_a_known_template_is_scored_whole() -> None:
    prompt = "<|im_start|>user\n" + "word " * 50 + "<|im_end|>\n<|im_start|>assistant\n"
    split = BUILT_IN.split_query(prompt[120:] + TEMPTING, prompt)
    assert (split.prompt, split.response) == ("word " * 50, TEMPTING)


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("Why?", False),
        (
            "In HTML, <b>x</b> is bold. What of <|im_start|> in the middle of a text, far from its last words, say?",
            False,
        ),
        ("<|new|>user\nWhy?<|done|>\n<|new|>assistant\n", True),
        ("### Instruction:\nWhy?\n\n### Response:\n", True),
        ("USER: Why? ASSISTANT:", True),
        ("[UNK_INST] Why?", False),
    ],
)
def test_an_unknown_template_is_told_from_a_plain_prompt(prompt: str, expected: bool) -> None:
    assert looks_templated(prompt) is expected
    split = split_prompt(prompt, "So.")
    assert (split.prompt, split.template) == (prompt, UNKNOWN if expected else PLAIN)


def test_of_two_formats_the_one_that_explains_more_reads_a_text() -> None:
    prompt, _ = TEMPLATED["phi-3"]
    assert {format_.name for format_ in FAMILIES if format_.read(prompt)} > {"phi-3"}
    reading = Templates(FAMILIES[::-1]).read(prompt)
    assert reading is not None
    assert reading.format.name == "phi-3"


PIECES = ["x", " ", "\n", "</s>", "<|im_end|>", "<pad>", "<", "\u3000", "</s"]
TAIL = re.compile(r"(?:\s*(?:" + "|".join(map(re.escape, TAILS)) + r"))+\s*$")


@given(st.lists(st.sampled_from(PIECES), max_size=12).map("".join))
def test_ends_are_what_the_plain_pattern_says(text: str) -> None:
    assert without_tails(text) == TAIL.sub("", text)


@pytest.mark.parametrize("piece", ["\n", "</s>", "</s>\n"])
def test_a_response_of_nothing_but_ends_and_blanks_is_no_work(piece: str) -> None:
    # Minutes, if each position were tried anew.
    assert without_tails(piece * 200_000 + "x") == piece * 200_000 + "x"
    assert without_tails("x" + "</s>\n" * 100_000) == "x"

"""Texts that chat templates made come apart; texts that none made stay as they are."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.trainers.templated import FORMATS, TAILS, split_prompt, split_whole, turns_of, without_ends

TEMPLATED = {
    "chatml": (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\n",
        "<|im_end|>\n",
    ),
    "llama3": (
        "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nWhy?<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
        "<|eot_id|>",
    ),
    "zephyr": ("<|system|>\nBe brief.</s>\n<|user|>\nWhy?</s>\n<|assistant|>\n", "</s>"),
    "phi": ("<|system|>\nBe brief.<|end|>\n<|user|>\nWhy?<|end|>\n<|assistant|>\n", "<|end|>\n<|endoftext|>"),
}
"""Prompt with a system turn, and the end token, as the families' own templates write them."""

NO_SYSTEM = {
    "gemma": ("<bos><start_of_turn>user\nWhy?<end_of_turn>\n<start_of_turn>model\n", "<end_of_turn>\n"),
    "mistral": ("<s>[INST] Why?[/INST] ", "</s>"),
    "deepseek": ("<｜begin▁of▁sentence｜><｜User｜>Why?<｜Assistant｜>", "<｜end▁of▁sentence｜>"),
}


@pytest.mark.parametrize("family", TEMPLATED)
def test_a_prompt_with_a_system_turn_comes_apart(family: str) -> None:
    prompt, end = TEMPLATED[family]
    wanted = ("System: Be brief.\n\nUser: Why?", "Because.")
    assert split_prompt(prompt, "Because." + end) == wanted
    assert split_whole(prompt + "Because." + end) == wanted
    assert split_whole(prompt + "Because.") == wanted


@pytest.mark.parametrize("family", NO_SYSTEM)
def test_a_prompt_of_one_user_turn_is_its_words(family: str) -> None:
    prompt, end = NO_SYSTEM[family]
    assert split_prompt(prompt, "Because." + end) == ("Why?", "Because.")
    assert split_whole(prompt + "Because." + end) == ("Why?", "Because.")


def test_earlier_turns_stay_with_the_prompt() -> None:
    text = (
        "<|im_start|>user\nOne?<|im_end|>\n<|im_start|>assistant\nTwo.<|im_end|>\n<|im_start|>user\nThree?<|im_end|>\n"
        "<|im_start|>assistant\nFour.<|im_end|>"
    )
    assert split_whole(text) == ("User: One?\n\nAssistant: Two.\n\nUser: Three?", "Four.")


def test_what_the_template_put_into_the_assistants_mouth_is_the_responses() -> None:
    prompt = "<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\n<think>\n"
    assert split_prompt(prompt, "hm</think> So.<|im_end|>") == ("Why?", "<think>\nhm</think> So.")


def test_padding_and_ends_are_no_part_of_a_text() -> None:
    assert split_whole("<pad><pad><s>Question and answer</s></s>") == ("", "Question and answer")
    assert split_prompt("Why? ", "Because.<|endoftext|>") == ("Why? ", "Because.")


def test_a_conversation_that_ends_with_the_user_is_raw_text() -> None:
    text = "<|im_start|>user\nWhy?<|im_end|>\n"
    assert split_whole(text)[0] == ""


def test_a_response_that_goes_on_as_the_user_is_not_cut_where_the_prompt_is_known() -> None:
    prompt = "<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\n"
    response = "Because.<|im_end|>\n<|im_start|>user\nThanks!"
    assert split_prompt(prompt, response) == ("Why?", response)


@given(st.text(max_size=60), st.text(max_size=60))
def test_plain_texts_are_never_touched(prompt: str, response: str) -> None:
    if turns_of(prompt) is None:
        assert split_prompt(prompt, response + "|")[0] == prompt
        assert split_prompt(prompt, response + "|")[1] == response + "|"


def test_every_family_has_a_case() -> None:
    covered = {next(f.name for f in FORMATS if turns_of(p) and f.header.search(p)) for p, _ in TEMPLATED.values()}
    covered |= {next(f.name for f in FORMATS if f.header.search(p)) for p, _ in NO_SYSTEM.values()}
    assert covered == {format_.name for format_ in FORMATS}


PIECES = ["x", " ", "\n", "</s>", "<|im_end|>", "<pad>", "<", "\u3000", "</s"]
TAIL = re.compile(r"(?:\s*(?:" + "|".join(map(re.escape, TAILS)) + r"))+\s*$")


@given(st.lists(st.sampled_from(PIECES), max_size=12).map("".join))
def test_ends_are_what_the_plain_pattern_says(text: str) -> None:
    assert without_ends(text) == TAIL.sub("", text)


@pytest.mark.parametrize("piece", ["\n", "</s>", "</s>\n"])
def test_a_response_of_nothing_but_ends_and_blanks_is_no_work(piece: str) -> None:
    # Minutes, if each position were tried anew.
    assert without_ends(piece * 200_000 + "x") == piece * 200_000 + "x"
    assert without_ends("x" + "</s>\n" * 100_000) == "x"

"""The commands and configurations of the trainers' pages, read by the trainers' own code."""

from __future__ import annotations

import argparse
import ast
import dataclasses
import os
import re
import shlex
import sys
from datetime import datetime
from typing import Any

import pytest
import yaml

from tests.docs.tables import ROOT
from tests.support.trainer_clients import client_folder, loaded
from tests.support.trainer_processes import result_of, run_module

PAGES = ROOT / "docs/trainers"


def text_of(page: str) -> str:
    return (PAGES / page).read_text("utf-8")


def command_of(page: str, program: str, language: str = "") -> list[str]:
    """The words after the program of the page's longest command."""
    if language:
        found = re.findall(rf"^```{language}\n(.*?)^```$", text_of(page), re.MULTILINE | re.DOTALL)
    else:
        found = ["".join(block) for block in re.findall(r"((?:^    .*\n)+)", text_of(page), re.MULTILINE)]
    longest = max((block for block in found if program in block), key=len)
    return shlex.split(longest[longest.index(program) + len(program) :].replace("\\\n", " "))


# OpenRLHF ------------------------------------------------------------------------------------------------------------


def train_ppo_ray(words: list[str], monkeypatch: pytest.MonkeyPatch) -> Any:
    """What OpenRLHF's command line makes of the words, and after its own checks would train with."""
    folder = client_folder("openrlhf")
    tree = ast.parse((folder / "openrlhf/cli/train_ppo_ray.py").read_text("utf-8"))
    [program] = [node for node in tree.body if isinstance(node, ast.If) and "__main__" in ast.unparse(node.test)]
    trained: list[Any] = []
    monkeypatch.setattr(sys, "argv", ["train_ppo_ray", *words])
    with loaded(folder, "openrlhf.utils.config"):
        code = compile(ast.Module(body=program.body, type_ignores=[]), "train_ppo_ray", "exec")
        exec(code, {"argparse": argparse, "os": os, "datetime": datetime, "train": trained.append})
    [arguments] = trained
    return arguments


def test_openrlhf_takes_the_pages_command(monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = train_ppo_ray(command_of("openrlhf.md", "openrlhf.cli.train_ppo_ray"), monkeypatch)
    assert arguments.reward.remote_url == ["http://gateway:8080/get_reward?run=qwen-grpo-1&normalize=true"]
    assert arguments.reward.model_name_or_path is None
    assert arguments.rollout.n_samples_per_prompt == 8
    # As the page says: what raw rewards are clipped to, and what dynamic filtering takes for a range.
    assert tuple(arguments.reward.clip_range) == (-10, 10)
    assert tuple(arguments.algo.dynamic_filtering_range) == (0, 1)


def test_openrlhf_takes_several_gateways_with_commas_between(monkeypatch: pytest.MonkeyPatch) -> None:
    words = command_of("openrlhf.md", "openrlhf.cli.train_ppo_ray")
    words[words.index("--reward.remote_url") + 1] = "http://a/get_reward?run=r,http://b/get_reward?run=r"
    found = train_ppo_ray(words, monkeypatch).reward.remote_url
    assert found == ["http://a/get_reward?run=r", "http://b/get_reward?run=r"]


def test_openrlhfs_page_names_no_flag_that_openrlhf_has_not() -> None:
    source = (client_folder("openrlhf") / "openrlhf/cli/train_ppo_ray.py").read_text("utf-8")
    flags = set(re.findall(r"--[a-z]+\.[a-z_.]*[a-z_]", text_of("openrlhf.md")))
    assert len(flags) > 10
    assert [flag for flag in sorted(flags) if f'"{flag}"' not in source] == []


# LLaMA-Factory -------------------------------------------------------------------------------------------------------


def llamafactory_config() -> dict[str, Any]:
    """The page's YAML file."""
    blocks = re.findall(r"((?:^    .*\n)+)", text_of("llama-factory.md"), re.MULTILINE)
    [config] = [block for block in blocks if "stage: ppo" in block]
    found: dict[str, Any] = yaml.safe_load(config)
    return found


def test_llamafactory_takes_the_pages_configuration() -> None:
    transformers = pytest.importorskip("transformers")
    folder, config = client_folder("llamafactory"), llamafactory_config()
    names = {field.name for field in dataclasses.fields(transformers.Seq2SeqTrainingArguments)}
    names |= set(re.findall(r"^    (\w+): ", (folder / "llamafactory/hparams/model_args.py").read_text("utf-8"), re.M))
    for module, kind in (
        ("finetuning_args", "FinetuningArguments"),
        ("data_args", "DataArguments"),
        ("generating_args", "GeneratingArguments"),
    ):
        with loaded(folder, f"llamafactory.hparams.{module}") as found:
            known = {field.name for field in dataclasses.fields(getattr(found, kind))}
            taken = getattr(found, kind)(**{name: value for name, value in config.items() if name in known})
        names |= known
        if kind == "FinetuningArguments":
            assert (taken.stage, taken.reward_model_type) == ("ppo", "api")
            assert taken.reward_model.startswith("http")
    assert set(config) - names == set()


def test_llamafactory_has_the_templates_that_the_page_names() -> None:
    source = (client_folder("llamafactory") / "llamafactory/data/template.py").read_text("utf-8")
    [(known, unknown)] = re.findall(
        r"template \(those of (.*?)and relatives\).*?another template \((.*?)\)",
        " ".join(text_of("llama-factory.md").split()),
    )
    named = re.findall(r"`(\w+)`", known + unknown)
    assert len(named) > 6
    assert [name for name in named if f'name="{name}"' not in source] == []


# verl and ms-swift ---------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_verl_takes_the_pages_commands() -> None:
    folder = client_folder("verl")
    commands = re.findall(r"^```bash\n(.*?)^```$", text_of("verl.md"), re.MULTILINE | re.DOTALL)
    for command in commands:
        words = [word for word in shlex.split(command) if "=" in word]
        found = result_of(run_module("tests.support.trainer_arguments", ["--clients", folder, "verl", *words]))
        for word in words:
            name, _, value = word.lstrip("+").partition("=")
            place: Any = found
            for part in name.split("."):
                place = place[part]
            assert str(place) == value, name


@pytest.mark.slow
def test_ms_swift_takes_the_pages_command() -> None:
    words = command_of("ms-swift.md", "swift rlhf", "bash")
    found = result_of(
        run_module("tests.support.trainer_arguments", ["--clients", client_folder("swift"), "swift", *words])
    )
    assert found["rlhf_type"] == "grpo"
    assert found["reward_funcs"] == ["reward_router"]
    assert found["num_generations"] == found["per_device_train_batch_size"] == 8
    assert len(found["external_plugins"]) == 1


# AReaL ---------------------------------------------------------------------------------------------------------------


def test_areals_times_are_those_that_the_page_gives() -> None:
    source = ast.parse((client_folder("areal") / "areal/api/reward_api.py").read_text("utf-8"))
    [wrapper] = [node for node in source.body if isinstance(node, ast.ClassDef) and node.name == "AsyncRewardWrapper"]
    [made] = [node for node in wrapper.body if isinstance(node, ast.FunctionDef) and node.name == "__init__"]
    defaults = [ast.literal_eval(default) for default in made.args.defaults]
    assert defaults == [15, None, 3]
    assert "waits 15 s, tries four times" in text_of("areal.md")

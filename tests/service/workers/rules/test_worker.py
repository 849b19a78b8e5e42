"""The rule worker as it is run: real processes, real bounds, over HTTP."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from service.workers.rules.load import RuleLoadError, load_rule
from tests.conftest import free_port
from tests.support.rules import call, rule_worker

RULES = """
import os

def mixed(messages, response, reference, metadata):
    print("noise, which is no answer")
    if response == "hang":
        while True:
            pass
    if response == "eat":
        return len(bytearray(64 * 1024**3))
    if response == "raise":
        raise ValueError(response)
    if response == "exit":
        os._exit(3)
    if response == "word":
        return "good"
    if response == "nan":
        return float("nan")
    if response == "skip":
        return None
    return len(response) > 3

def seen(messages, response, reference, metadata):
    text = f"{messages} {reference} {sorted(metadata.items())} {sorted(os.environ)}"
    return float(all(word in text for word in response.split()))
"""


def ask(url: str, *items: dict[str, Any], **fields: Any) -> list[Any]:
    status, reply = call(f"{url}/score", {"items": list(items), **fields})
    assert status == 200, reply
    results: list[Any] = reply["results"]
    return results


@pytest.fixture(scope="module")
def rules(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("rules") / "rules.py"
    file.write_text(RULES)
    return file


@pytest.fixture(scope="module")
def url(rules: Path) -> Iterator[str]:
    with rule_worker("--rule", f"{rules}:mixed", "--rule-seconds", "0.5", "--processes", "2") as url:
        yield url


def test_a_failure_costs_the_other_responses_nothing(url: str) -> None:
    bad = ["hang", "eat", "raise", "exit", "word", "nan", "skip"]
    responses = [one for pair in zip(bad, ["good"] * len(bad), strict=True) for one in pair]
    (result,) = ask(url, {"prompt": "p", "responses": responses})
    assert result["rewards"] == [None, 1.0] * len(bad)
    failed = ["rule_timeout", "rule_memory", "rule_error", "rule_crashed", "rule_error", "rule_error", "abstained"]
    assert result["failures"] == [one for code in failed for one in (code, None)]


def test_an_item_is_rewarded_abstained_or_failed(url: str) -> None:
    items = [{"prompt": "p", "responses": responses} for responses in (["a", "abcd"], ["skip", "skip"], ["hang"])]
    first, second, third = ask(url, *items)
    assert first == {"rewards": [0.0, 1.0]}
    assert second == {"abstain": "the rule returned None"}
    assert third["error"]["code"] == "rule_timeout"


def test_what_there_is_no_time_for_is_late_alone(rules: Path) -> None:
    items = [{"prompt": "p", "responses": [text]} for text in ("fine", "hang", "good")]
    with rule_worker("--rule", f"{rules}:mixed", "--rule-seconds", "60") as url:
        first, second, third = ask(url, *items, timeout_seconds=1.0)
    assert first == {"rewards": [1.0]}
    assert second["error"]["code"] == third["error"]["code"] == "timeout"


def test_a_rule_sees_the_instance_and_no_keys(rules: Path) -> None:
    with rule_worker("--rule", f"{rules}:seen", MY_API_KEY="secret") as url:
        messages = [{"role": "system", "content": "sys"}, {"role": "user", "content": "hello"}]
        facts = {"reference": "gold", "metadata": {"task": "math"}}
        (seen,) = ask(url, {"messages": messages, "responses": ["sys hello gold task PATH", "MY_API_KEY"], **facts})
        assert seen == {"rewards": [1.0, 0.0]}


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ({"items": [{"responses": ["a"]}]}, "exactly one of prompt and messages"),
        ({"items": [{"prompt": "p", "responses": []}]}, "length >= 1"),
        ({}, "items"),
    ],
)
def test_a_malformed_request_is_a_400_in_words(url: str, body: Any, words: str) -> None:
    status, reply = call(f"{url}/score", body)
    assert status == 400
    assert words in reply["error"]["message"]


def test_an_empty_request_has_no_results(url: str) -> None:
    assert ask(url) == []


@pytest.mark.parametrize(
    ("rule", "words"),
    [
        ("nothing", "no built-in rule 'nothing': use one of math, "),
        ("absent.py:f", "no file absent.py"),
        ("{rules}:other", "has no function 'other'"),
        ("{broken}:f", "cannot be imported: ZeroDivisionError"),
        ("length", "options: give `min`, `max` or both"),
    ],
)
def test_a_rule_that_cannot_be_loaded_says_why(rules: Path, tmp_path: Path, rule: str, words: str) -> None:
    broken = tmp_path / "broken.py"
    broken.write_text("1 / 0")
    with pytest.raises(RuleLoadError, match=words):
        load_rule(rule.format(rules=rules, broken=broken), {})


def test_a_worker_without_its_rule_ends_and_says_why() -> None:
    command = [sys.executable, "-m", "service.cli", "worker", "--rule", "absent.py:f", "--port", str(free_port())]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert "no file absent.py" in done.stderr

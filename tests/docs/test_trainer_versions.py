"""docs/trainers/index.md says which trainers were tried, and how: true to the versions and to the tests."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.docs.tables import ROOT
from tests.support.fetch_trainers import NEMO_RL, ROLL, SLIME, TRAINERS, trainer_named

PAGES = ROOT / "docs/trainers"
TESTS = ROOT / "tests/service/trainers"
SUPPORT = ROOT / "tests/support"
DOCS = ROOT / "tests/docs/test_trainer_commands.py"

FETCHED = {
    "OpenRLHF": "openrlhf",
    "LLaMA-Factory": "llamafactory",
    "AReaL": "areal",
    "verl": "verl",
    "ms-swift": "swift",
    "SkyRL": "skyrl_gym",
    "verifiers": "verifiers",
    "Atropos": "atropos",
    "NeMo Gym": "nemo_gym",
}
FROM_SOURCE = {"slime": SLIME, "NeMo RL": NEMO_RL, "ROLL": ROLL}
PAGE_OF = {"NeMo RL": "nemo-gym"}
"""Trainers that share another's page."""
SOURCES = {
    "TRL": [TESTS / "test_trl_trainers.py", SUPPORT / "trl_training.py"],
    "OpenRLHF": [TESTS / "test_real_clients.py", DOCS],
    "LLaMA-Factory": [TESTS / "test_real_clients.py", DOCS],
    "slime": [TESTS / "test_real_clients.py"],
    "AReaL": [SUPPORT / "areal_scoring.py"],
    "verl": [SUPPORT / "verl_scoring.py"],
    "ms-swift": [SUPPORT / "swift_scoring.py"],
    "SkyRL": [SUPPORT / "gym_scoring.py"],
    "verifiers": [SUPPORT / "gym_scoring.py"],
    "Atropos": [SUPPORT / "gym_scoring.py"],
    "NeMo Gym": [SUPPORT / "gym_scoring.py"],
    "NeMo RL": [SUPPORT / "ray_scoring.py", PAGES / "nemo-gym.md"],
    "ROLL": [SUPPORT / "ray_scoring.py"],
}
"""Where a trainer's own names are called."""


def rows() -> dict[str, list[str]]:
    """Each trainer's version, what of it runs, and when."""
    text = (PAGES / "index.md").read_text("utf-8")
    table = text[text.index("## What was tried") :]
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines() if line.startswith("| ")]
    return {name: rest for name, *rest in cells[1:]}


def version_of(name: str) -> str:
    """The version that the tests run."""
    if name == "TRL":
        [version] = re.findall(r'"trl==([\w.]+)"', (ROOT / "pyproject.toml").read_text("utf-8"))
        return str(version)
    if name in FROM_SOURCE:
        return FROM_SOURCE[name].commit[:7]
    return trainer_named(FETCHED[name]).version


def stem_of(name: str) -> str:
    """The name of the trainer's page."""
    return PAGE_OF.get(name) or name.lower().replace(" ", "-")


def page_of(name: str) -> str:
    """The trainer's page, without its line breaks."""
    return " ".join((PAGES / f"{stem_of(name)}.md").read_text("utf-8").split())


def test_the_table_names_every_trainer_that_has_a_page() -> None:
    pages = {path.stem for path in PAGES.glob("*.md")} - {"index"}
    assert {stem_of(name) for name in rows()} == pages
    assert set(SOURCES) == set(rows())
    assert sorted(FETCHED.values()) == sorted(trainer.name for trainer in TRAINERS)


@pytest.mark.parametrize("name", SOURCES)
def test_the_versions_are_the_tested_ones(name: str) -> None:
    version = version_of(name)
    assert rows()[name][0] == version
    short = version.rpartition(".")[0] if name == "TRL" else version
    assert f"{'commit' if name in FROM_SOURCE else name} {short}" in page_of(name)


@pytest.mark.parametrize("name", SOURCES)
def test_what_is_said_to_run_is_called_by_the_tests(name: str) -> None:
    called = "\n".join(Path(source).read_text("utf-8") for source in SOURCES[name])
    said = re.findall(r"`(\w+)`", rows()[name][1])
    assert said
    assert [word for word in said if word not in called] == []


def test_sources_run_once_they_were_fetched_from_their_repositories() -> None:
    assert rows()["slime"][2] == "after `make trainer-sources`"
    for name in ("NeMo RL", "ROLL"):
        assert rows()[name][2] == "after `make trainer-sources` and `make trainer-clients`"


@pytest.mark.parametrize("name", FETCHED)
def test_when_it_runs_follows_from_how_it_is_fetched(name: str) -> None:
    light = trainer_named(FETCHED[name]).light
    assert rows()[name][2] == ("`make test`" if light else "after `make trainer-clients`")


def test_ci_fetches_them_all_and_make_test_the_light_ones() -> None:
    assert "make trainer-clients" in (ROOT / ".ci/run").read_text("utf-8")
    makefile = (ROOT / "Makefile").read_text("utf-8")
    assert re.search(r"^test:.* trainer-wheels ", makefile, re.MULTILINE)
    assert re.search(r"^trainer-wheels:.*\n\t@\$\(FETCH_TRAINERS\) light", makefile, re.MULTILINE)
    assert re.search(r"^trainer-clients:.*\n\t@\$\(FETCH_TRAINERS\) all", makefile, re.MULTILINE)

"""The documentation says what the code does: settings, metrics, error codes, paths, commands."""

from __future__ import annotations

import re

import pytest
import typer
from typer.testing import CliRunner

from service.cli import app
from service.errors import ServiceError
from service.workers.rules.builtin import BUILTIN
from service.workers.rules.formats import CHECKS
from tests.docs.tables import ROOT, metrics_page, protocol_schema, settings_page

REMEDY = "run `python -m tests.docs.tables`"


def test_settings_page_is_the_settings() -> None:
    assert (ROOT / "docs/settings.md").read_text("utf-8") == settings_page(), REMEDY


def test_metrics_page_is_the_metrics() -> None:
    assert (ROOT / "docs/metrics.md").read_text("utf-8") == metrics_page(), REMEDY


def test_protocol_schema_is_the_protocol() -> None:
    assert (ROOT / "docs/scorer-protocol.json").read_text("utf-8") == protocol_schema(), REMEDY


def test_scorers_page_lists_rules_and_instructions() -> None:
    page = (ROOT / "docs/scorers.md").read_text("utf-8")
    assert [name for name in [*BUILTIN, *CHECKS] if f"`{name}`" not in page] == []


def error_classes() -> list[type[ServiceError]]:
    import service.handlers.errors
    import service.scorers.protocol  # noqa: F401

    found, waiting = [], [ServiceError]
    while waiting:
        cls = waiting.pop()
        found.append(cls)
        waiting.extend(cls.__subclasses__())
    return found


def test_every_error_that_is_sent_stands_in_the_api_page() -> None:
    page = (ROOT / "docs/api.md").read_text("utf-8")
    start_up_only = {"configuration", "gateway"}
    for cls in error_classes():
        if cls.code in start_up_only or not cls.__module__.startswith("service."):
            continue
        row = re.compile(rf"^\| {cls.status} \|.*`{cls.code}`", re.MULTILINE)
        assert row.search(page), f"docs/api.md has no row for {cls.status} {cls.code} ({cls.__name__})"


def markdown_files() -> list[str]:
    files = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")), ROOT / "loadtests/README.md"]
    return [str(path.relative_to(ROOT)) for path in files]


@pytest.mark.parametrize("name", markdown_files())
def test_files_that_a_page_names_exist(name: str) -> None:
    text = (ROOT / name).read_text("utf-8")
    for path in re.findall(r"`((?:service|router_core|docs|loadtests|tests|deploy)/[\w./-]+)`", text):
        assert (ROOT / path).exists(), f"{name} names {path}, which does not exist"
    for path in re.findall(r"\]\((?!http)([\w./-]+)\)", text):
        base = ROOT / name
        assert (base.parent / path).exists(), f"{name} links to {path}, which does not exist"


@pytest.mark.parametrize("folder", ["router_core", "service", "service/scorers", "service/usecases"])
def test_the_map_names_every_room(folder: str) -> None:
    text = (ROOT / "docs/architecture.md").read_text("utf-8")
    drawn = text[text.index("    router_core/   ") : text.index("## The way of one pair")]
    inside = [path for path in (ROOT / folder).iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()]
    rooms = [path.stem for path in inside if not path.stem.startswith("__")]
    assert len(rooms) > 10
    assert [room for room in rooms if not re.search(rf"\b{room}\b", drawn)] == []


def readme_commands() -> list[str]:
    text = (ROOT / "README.md").read_text("utf-8")
    return sorted(set(re.findall(r"reward-router ([a-z]+)", text)))


@pytest.mark.parametrize("command", readme_commands())
def test_commands_of_the_readme_have_help(command: str) -> None:
    done = CliRunner().invoke(app, [command, "--help"])
    assert done.exit_code == 0, done.output
    assert "Usage" in done.stdout


def test_no_words_of_a_help_text_are_taken_for_markup() -> None:
    """Rich drops what stands in square brackets, `[default: …]` among it."""
    group = typer.main.get_command(app)
    texts = {
        f"{name} --{option.name}": getattr(option, "help", None) or ""
        for name, command in group.commands.items()
        for option in command.params
    }
    assert len(texts) > 50
    assert [name for name, text in texts.items() if re.search(r"\[[a-z#/@]", text)] == []

"""A store's password stays out of the list of processes: the environment names the store."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import pytest
import typer
from typer.testing import CliRunner

from service.cli import app
from service.cli.store_option import STORE_VARIABLE, holds_password, store_option

SECRET = "redis://:s3cret@127.0.0.1:1/0"

echo = typer.Typer()


@echo.command()
def show(store: Annotated[str | None, store_option()] = None) -> None:
    """Print what the option gave."""
    typer.echo(json.dumps(store))


@pytest.fixture(autouse=True)
def no_store(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(STORE_VARIABLE, raising=False)


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        (SECRET, True),
        ("rediss://user:word@host:6379/0", True),
        ("redis+cluster://user:word@a:1,b:2", True),
        ("redis://host:6379/0?password=word", True),
        ("rediss://host:6379/0?ssl_password=word", True),
        ("redis://user@host:6379/0", False),
        ("redis://[::1]:6379/0", False),
        ("unix:///run/store.sock", False),
        ("redis+cluster://a:1,b:2", False),
        ("embedded", False),
    ],
)
def test_which_urls_hold_a_password(url: str, expected: bool) -> None:
    assert holds_password(url) is expected


def test_a_password_on_the_command_line_is_warned_of_without_repeating_it() -> None:
    done = CliRunner().invoke(echo, ["--store", SECRET])
    assert json.loads(done.stdout) == SECRET
    assert STORE_VARIABLE in done.stderr
    assert "s3cret" not in done.stderr


def test_a_url_without_password_is_not_warned_of() -> None:
    assert CliRunner().invoke(echo, ["--store", "redis://host:6379/0"]).stderr == ""


@pytest.mark.parametrize(("value", "expected"), [(SECRET, SECRET), ("", None)])
def test_the_environment_names_the_store_without_a_warning(value: str, expected: str | None) -> None:
    done = CliRunner().invoke(echo, [], env={STORE_VARIABLE: value})
    assert (json.loads(done.stdout), done.stderr) == (expected, "")


def test_the_command_line_goes_before_the_environment() -> None:
    done = CliRunner().invoke(echo, ["--store", "embedded"], env={STORE_VARIABLE: SECRET})
    assert (json.loads(done.stdout), done.stderr) == ("embedded", "")


@pytest.mark.parametrize("command", ["serve", "up", "export"])
def test_every_command_with_a_store_says_where_its_password_belongs(command: str) -> None:
    done = CliRunner().invoke(app, [command, "--help"], env={"COLUMNS": "300", "NO_COLOR": "1", "TERM": "dumb"})
    assert STORE_VARIABLE in done.stdout


def test_export_warns(tmp_path: Path) -> None:
    done = CliRunner().invoke(app, ["export", "run", "--store", SECRET, "--out", str(tmp_path / "log.jsonl")])
    assert f"set {STORE_VARIABLE} instead" in done.output

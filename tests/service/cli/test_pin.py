"""`reward-router pin` against a small stand-in for the model hub: what it asks, writes, and leaves alone."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner

from service.cli import app
from service.cli.pin import with_revisions
from service.errors import ConfigurationError
from service.pool import load_pool
from tests.support.hub import Hub, running_hub

A, B = "a" * 40, "1" * 40

POOL = """\
# What this pool is for.
name: mine
models:
  - name: first     # the small one
    model: org/a
    revision: main  # follows the hub
    licence: apache-2.0
  - {name: second, model: org/b}
  - name: third
    model: 'org/b'

  - name: fourth
    path: models/own
  - name: fifth
    revision: v1
    model: org/a
  - name: last
    model: org/c
    revision: "cccccccccccccccccccccccccccccccccccccccc"
"""


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A hub that answers `model_info` as the real one does."""
    knows = Hub({("org/a", "main"): A, ("org/b", "main"): B, ("org/a", "v1"): B})
    with running_hub(knows, monkeypatch) as running:
        yield running


def pool_file(folder: Path, text: str = POOL) -> Path:
    file = folder / "pool.yaml"
    file.write_text(text)
    return file


def pin(file: Path) -> str:
    done = CliRunner().invoke(app, ["pin", "--pool", str(file)])
    if done.exception is not None:
        raise done.exception
    return done.output


def test_branches_and_tags_become_commits_and_nothing_else_changes(hub: Hub, tmp_path: Path) -> None:
    file = pool_file(tmp_path)
    file.chmod(0o600)
    said = pin(file)
    assert file.read_text() == (
        POOL.replace("revision: main  # follows", f'revision: "{A}"  # follows')
        .replace("model: org/b}", f'model: org/b, revision: "{B}"}}')
        .replace("model: 'org/b'\n", f"model: 'org/b'\n    revision: \"{B}\"\n")
        .replace("revision: v1", f'revision: "{B}"')
    )
    revisions = {model.name: model.revision for model in load_pool(file).models}
    assert revisions == {"first": A, "second": B, "third": B, "fourth": None, "fifth": B, "last": "c" * 40}
    assert (file.stat().st_mode & 0o777, [path.name for path in tmp_path.iterdir()]) == (0o600, ["pool.yaml"])
    assert f"first: org/a main is {A}" in said
    assert not any("org/c" in path for path in hub.asked), "a commit needs no asking"


def test_a_second_time_changes_nothing_and_asks_nothing(hub: Hub, tmp_path: Path) -> None:
    file = pool_file(tmp_path)
    pin(file)
    pinned, asked = file.read_text(), len(hub.asked)
    assert "every model of the hub names a commit" in pin(file)
    assert (file.read_text(), len(hub.asked)) == (pinned, asked)


@pytest.mark.parametrize("lost", [("org/b", "main"), ("org/a", "v1")])
def test_unless_every_model_is_found_nothing_is_written(hub: Hub, tmp_path: Path, lost: tuple[str, str]) -> None:
    del hub.commits[lost]
    file = pool_file(tmp_path)
    with pytest.raises(ConfigurationError, match=rf"{lost[0]} at '{lost[1]}' cannot be looked up \(set HF_TOKEN"):
        pin(file)
    assert file.read_text() == POOL


def test_an_entry_that_is_written_with_a_merge_is_left_to_its_author(hub: Hub, tmp_path: Path) -> None:
    before = "models:\n  - {name: a, path: m}\n  - {name: b, urls: ['http://b:1'], <<: {model: org/a}}\n"
    file = pool_file(tmp_path, before)
    with pytest.raises(ConfigurationError, match="'b' stands is not clear; write it by hand"):
        pin(file)
    assert file.read_text() == before
    assert [path.name for path in tmp_path.iterdir()] == ["pool.yaml"]


def test_a_value_that_is_written_as_a_block_or_shared_is_left_to_its_author(hub: Hub, tmp_path: Path) -> None:
    entry = "  - name: {0}\n    model: org/a\n    revision: {1}\n"
    block = "models:\n  - name: a\n    model: >-\n      org/a\n    licence: mit\n"
    shared = "models:\n" + entry.format("a", "&r main") + entry.format("b", "*r")
    for before in (block, shared):
        file = pool_file(tmp_path, before)
        with pytest.raises(ConfigurationError, match=r"pool\.yaml: where the `revision` of 'a'.* is not clear"):
            pin(file)
        assert file.read_text() == before


def test_line_ends_and_links_stay(hub: Hub, tmp_path: Path) -> None:
    real, link = tmp_path / "real.yaml", tmp_path / "pool.yaml"
    real.write_bytes(POOL.replace("\n", "\r\n").encode())
    link.symlink_to(real.name)
    pin(link)
    assert link.is_symlink()
    lines = real.read_bytes().split(b"\r\n")
    assert f'    revision: "{A}"  # follows the hub'.encode() in lines
    assert not any(b"\n" in line for line in lines), "also before the line that was added"
    assert len(lines) == POOL.count("\n") + 2


@pytest.mark.parametrize("nothing", ["", " ~", " null"])
def test_an_empty_revision_is_none_and_takes_a_commit(nothing: str) -> None:
    text = f"models:\n  - name: a\n    model: org/a\n    revision:{nothing}\n"
    asked: list[object] = []
    pinned = with_revisions(text, lambda name, revision: asked.append((name, revision)) or A)  # type: ignore[func-returns-value]
    assert asked == [("org/a", None)]
    assert pinned == text.replace(f"revision:{nothing}", f'revision: "{A}"')


def test_up_and_manifests_warn_once_of_what_follows_a_branch(tmp_path: Path) -> None:
    file = pool_file(tmp_path)
    words = ["--worker", "cpu", "--dry-run"]
    for command in (["up", "--pool", str(file), *words], ["manifests", "--pool", str(file), "--out", str(tmp_path)]):
        told = CliRunner().invoke(app, command).stderr
        assert told.count("warning: ") == 1
        assert told.startswith("warning: first, second, third, fifth: `revision` is a branch or tag of the hub")
        assert f"`reward-router pin --pool {file}`" in told
    still = POOL.partition("  - {name: second")[0].replace("revision: main", f"revision: {A}")
    quiet = CliRunner().invoke(app, ["up", "--pool", str(pool_file(tmp_path, still)), *words])
    assert (quiet.exit_code, quiet.stderr) == (0, "")
    commands = [line for line in quiet.stdout.splitlines() if not line.startswith("#")]
    assert len(commands) == 1, "standard output is for the shell"

"""`reward-router keys`: what it prints, what the file holds then, and what a gateway makes of it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from service.cli import app
from service.errors import ConfigurationError, UnauthorizedError
from service.keys.access import Scope
from service.keys.ring import KeyRing


def run(path: Path, *words: str) -> str:
    """Run `keys` on the file; returns standard output."""
    done = CliRunner().invoke(app, ["keys", *words, "--file", str(path)], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.stdout.strip()


def test_a_new_key_works_and_is_nowhere_but_on_standard_output(tmp_path: Path) -> None:
    path = tmp_path / "made" / "keys.json"
    key = run(path, "new", "dpo", "--run", "dpo-*", "--expires", "90d", "--instances-per-minute", "60")
    access = KeyRing(path=path).find(key.encode())
    assert (access.name, access.scopes, access.runs) == ("dpo", {Scope.REWARD, Scope.FEEDBACK}, ("dpo-*",))
    assert access.meter is not None
    assert key not in path.read_text("utf-8")
    assert key not in run(path, "list")
    made = CliRunner().invoke(app, ["keys", "new", "other", "--file", str(tmp_path / "other.json")])
    assert "need a key with --scope read" in made.stderr
    (listed,) = json.loads(run(path, "list", "--json"))
    assert (listed["name"], listed["limits"]) == ("dpo", {"instances_per_minute": 60})


def test_rotation_leaves_the_old_key_valid_for_the_overlap(tmp_path: Path) -> None:
    path = tmp_path / "keys.json"
    old = run(path, "new", "dash", "--scope", "read", "--run", "a")
    new = run(path, "rotate", "dash", "--overlap", "1h")
    ring = KeyRing(path=path)
    assert ring.find(new.encode()).runs == ring.find(old.encode()).runs == ("a",)
    run(path, "rotate", "dash", "--overlap", "0m")
    with pytest.raises(UnauthorizedError, match="expired"):
        KeyRing(path=path).find(new.encode())


def test_revoke_ends_one_key_by_id_or_all_of_a_name(tmp_path: Path) -> None:
    path = tmp_path / "keys.json"
    first, second, other = (run(path, "new", name) for name in ("a", "a", "b"))
    ids = [entry["id"] for entry in json.loads(run(path, "list", "--json"))]
    run(path, "revoke", ids[0])
    ring = KeyRing(path=path)
    ring.find(second.encode())
    with pytest.raises(UnauthorizedError):
        ring.find(first.encode())
    run(path, "revoke", "a")
    ring = KeyRing(path=path)
    ring.find(other.encode())
    with pytest.raises(UnauthorizedError):
        ring.find(second.encode())


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["new", "a b"], "name"),
        (["new", "a", "--expires", "soon"], "soon"),
        (["new", "a", "--run", "x/y"], "runs"),
        (["revoke", "nobody"], "nobody"),
        (["rotate", "nobody"], "nobody"),
    ],
)
def test_wrong_words_are_named_and_change_nothing(tmp_path: Path, words: list[str], named: str) -> None:
    path = tmp_path / "keys.json"
    run(path, "new", "first")
    before = path.read_bytes()
    with pytest.raises(ConfigurationError, match=named):
        run(path, *words)
    assert path.read_bytes() == before

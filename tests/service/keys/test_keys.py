"""Keys as a file, and the ring that follows it: hashes, ends, limits, changes while it is in force."""

from __future__ import annotations

import json
import math
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from service.errors import ConfigurationError, ForbiddenError, KeyLimitError, UnauthorizedError
from service.keys.access import Access, Meter, Scope
from service.keys.file import KeyFile, KeyLimits, digest_of, entry_of, new_key, read_key_file, write_key_file
from service.keys.ring import KeyRing


def test_the_file_holds_hashes_and_no_key(tmp_path: Path) -> None:
    path, key = tmp_path / "keys.json", new_key()
    write_key_file(path, KeyFile([entry_of(key, "one", [Scope.REWARD], runs=["dpo-*"])]))
    text = path.read_text("utf-8")
    assert key not in text
    assert digest_of(key.encode()).hex() in text
    assert path.stat().st_mode & 0o777 == 0o600
    assert read_key_file(path).keys[0].runs == ["dpo-*"]
    path.chmod(0o640)
    write_key_file(path, KeyFile())
    assert path.stat().st_mode & 0o777 == 0o640
    assert [one.name for one in tmp_path.iterdir()] == ["keys.json"]


@pytest.mark.parametrize(
    ("entry", "named"),
    [
        ({"hash": "sha256:12"}, "hash"),
        ({"scopes": ["root"]}, "root"),
        ({"scopes": []}, "scopes"),
        ({"name": "a b"}, "name"),
        ({"runs": ["a/b"]}, "runs"),
        ({"runs": []}, "runs"),
        ({"expires": "2027-01-01T00:00:00"}, "expires"),
        ({"limits": {"instances_per_minute": 0}}, "instances_per_minute"),
        ({"limits": {"per_hour": 1}}, "per_hour"),
        ({"note": 1}, "note"),
    ],
)
def test_a_field_that_does_not_fit_is_named(tmp_path: Path, entry: dict[str, object], named: str) -> None:
    good = {"name": "one", "hash": "sha256:" + "0" * 64, "scopes": ["reward"]}
    path = tmp_path / "keys.json"
    path.write_text(json.dumps({"keys": [good | entry]}), "utf-8")
    with pytest.raises(ConfigurationError, match=named):
        read_key_file(path)


def test_a_ring_of_no_keys_lets_everybody_in_and_an_empty_file_nobody(tmp_path: Path) -> None:
    open_to_all = KeyRing()
    assert not open_to_all.needed
    assert open_to_all.find(b"").scopes == frozenset(Scope)
    write_key_file(tmp_path / "keys.json", KeyFile())
    ring = KeyRing(path=tmp_path / "keys.json")
    assert ring.needed
    for key in (b"", b"any"):
        with pytest.raises(UnauthorizedError):
            ring.find(key)
    with pytest.raises(ConfigurationError, match="absent"):
        KeyRing(path=tmp_path / "absent.json")


def test_a_changed_file_is_taken_and_says_what_changed(tmp_path: Path) -> None:
    path, first, second = tmp_path / "keys.json", new_key(), new_key()
    one = entry_of(first, "one", [Scope.REWARD], limits=KeyLimits(instances_per_minute=2))
    write_key_file(path, KeyFile([one]))
    ring = KeyRing(["plain-key"], path)
    ring.find(first.encode()).enter()
    assert ring.read_again() == []
    two = entry_of(second, "two", [Scope.READ])
    write_key_file(path, KeyFile([one, two]))
    assert ring.read_again() == [f"added two ({two.id})"]
    assert ring.find(second.encode()).scopes == {Scope.READ}
    # Limits go on: one instance of two is left.
    ring.find(first.encode()).enter()
    with pytest.raises(KeyLimitError):
        ring.find(first.encode()).enter()
    write_key_file(path, KeyFile([two]))
    assert ring.read_again() == [f"removed one ({one.id})"]
    with pytest.raises(UnauthorizedError):
        ring.find(first.encode())
    assert ring.find(b"plain-key").name == "api_keys[0]"


def test_a_broken_or_missing_file_changes_nothing_and_is_said(tmp_path: Path) -> None:
    path, key = tmp_path / "keys.json", new_key()
    file = KeyFile([entry_of(key, "one", [Scope.REWARD])])
    write_key_file(path, file)
    ring = KeyRing(path=path)
    path.write_text("{", "utf-8")
    assert ring.read_again() == []
    assert ring.problem is not None
    ring.find(key.encode())
    path.unlink()
    ring.read_again()
    assert "No such file" in (ring.problem or "")
    ring.find(key.encode())
    write_key_file(path, file)
    ring.read_again()
    assert ring.problem is None


def test_a_key_ends_when_its_time_is_over(tmp_path: Path) -> None:
    path, old, new = tmp_path / "keys.json", new_key(), new_key()
    now = datetime.now(UTC)
    write_key_file(
        path,
        KeyFile(
            [
                entry_of(old, "old", [Scope.READ], expires=now - timedelta(seconds=1)),
                entry_of(new, "new", [Scope.READ], expires=now + timedelta(hours=1)),
            ]
        ),
    )
    ring = KeyRing(path=path)
    assert ring.find(new.encode()).expires > time.time()
    with pytest.raises(UnauthorizedError, match="expired"):
        ring.find(old.encode())


def test_runs_are_names_or_patterns() -> None:
    access = Access("k", frozenset(Scope), runs=("dpo-*", "one"))
    assert access.seen(["dpo-1", "one", "one2", "DPO-1", "two"]) == ["dpo-1", "one"]
    with pytest.raises(ForbiddenError, match="'two'"):
        access.check_run("two")
    with pytest.raises(ForbiddenError, match="admin"):
        Access("k", frozenset({Scope.READ})).check_scope(Scope.ADMIN)


def test_a_minutes_worth_may_come_at_once_and_a_batch_goes_on_credit() -> None:
    meter = Meter(60, None)
    start = time.monotonic()
    assert meter.take(1, start) == 0.0
    meter.charge(99)
    # 40 instances were lent, and one comes back each second.
    assert meter.take(1, start + 1) == pytest.approx(40.0, abs=0.1)
    assert meter.take(1, start + 41.5) == 0.0
    assert meter.take(1, start + 1e6) == 0.0
    assert math.isclose(meter.take(1, start + 1e6), 0.0)


def test_requests_under_way_are_bounded_per_key() -> None:
    access = Access("k", frozenset(Scope), meter=Meter(None, 2))
    access.enter()
    access.enter()
    with pytest.raises(KeyLimitError, match="2 requests under way"):
        access.enter()
    access.leave()
    access.enter()

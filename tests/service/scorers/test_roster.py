"""Connections to scorers: one per entry, closed when no run asks any more, and a place for what cannot be asked."""

from __future__ import annotations

from typing import Any

import pytest

from service.pool import PoolFile
from service.scorers.absent import AbsentScorer
from service.scorers.roster import Roster
from service.settings import Settings
from service.specification import entry_fields
from tests.service.scorers.worker_servers import ScriptedWorker, Serve

ENTRY = {"name": "rm", "kind": "rm", "urls": ["http://127.0.0.1:9"], "price": 2.0}


def roster(*models: dict[str, Any]) -> Roster:
    pool = PoolFile.model_validate({"models": models or [ENTRY]})
    return Roster(Settings(), pool, grace_seconds=10.0)


def test_one_entry_is_one_connection_whatever_it_costs() -> None:
    subject = roster()
    one = subject.scorer(ENTRY, {})
    assert subject.scorer({**ENTRY, "price": 7.0}, {}) is one
    assert subject.scorer({**ENTRY, "timeout_seconds": 3.0}, {}) is not one


def test_addresses_and_keys_are_the_gateways_own_unless_the_run_says_later() -> None:
    subject = roster({**ENTRY, "api_key": "SECRET"})
    assert "SECRET" not in str(
        entry_fields(PoolFile.model_validate({"models": [{**ENTRY, "api_key": "SECRET"}]}).models[0])
    )
    moved = {**ENTRY, "urls": ["http://127.0.0.1:10"]}
    urls = [replica.url for replica in subject.scorer(moved, {}).status().replicas]
    assert urls == ["http://127.0.0.1:9"]
    later = subject.scorer(moved, {}, changed_ms=1 << 60)
    assert [replica.url for replica in later.status().replicas] == ["http://127.0.0.1:10"]


def test_a_scorer_without_its_key_is_away_and_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NO_SUCH_KEY", raising=False)
    found = roster().scorer(
        {"name": "far", "kind": "http", "urls": ["http://127.0.0.1:9"], "api_key_env": "NO_SUCH_KEY"}, {}
    )
    assert isinstance(found, AbsentScorer)
    assert not found.available
    assert "NO_SUCH_KEY" in str(found.status().replicas[0].problem)


async def test_what_nobody_asks_is_closed_after_a_while(serve: Serve) -> None:
    subject, worker = roster(), {**ENTRY, "name": "other", "urls": [serve(ScriptedWorker("other"))]}
    kept, leaving = subject.scorer(ENTRY, {}), subject.scorer(worker, {})
    await subject.begin([leaving])
    assert leaving.available
    await subject.let_go([kept], 100.0)
    await subject.let_go([kept, leaving], 105.0)
    await subject.let_go([kept], 106.0)
    await subject.let_go([kept], 115.0)
    assert leaving in subject.scorers
    await subject.let_go([kept], 116.0)
    assert [*subject.scorers] == [kept]
    await subject.close()

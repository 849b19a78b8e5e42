"""A run's log in a file: complete, exact, resumable, and never half written."""

from __future__ import annotations

import os
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np
import pytest

from router_core.feedback import LOSS_WARM_UP
from router_core.records import Event
from service.errors import ConfigurationError, NotFoundError, StoreUnavailableError
from service.lab.eventlog import export as exporting
from service.lab.eventlog.export import Exported, export_log, read_events, read_header
from service.lab.eventlog.load import EventLog, fold_events, load_log, logged_data, sequence_log
from service.lab.eventlog.record import LoggedEvent
from service.stores.redis import RedisStore
from service.usecases.decisions import event_from
from tests.support.gateway import Gateway, fresh_run, open_gateway, pair, until
from tests.support.story import gone

if TYPE_CHECKING:
    from tests.conftest import ValkeyProcess

pytest.importorskip("pyarrow", reason="needs reward-router[export]")


@pytest.fixture
async def gateway(valkey_server: ValkeyProcess) -> AsyncIterator[Gateway]:
    """Three RMs, signal `preference`."""
    async with open_gateway(valkey_server.url) as opened:
        yield opened


@pytest.fixture
async def store(valkey_server: ValkeyProcess) -> AsyncIterator[RedisStore]:
    """The gateway's store, as the command opens it."""
    opened = RedisStore(valkey_server.url, window_seconds=60)
    yield opened
    await opened.close()


async def teach(gateway: Gateway, count: int, **more: Any) -> list[str]:
    """So many decisions with feedback, alternately for either response; their ids."""
    ids = []
    for index in range(count):
        reply = await gateway.client.ok("/reward", {**pair(index), **more})
        await gateway.client.ok("/feedback", {"decision_id": reply["decision_id"], "preferred": index % 2})
        ids.append(reply["decision_id"])
    return ids


def as_event(row: LoggedEvent) -> Event:
    """The event that the row stands for."""
    return event_from(row.decision_id, row.decision, row.told)


@pytest.mark.parametrize("name", ["log.parquet", "log.jsonl"])
async def test_a_file_holds_every_event_exactly(
    gateway: Gateway, store: RedisStore, tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(exporting, "CHUNK", 3)
    await teach(gateway, 6)
    await teach(gateway, 2, policy="single:rm-b")
    await teach(gateway, 2, policy="majority")
    gateway.arm("rm-a").available = False
    await teach(gateway, 4, policy="random")
    seen = []
    done = await export_log(store, gateway.run, tmp_path / name, on_events=seen.append)
    rows = list(read_events(tmp_path / name))
    assert [as_event(row) for row in rows] == gateway.events()
    assert (done.events, done.added, done.last_event, sum(seen)) == (14, 14, rows[-1].event_id, 14)
    assert rows[6].decision.means == [-np.inf, 0.0, -np.inf]
    assert [row.reward for row in rows[8:10]] == [None, None]
    assert {row.decision.policy for row in rows} == {"bayesian", "single:rm-b", "majority", "random"}
    assert any(gone(row.decision) == [0] for row in rows[10:])
    assert all(
        row.reward == float(row.decision.verdict == row.feedback.value) for row in rows if row.reward is not None
    )
    header = read_header(tmp_path / name)
    assert (header.run, header.pool, header.d) == (gateway.run, ("rm-a", "rm-b", "rm-c"), 8)
    assert (header.first_position, header.exact_rewards) == (0, True)


async def test_both_formats_hold_the_same_and_parquet_can_be_read_by_others(
    gateway: Gateway, store: RedisStore, tmp_path: Path
) -> None:
    import pyarrow.parquet as pq

    await teach(gateway, 5)
    for name in ("log.parquet", "log.jsonl"):
        await export_log(store, gateway.run, tmp_path / name)
    rows = list(read_events(tmp_path / "log.parquet"))
    assert rows == list(read_events(tmp_path / "log.jsonl"))
    table = pq.read_table(tmp_path / "log.parquet").to_pydict()
    assert table["model"] == [f"rm-{'abc'[arm]}" for arm in table["arm"]]
    assert table["x"][0] == np.frombuffer(rows[0].decision.x, "<f4").tolist()
    assert set(table["run"]) == {gateway.run}
    lines = (tmp_path / "log.jsonl").read_bytes().splitlines()
    assert {name for name in table} == set(msgspec.json.decode(lines[1]))  # noqa: C416


async def test_the_rewards_are_what_the_fold_learned_from_losses(
    valkey_server: ValkeyProcess, store: RedisStore, tmp_path: Path
) -> None:
    rng = np.random.default_rng(0)
    async with open_gateway(valkey_server.url, signal="loss") as gateway:
        for index in range(40):
            reply = await gateway.client.ok("/reward", {**pair(index), "policy": "random"})
            loss = {"decision_id": reply["decision_id"], "loss": float(rng.gamma(2.0))}
            await gateway.client.ok("/feedback", loss)
        await export_log(store, gateway.run, tmp_path / "log.parquet")
        rows = list(read_events(tmp_path / "log.parquet"))
        learned = gateway.folded().statistics
        sums = [sum(r.reward for r in rows if r.decision.arm == k and r.reward is not None) for k in range(3)]
        assert sums == pytest.approx(learned.reward_sum.tolist())
        warming = sum(min(int(count), LOSS_WARM_UP) for count in learned.count)
        assert sum(row.reward is None for row in rows) == 40 - learned.reward_count.sum() == warming > 0
        # What came before `since` still scales what comes after it.
        await export_log(store, gateway.run, tmp_path / "end.parquet", since=rows[29].event_id)
        assert list(read_events(tmp_path / "end.parquet")) == rows[30:]
        await store.trim_log(gateway.run, rows[10].event_id)
        await export_log(store, gateway.run, tmp_path / "trimmed.parquet")
        trimmed = list(read_events(tmp_path / "trimmed.parquet"))
        assert [row.event_id for row in trimmed] == [row.event_id for row in rows[10:]]
        assert {row.reward for row in trimmed} == {None}
        assert not read_header(tmp_path / "trimmed.parquet").exact_rewards
        # A file that was begun before the log was trimmed knows the beginning.
        await export_log(store, gateway.run, tmp_path / "log.parquet", resume=True)
        assert list(read_events(tmp_path / "log.parquet")) == rows


@pytest.mark.parametrize("name", ["log.parquet", "log.jsonl"])
async def test_a_resumed_file_equals_a_fresh_one(
    gateway: Gateway, store: RedisStore, tmp_path: Path, name: str
) -> None:
    out = tmp_path / name
    assert (await export_log(store, gateway.run, out, resume=True)).events == 0
    assert list(read_events(out)) == []
    for count in (3, 0, 4):
        await teach(gateway, count)
        done: Exported = await export_log(store, gateway.run, out, resume=True)
        assert done.added == count
    await export_log(store, gateway.run, tmp_path / f"fresh-{name}")
    assert list(read_events(out)) == list(read_events(tmp_path / f"fresh-{name}"))
    last = list(read_events(out))[2].event_id
    await export_log(store, gateway.run, out, since=last)
    assert list(read_events(out)) == list(read_events(tmp_path / f"fresh-{name}"))[3:]
    assert read_header(out).first_position is None


async def test_a_hole_in_the_log_is_an_error_and_never_a_file(
    gateway: Gateway, store: RedisStore, tmp_path: Path
) -> None:
    out = tmp_path / "log.parquet"
    await teach(gateway, 2)
    await export_log(store, gateway.run, out)
    before = out.read_bytes()
    await teach(gateway, 4)
    rows = gateway.events()
    await export_log(store, gateway.run, tmp_path / "all.jsonl")
    ids = [row.event_id for row in read_events(tmp_path / "all.jsonl")]
    await store.trim_log(gateway.run, ids[4])
    with pytest.raises(ConfigurationError, match=r"2 events of run .* were trimmed before they could be read"):
        await export_log(store, gateway.run, out, resume=True)
    assert out.read_bytes() == before
    assert sorted(os.listdir(tmp_path)) == ["all.jsonl", "log.parquet"]
    fresh = await export_log(store, gateway.run, out)
    assert (fresh.events, fresh.header.first_position) == (2, 4)
    assert [as_event(row) for row in read_events(out)] == rows[4:]


async def test_a_store_that_fails_in_the_middle_leaves_the_old_file(
    gateway: Gateway, store: RedisStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(exporting, "CHUNK", 2)
    out = tmp_path / "log.jsonl"
    await teach(gateway, 6)
    out.write_text("old")
    read = store.read_log

    async def failing(run: str, after: str, **more: Any) -> Any:
        if after != "0-0":
            raise StoreUnavailableError("gone")
        return await read(run, after, **more)

    monkeypatch.setattr(store, "read_log", failing)
    with pytest.raises(StoreUnavailableError):
        await export_log(store, gateway.run, out)
    assert os.listdir(tmp_path) == ["log.jsonl"]
    assert out.read_text() == "old"


async def test_what_cannot_be_exported_is_said(gateway: Gateway, store: RedisStore, tmp_path: Path) -> None:
    unknown = fresh_run("nobody")
    with pytest.raises(NotFoundError, match=r"is unknown in this store .*: check the name, --store and --data-dir"):
        await export_log(store, unknown, tmp_path / "log.parquet")
    assert not await store.has_run(unknown)
    with pytest.raises(ConfigurationError, match="event id is 'yesterday'"):
        await export_log(store, gateway.run, tmp_path / "log.parquet", since="yesterday")
    other = fresh_run("other")
    await gateway.client.ok("/reward", {**pair(), "run": other})
    await export_log(store, other, tmp_path / "log.parquet")
    with pytest.raises(ConfigurationError, match=r"holds run .* export to another file"):
        await export_log(store, gateway.run, tmp_path / "log.parquet", resume=True)
    for name in ("text.jsonl", "text.parquet"):
        (tmp_path / name).write_text('{"no": "log"}\n')
        with pytest.raises(ConfigurationError, match=r"is no event log|cannot be read as Parquet"):
            load_log(tmp_path / name)
    with pytest.raises(ConfigurationError, match="does not exist: write it with"):
        load_log(tmp_path / "nothing.parquet")


async def test_without_pyarrow_parquet_is_refused_and_json_lines_are_not(
    gateway: Gateway, store: RedisStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    await export_log(store, gateway.run, tmp_path / "log.parquet")
    monkeypatch.setitem(sys.modules, "service.lab.eventlog.parquet", None)
    with pytest.raises(ConfigurationError, match=r"pip install 'reward-router\[export\]'"):
        await export_log(store, gateway.run, tmp_path / "other.parquet")
    with pytest.raises(ConfigurationError, match="Parquet needs pyarrow"):
        load_log(tmp_path / "log.parquet")
    await export_log(store, gateway.run, tmp_path / "log.jsonl")
    assert sorted(os.listdir(tmp_path)) == ["log.jsonl", "log.parquet"]


async def test_arrays_restrict_propensities_to_the_arms_that_could_answer(
    gateway: Gateway, store: RedisStore, tmp_path: Path
) -> None:
    await teach(gateway, 3)
    await teach(gateway, 1, policy="majority")
    gateway.arm("rm-c").available = False
    await teach(gateway, 8)
    log = await exported(gateway, store, tmp_path)
    data = logged_data(log)
    assert len(data) == 11
    assert log.usable.tolist() == [True] * 3 + [False] + [True] * 8
    assert data.available[:3].all()
    assert data.available[3:].tolist() == [[True, True, False]] * 8
    assert (data.propensities[3:, 2] == 0).all()
    assert data.propensities.sum(axis=1) == pytest.approx(np.ones(11))
    asked = [event.decision.propensity for event, usable in zip(log.events, log.usable, strict=True) if usable]
    assert data.propensities[np.arange(11), data.arm] == pytest.approx(asked)
    assert fold_events(log) == gateway.events()


async def test_shadowed_verdicts_are_rewards_of_the_other_arms(
    valkey_server: ValkeyProcess, store: RedisStore, tmp_path: Path
) -> None:
    async with open_gateway(valkey_server.url, shadow_rate=1.0) as gateway:
        gateway.arm("rm-b").score_of = lambda _, response: -float(len(response))
        ids = [(await gateway.client.ok("/reward", pair(index)))["decision_id"] for index in range(4)]
        for decision_id in ids:
            await shadowed(gateway, decision_id)
            await gateway.client.ok("/feedback", {"decision_id": decision_id, "preferred": 1})
        log = await exported(gateway, store, tmp_path)
    assert [as_event(row) for row in log.events] == gateway.events()
    data = logged_data(log)
    assert data.rewards.tolist() == [[1.0, 0.0, 1.0]] * 4
    assert data.propensities == pytest.approx(np.ones((4, 3)))
    await export_log(store, gateway.run, tmp_path / "log.jsonl")
    assert tuple(read_events(tmp_path / "log.jsonl")) == log.events


@pytest.mark.parametrize("name", ["log.parquet", "log.jsonl"])
async def test_audits_and_gold_of_one_decision_are_rows_and_count_once(
    valkey_server: ValkeyProcess, store: RedisStore, tmp_path: Path, name: str
) -> None:
    audit = {"referee": "rm-c", "rate": 1.0, "schedule": "even"}
    async with open_gateway(valkey_server.url, audit=audit) as gateway:
        gateway.arm("rm-b").score_of = lambda _, response: -float(len(response))
        first = await gateway.client.ok("/reward", {**pair(0), "policy": "single:rm-a"})
        await gateway.learned(1)
        await gateway.client.ok("/reward", {**pair(1), "policy": "single:rm-a"})
        await gateway.learned(2)
        await gateway.client.ok("/feedback", {"decision_id": first["decision_id"], "preferred": 0})
        await gateway.learned(3)
    await export_log(store, gateway.run, tmp_path / name)
    log = load_log(tmp_path / name)
    assert [(row.source, row.decision.inclusion) for row in log.events] == [
        ("audit", 1.0),
        ("audit", 1.0),
        ("trainer", 1.0),
    ]
    assert [row.decision.audit.referee for row in log.events if row.decision.audit is not None] == ["rm-c"] * 3
    assert fold_events(log) == gateway.events()
    assert log.usable.tolist() == [False, True, True], "gold stands for the decision that has both"
    data = logged_data(log)
    assert data.rewards.tolist() == [[1.0, 0.0, 1.0], [0.0, 1.0, 0.0]]
    assert len(sequence_log(log)[1]) == 2


async def test_who_read_a_part_tells_no_sequence(
    valkey_server: ValkeyProcess, store: RedisStore, tmp_path: Path
) -> None:
    async with open_gateway(valkey_server.url) as gateway:
        gateway.arm("rm-a").too_long = lambda response: len(response) > 20
        for count, longest in enumerate((10, 40), 1):
            item = {"prompt": "p", "responses": ["a", "b" * longest, "ccc"], "policy": "single:rm-a"}
            reply = await gateway.client.ok("/reward", item)
            await gateway.client.ok("/feedback", {"decision_id": reply["decision_id"], "preferred": 2})
            await gateway.learned(count)
        log = await exported(gateway, store, tmp_path)
    assert sequence_log(log)[1].tolist() == [0]


async def exported(gateway: Gateway, store: RedisStore, tmp_path: Path) -> EventLog:
    """The gateway's log by way of a Parquet file."""
    await export_log(store, gateway.run, tmp_path / "log.parquet")
    return load_log(tmp_path / "log.parquet")


async def shadowed(gateway: Gateway, decision_id: str) -> None:
    """Wait until the stored decision holds what the other RMs said."""
    await until(lambda: len(gateway.decision(decision_id).shadows or []) == 2, "shadow verdicts")

"""What every store must do with operators' acts and whole runs: keep them in the log, write a run, drop it."""

from __future__ import annotations

import pytest

from service.errors import ConflictError, NotReadyError
from service.stores.protocol import LogEntry, LogStatus, RunIdentity, Store
from tests.contract.test_store_contract import AWKWARD, whole_log


async def test_an_act_is_in_the_log_and_in_the_acts(store: Store, run: str) -> None:
    identity = await store.open_run(run, b"f")
    event_id = await store.append_act(run, "change-1", AWKWARD, b"admin:pool", identity=identity, expected=0)
    assert event_id is not None
    entry = LogEntry(event_id, "change-1", AWKWARD, b"admin:pool")
    assert await whole_log(store, run) == [entry]
    assert await store.acts(run) == [entry]
    await store.trim_log(run, f"{int(event_id.partition('-')[0]) + 1}-0")
    assert await whole_log(store, run) == []
    assert await store.acts(run) == [entry]


async def test_of_two_who_have_seen_the_same_acts_one_is_refused(store: Store, run: str) -> None:
    identity = await store.open_run(run, b"f")
    assert await store.append_act(run, "a", b"1", b"v", identity=identity, expected=0) is not None
    assert await store.append_act(run, "b", b"2", b"v", identity=identity, expected=0) is None
    assert await store.append_act(run, "c", b"3", b"v", identity=identity) is not None
    assert [entry.decision_id for entry in await whole_log(store, run)] == ["a", "c"]


async def test_no_act_on_a_lost_run(store: Store, run: str) -> None:
    await store.open_run(run, b"f")
    with pytest.raises(NotReadyError, match="lost"):
        await store.append_act(run, "a", b"", b"v", identity=RunIdentity("other", b"f"))


async def test_a_run_that_is_written_is_as_it_was(store: Store, run: str) -> None:
    entries = [LogEntry(f"{5 + i}-0", f"d{i}", AWKWARD, b"v%d" % i) for i in range(3)]
    await store.write_entries(run, entries)
    await store.write_entries(run, entries[:1], acts=True)
    status = LogStatus(10, "7-0", 7)
    await store.finish_run(run, b"print", status, (8, AWKWARD))
    assert await store.log_status(run) == status
    assert await whole_log(store, run) == entries
    assert await store.acts(run) == entries[:1]
    assert await store.load_snapshot(run) == AWKWARD
    assert (await store.open_run(run, b"other")).fingerprint == b"print"
    with pytest.raises(ConflictError):
        await store.finish_run(run, b"print", status, None)
    assert run in await store.list_runs()


async def test_a_dropped_run_is_gone_and_its_name_is_free(store: Store, run: str) -> None:
    identity = await store.open_run(run, b"f")
    await store.append_act(run, "a", b"", b"v", identity=identity)
    other = f"{run}x"
    await store.open_run(other, b"f")
    await store.drop_run(run)
    assert not await store.has_run(run)
    assert await store.acts(run) == []
    assert (await store.log_status(run)).appended == 0
    assert await store.has_run(other)
    assert run not in await store.list_runs()


async def test_notes_outlive_their_runs(store: Store, run: str) -> None:
    await store.note(run, AWKWARD, b"admin:delete")
    assert [(note.payload, note.value) for note in await store.notes() if note.decision_id == run] == [
        (AWKWARD, b"admin:delete")
    ]

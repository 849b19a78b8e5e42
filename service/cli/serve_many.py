"""`reward-router serve --workers N`: several gateway processes at one port. Called by `service.cli.serve`.

Each process is a replica like those on other machines: it tails the logs, and has a posterior of its own. The kernel
divides connections among their listening sockets (SO_REUSEPORT), so that a process that ends takes only its own
connections along. This one serves nothing: it holds the port, owns the embedded store, and starts again what leaves or
hangs. A process says once a second, from its event loop, that it lives (`service.cli.serve_one`), through the socket
that its settings came by.
"""

from __future__ import annotations

import logging
import os
import pickle
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Final

from prometheus_client.multiprocess import mark_process_dead

from service.children import dies_with_parent
from service.cli.supervise import FIRST_PAUSE_SECONDS, LONGEST_PAUSE_SECONDS
from service.errors import ConfigurationError
from service.settings import EMBEDDED, Settings, store_directory
from service.stores.embedded import EmbeddedStore

LOOK_SECONDS: Final = 0.1
"""Pause between two looks at the processes."""

STEADY_SECONDS: Final = 60.0
"""A process that has lived this long is started again at once when it leaves."""

DRAIN_SECONDS: Final = 10.0
"""What a process may take to end, besides answering what it has taken."""

START_SECONDS: Final = 600.0
"""What a process may take until it serves: it loads a checkpoint and an encoder."""

HOPELESS: Final = frozenset({2, 3})
"""Statuses of a process that could not start: a configuration that does not fit, or uvicorn's own."""

logger = logging.getLogger(__name__)


@dataclass(slots=True)
class _Seat:
    """One of the N processes.

    Attributes:
        process: its present life; None while it pauses.
        since: when it was started last.
        beats: where it says that it lives; None while it pauses.
        silent: seconds since it last said so, or was started, as far as this process was awake to hear it.
        served: it has said so at least once.
        failures: how often it has left since it was steady.
    """

    process: subprocess.Popen[bytes] | None
    since: float
    beats: socket.socket | None
    silent: float = 0.0
    served: bool = False
    failures: int = 0

    def listen(self, seconds: float) -> None:
        """Note if it has said that it lives.

        Args:
            seconds: since the last look.
        """
        self.silent += seconds
        with suppress(BlockingIOError, ConnectionError):
            if self.beats is not None and self.beats.recv(4096):
                self.silent, self.served = 0.0, True

    def begin(self, process: subprocess.Popen[bytes], beats: socket.socket, now: float) -> None:
        """Take a new process."""
        self.process, self.beats, self.since, self.silent, self.served = process, beats, now, 0.0, False

    def pause(self, now: float) -> None:
        """Note that its process has left."""
        if self.beats is not None:
            self.beats.close()
        self.process, self.beats, self.since = None, None, now


def serve_many(settings: Settings) -> int:
    """Serve with `settings.workers` processes until a signal, and return the exit status.

    Raises:
        ConfigurationError: the address is taken or not ours, or the embedded store does not start.
    """
    with ExitStack() as stack:
        port = hold_port(stack, settings.host, settings.port)
        changed: dict[str, object] = {"port": port}
        if settings.store_url == EMBEDDED:
            # One owner; the processes are its only callers, so that a new run's name is free at once.
            store = EmbeddedStore(store_directory(settings.data_dir), fsync=settings.store_fsync)
            changed |= {"store_url": stack.enter_context(store).url, "new_run_wait_seconds": 0.0}
        metrics = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="reward-router-metrics-")))
        stop = stack.enter_context(_signals())
        return _Crew(settings.model_copy(update=changed), metrics, stop).run()


def hold_port(stack: ExitStack, host: str, port: int) -> int:
    """Reserve an address for our processes while the stack is open, and return its port.

    Raises:
        ConfigurationError: another program listens there, or the address is not this machine's.
    """
    for family, address in _addresses(host, port):
        held = stack.enter_context(socket.socket(family, socket.SOCK_STREAM))
        try:
            # Without sharing first: with it, another gateway of ours would be joined, not noticed.
            with socket.socket(family, socket.SOCK_STREAM) as alone:
                alone.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                alone.bind(address)
                alone.listen()
                address = alone.getsockname()
            _share(held, address)
        except OSError as error:
            raise ConfigurationError(
                f"cannot listen on {host}:{port}: {error.strerror}; choose another host or port"
            ) from error
        port = held.getsockname()[1]
    return port


def listen(host: str, port: int) -> list[socket.socket]:
    """Return sockets of this process at an address that `hold_port` has reserved, not listening yet."""
    sockets = []
    for family, address in _addresses(host, port):
        shared = socket.socket(family, socket.SOCK_STREAM)
        _share(shared, address)
        sockets.append(shared)
    return sockets


def _share(sharing: socket.socket, address: tuple[object, ...]) -> None:
    """Bind a socket that others of ours may bind beside it."""
    # The first for connections that have just ended, the second for the others of ours.
    sharing.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    sharing.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    sharing.bind(address)


def _addresses(host: str, port: int) -> Iterator[tuple[int, tuple[object, ...]]]:
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except OSError as error:
        raise ConfigurationError(f"host {host!r} has no address: {error.strerror}; use 127.0.0.1 or 0.0.0.0") from error
    # A free port is chosen once: the first address decides.
    for family, _, _, _, address in found if port else found[:1]:
        yield family, address


@contextmanager
def _signals() -> Iterator[threading.Event]:
    """Set an event at SIGINT or SIGTERM."""
    stop = threading.Event()

    def ask(number: int, frame: FrameType | None) -> None:
        stop.set()

    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class _Crew:
    """The processes.

    Args:
        settings: theirs.
        metrics: folder of the files in which they add up their metrics.
        stop: ends all.
    """

    def __init__(self, settings: Settings, metrics: Path, stop: threading.Event) -> None:
        self._settings = settings
        self._metrics = metrics
        self._stop = stop

    def run(self) -> int:
        """Start them, start again those that leave or hang, end them; return the exit status."""
        seats = [_Seat(None, time.monotonic(), None) for _ in range(self._settings.workers)]
        for seat in seats:
            seat.begin(*self._start(), time.monotonic())
        status, looked = 0, time.monotonic()
        try:
            while not status and not self._stop.wait(LOOK_SECONDS):
                before, looked = looked, time.monotonic()
                # Where all of us were stopped, by a debugger or a container's pause, nobody was silent meanwhile.
                for seat in seats:
                    seat.listen(min(looked - before, 10 * LOOK_SECONDS))
                status = next(filter(None, map(self._look, seats)), 0)
        finally:
            self._end([seat.process for seat in seats if seat.process is not None])
        return status

    def _start(self) -> tuple[subprocess.Popen[bytes], socket.socket]:
        ours, theirs = socket.socketpair()
        with theirs:
            process = subprocess.Popen(
                dies_with_parent([sys.executable, "-m", "service.cli.serve_one"]),
                stdin=theirs.fileno(),
                env={**os.environ, "PROMETHEUS_MULTIPROC_DIR": str(self._metrics)},
                # Ctrl-C is for us, who end them in order.
                start_new_session=True,
            )
        with suppress(ConnectionError):  # it has left already, and said why
            # Not in arguments or the environment, where others could read the keys.
            ours.sendall(pickle.dumps(self._settings))
            ours.shutdown(socket.SHUT_WR)
        ours.setblocking(False)
        return process, ours

    def _look(self, seat: _Seat) -> int:
        """Start again who has left and has paused; return the status with which all must end, 0 to go on."""
        now = time.monotonic()
        if seat.process is None:
            if now >= seat.since + self._pause(seat):
                seat.begin(*self._start(), now)
            return 0
        left = seat.process.poll()
        if left is None:
            self._end_silence(seat)
            return 0
        mark_process_dead(seat.process.pid, str(self._metrics))  # type: ignore[no-untyped-call]
        if left in HOPELESS:
            return left
        lived = now - seat.since
        seat.failures = 0 if lived >= STEADY_SECONDS else seat.failures + 1
        seat.pause(now)
        fields = {"status": left, "lived_seconds": round(lived, 1), "started_again_in_seconds": self._pause(seat)}
        logger.error("gateway process left", extra={"fields": fields})
        return 0

    def _end_silence(self, seat: _Seat) -> None:
        """Kill a process that hangs; the next look starts it again."""
        allowed = self._settings.hang_seconds if seat.served else START_SECONDS
        if seat.process is not None and seat.silent > allowed:
            seat.process.kill()
            seat.process.wait()
            fields = {"pid": seat.process.pid, "silent_seconds": round(seat.silent, 1), "served": seat.served}
            logger.error("gateway process hangs, was killed", extra={"fields": fields})

    def _pause(self, seat: _Seat) -> float:
        """Seconds before a process is started again: none for the first failure, then ever more."""
        if seat.failures <= 1:
            return 0.0
        return min(FIRST_PAUSE_SECONDS * 2.0 ** (seat.failures - 2), LONGEST_PAUSE_SECONDS)

    def _end(self, processes: Sequence[subprocess.Popen[bytes]]) -> None:
        """Let them answer what they have taken, and kill those that take too long."""
        for process in processes:
            process.send_signal(signal.SIGTERM)
        until = time.monotonic() + self._settings.request_timeout_seconds + 1 + DRAIN_SECONDS
        for process in processes:
            try:
                process.wait(max(until - time.monotonic(), 0.1))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()

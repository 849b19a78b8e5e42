"""Child processes of `up` and `demo`: started together, watched, and ended together."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

from service.children import dies_with_parent
from service.errors import ConfigurationError

STOP_SECONDS = 15.0
"""How long children may drain after SIGTERM before they are killed."""

USUAL_PORT = 8080
"""Port of a gateway where none is given."""

MAX_PORT = 65535
"""The last port that TCP has."""

_OPENER = urllib.request.build_opener(urllib.request.ProxyHandler({}))
"""Asks our own children, for whom no proxy of the environment is meant."""

LAST_LINES = 15
"""Lines of a failed child's log that are shown."""

LAST_BYTES = 256 * 1024
"""Bytes at the end of a log that are looked at for them."""

_ERROR = re.compile(r"(?:^|[\s.])[A-Za-z]\w*(?:Error|Exception): \S")
"""A line that names an exception; in vLLM's logs the first one is the cause and the last one only says "see above"."""

_NO_ERROR = re.compile(r"\b(?:WARNING|INFO|DEBUG)\b")


@dataclass(slots=True)
class Child:
    """One child process and its log.

    Attributes:
        name: for people; also the log's.
        command: an absolute path and its arguments.
        environment: added to ours.
        log: where its output goes; each start adds to what is there.
        process: its present life.
        gpus: the GPUs on which no other child may be starting while this one is.
        health: URL that answers 200 when it has started; None where nobody asks.
    """

    name: str
    command: tuple[str, ...]
    environment: Mapping[str, str]
    log: Path
    process: subprocess.Popen[bytes]
    gpus: tuple[int, ...] = ()
    health: str | None = None

    @classmethod
    def start(cls, name: str, command: Sequence[str], environment: Mapping[str, str], log: Path) -> Self:
        """Start it with an empty log."""
        log.write_bytes(b"")
        return cls(name, tuple(command), environment, log, _popen(command, environment, log))

    def start_again(self) -> None:
        """Another life after the process has left: the same command, the same log."""
        self.end_session()
        self.process.wait()
        self.process = _popen(self.command, self.environment, self.log)

    def end_session(self) -> None:
        """Kill what is left of its session, itself included.

        vLLM's engine is a process of its own, and may outlive a server that died or was ended while it started.
        """
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)

    def last_words(self) -> str:
        """The end of its log, after the first line that names an exception if that is further up."""
        lines = self._tail()
        shown = lines[-LAST_LINES:]
        cause = next((line for line in lines if _ERROR.search(line) and not _NO_ERROR.search(line)), None)
        if cause is not None and cause not in shown:
            shown = [f"first error: {cause.strip()}", "…", *shown]
        return "\n".join(shown)

    def last_line(self) -> str:
        """The last line of its log that is not empty, without colours; "" while there is none."""
        return next((line for line in map(_plain, reversed(self._tail())) if line), "")

    def _tail(self) -> list[str]:
        with self.log.open("rb") as file:
            file.seek(max(file.seek(0, os.SEEK_END) - LAST_BYTES, 0))
            return file.read().decode("utf-8", "replace").splitlines()


class ProcessGroup:
    """Children that end with this process; a context manager.

    Args:
        log_dir: where each child's output goes, one file a child.
    """

    def __init__(self, log_dir: Path) -> None:
        self._log_dir = log_dir
        self.children: list[Child] = []

    def __enter__(self) -> Self:
        self._log_dir.mkdir(parents=True, exist_ok=True)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def start(self, name: str, arguments: Sequence[str], environment: Mapping[str, str] | None = None) -> Child:
        """Start `reward-router ARGUMENTS` as a child; see `run`."""
        return self.run(name, [sys.executable, "-m", "service.cli", *arguments], environment)

    def run(self, name: str, command: Sequence[str], environment: Mapping[str, str] | None = None) -> Child:
        """Start a program as a child.

        Args:
            name: of its log, too.
            command: an absolute path and its arguments.
            environment: added to ours.
        """
        child = Child.start(name, command, environment or {}, self._log_dir / f"{name}.log")
        self.children.append(child)
        return child

    def check(self, without: Collection[Child] = ()) -> None:
        """Return while every child runs.

        Args:
            without: children that may leave.

        Raises:
            ConfigurationError: one has left; with the end of its log.
        """
        for child in self.children:
            status = child.process.poll()
            if status is not None and child not in without:
                raise ConfigurationError(
                    f"{child.name} left with status {status}; the end of {child.log}:\n{child.last_words()}"
                )

    def wait_until_ready(self, url: str, name: str, timeout_seconds: float, tick: Callable[[], None]) -> None:
        """Wait until GET url answers 200, while every child runs.

        Raises:
            ConfigurationError: a child left, or the time is over.
        """
        deadline = time.monotonic() + timeout_seconds
        last = "no answer"
        while time.monotonic() < deadline:
            self.check()
            try:
                with _OPENER.open(url, timeout=2) as response:
                    if response.status == 200:
                        return
            except urllib.error.HTTPError as error:
                body = error.read().decode("utf-8", "replace")
                _raise_if_final(body)
                last = f"status {error.code}: {body[:300]}"
            except (OSError, http.client.HTTPException) as error:
                last = str(error)
            tick()
            time.sleep(0.1)
        child = next(child for child in self.children if child.name == name)
        raise ConfigurationError(self.too_late(child, timeout_seconds, last))

    def too_late(self, child: Child, seconds: float, answer: str) -> str:
        """The message on a child that is not ready in time.

        Args:
            child: which.
            seconds: that it had.
            answer: what it said when asked.
        """
        return (
            f"{child.name} is not ready after {seconds:g} s ({answer}); the end of {child.log}:\n{child.last_words()}"
        )

    def stop(self) -> None:
        """End all children, the last started first; what does not drain in time is killed."""
        for child in reversed(self.children):
            if child.process.poll() is None:
                child.process.send_signal(signal.SIGTERM)
        deadline = time.monotonic() + STOP_SECONDS
        for child in reversed(self.children):
            with contextlib.suppress(subprocess.TimeoutExpired):
                child.process.wait(max(deadline - time.monotonic(), 0.1))
            child.end_session()
            child.process.wait()


def _popen(command: Sequence[str], environment: Mapping[str, str], log: Path) -> subprocess.Popen[bytes]:
    """The command in a process session of its own, so that Ctrl-C reaches only us; it ends with us."""
    with log.open("ab") as output:
        return subprocess.Popen(
            dies_with_parent(command),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env={**os.environ, **environment},
            start_new_session=True,
        )


def interruptible() -> None:
    """Let SIGINT and SIGTERM raise KeyboardInterrupt from now on, so that all that was started is ended.

    Also where we were started as a background job, for which shells have SIGINT ignored.
    """
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.default_int_handler)


def answers(url: str) -> bool:
    """Return True if GET url answers 200 within two seconds."""
    try:
        with _OPENER.open(url, timeout=2) as response:
            return bool(response.status == 200)
    except (OSError, http.client.HTTPException):
        # Also HTTPError; an answer that is not 200, or no HTTP, is "not yet".
        return False


def free_port(wanted: int, host: str = "127.0.0.1") -> int:
    """`wanted` if it is free, else any free port; 0 means any."""
    for port in (wanted, 0):
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((host, port))
            except OSError:
                continue
            return int(probe.getsockname()[1])
    raise ConfigurationError(f"no free port on {host}")


def gateway_port(given: int | None, host: str) -> tuple[int, str | None]:
    """Return the port that a gateway shall have, and a warning where it is not the usual one.

    Args:
        given: port that was asked for; 0 for any; None for the usual one, or another where that is taken.
        host: address that it will listen on.

    Raises:
        ConfigurationError: the given port is taken, or is none.
    """
    wanted = USUAL_PORT if given is None else given
    if not 0 <= wanted <= MAX_PORT:
        raise ConfigurationError(f"--port {given}: a port is a number from 0 (any) to {MAX_PORT}")
    port = free_port(wanted, host)
    if port == wanted or wanted == 0:
        return port, None
    if given is not None:
        raise ConfigurationError(
            f"--port {given}: something listens there already, perhaps an earlier gateway: end it, or give another port"
        )
    return port, f"port {wanted} is taken, perhaps by an earlier gateway: this one has port {port}"


def _plain(line: str) -> str:
    return re.sub(r"\x1b\[[0-9;]*m", "", line).strip()


def _raise_if_final(body: str) -> None:
    """Waiting does not help where the run's name is another pool's or checkpoint's: the answer says what changed."""
    try:
        error = json.loads(body)["error"]
        changed = error["details"].get("changed")
    except (ValueError, KeyError, TypeError, AttributeError):
        return
    if changed:
        raise ConfigurationError(f"{error['message']} (--run NAME)")

"""Child processes of `up` and `demo`: started together, watched, and ended together."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

from service.children import dies_with_parent
from service.errors import ConfigurationError

STOP_SECONDS = 15.0
"""How long children may drain after SIGTERM before they are killed."""

LAST_LINES = 15
"""Lines of a failed child's log that are shown."""


@dataclass(slots=True)
class Child:
    """One child process and its log."""

    name: str
    process: subprocess.Popen[bytes]
    log: Path

    def last_words(self) -> str:
        """The end of its log."""
        return "\n".join(self.log.read_text("utf-8", "replace").splitlines()[-LAST_LINES:])


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
        """Start `reward-router ARGUMENTS` as a child in a process session of its own, so that Ctrl-C reaches only
        us.
        """
        log = self._log_dir / f"{name}.log"
        with log.open("wb") as output:
            process = subprocess.Popen(
                dies_with_parent([sys.executable, "-m", "service.cli", *arguments]),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env={**os.environ, **(environment or {})},
                start_new_session=True,
            )
        child = Child(name, process, log)
        self.children.append(child)
        return child

    def check(self) -> None:
        """Return while every child runs.

        Raises:
            ConfigurationError: one has left; with the end of its log.
        """
        for child in self.children:
            status = child.process.poll()
            if status is not None:
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
                with urllib.request.urlopen(url, timeout=2) as response:
                    if response.status == 200:
                        return
            except urllib.error.HTTPError as error:
                body = error.read().decode("utf-8", "replace")
                _raise_if_final(body)
                last = f"status {error.code}: {body[:300]}"
            except OSError as error:
                last = str(error)
            tick()
            time.sleep(0.1)
        child = next(child for child in self.children if child.name == name)
        raise ConfigurationError(
            f"{name} is not ready after {timeout_seconds:g} s ({last}); the end of {child.log}:\n{child.last_words()}"
        )

    def stop(self) -> None:
        """End all children, the last started first; what does not drain in time is killed."""
        for child in reversed(self.children):
            if child.process.poll() is None:
                child.process.send_signal(signal.SIGTERM)
        deadline = time.monotonic() + STOP_SECONDS
        for child in reversed(self.children):
            try:
                child.process.wait(max(deadline - time.monotonic(), 0.1))
            except subprocess.TimeoutExpired:
                child.process.kill()
                child.process.wait()


def interruptible() -> None:
    """Let SIGINT and SIGTERM raise KeyboardInterrupt from now on, so that all that was started is ended.

    Also where we were started as a background job, for which shells have SIGINT ignored.
    """
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.default_int_handler)


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


def _raise_if_final(body: str) -> None:
    """Waiting does not help where the run's name is another pool's or checkpoint's: the answer lists what changed."""
    try:
        error = json.loads(body)["error"]
        changed = error["details"].get("changed")
    except (ValueError, KeyError, TypeError, AttributeError):
        return
    if changed:
        raise ConfigurationError(f"{error['message']} (--run NAME); changed: {', '.join(changed)}")

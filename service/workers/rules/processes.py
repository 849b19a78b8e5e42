"""Processes that run a rule: each answers one question at a time, and is killed when it takes too long.

`service.workers.rules.server` asks `RulePool`. The rule itself runs in `service.workers.rules.child`.
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import sys
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Final

import msgspec

from service.errors import ConfigurationError
from service.workers.rules.child import LENGTH, MEMORY, REWARD, Outcome, Question, Spec

START_SECONDS: Final = 60.0
"""How long a process may take to load its rule."""

SLOW: Final = "rule_timeout"
"""Code of a response on which the rule took longer than it may."""

CRASHED: Final = "rule_crashed"
"""Code of a response on which the rule's process ended."""

LATE: Final = "timeout"
"""Code of a response for which the request had no time left."""

KEPT_VARIABLES: Final = ("PATH", "LANG", "LC_ALL", "LC_CTYPE", "TMPDIR", "PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV")
"""Environment variables that a rule sees. Keys and passwords are in none of them."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class RuleConfig:
    """How a rule is run.

    Attributes:
        rule: `FILE.py:NAME` or the name of a built-in rule.
        options: of a built-in rule.
        processes: how many responses are scored at once.
        rule_seconds: longest time for one response.
        memory_mb: address space of one process, in MiB.
    """

    rule: str
    options: dict[str, object] = field(default_factory=dict)
    processes: int = 1
    rule_seconds: float = 5.0
    memory_mb: int = 1024


class RulePool:
    """Equal processes, each with the rule loaded. Not thread-safe; one event loop.

    Args:
        config: what they run, and their bounds.
    """

    def __init__(self, config: RuleConfig) -> None:
        self._config = config
        self._idle: asyncio.Queue[_Process] = asyncio.Queue()
        self._processes = [_Process(config) for _ in range(config.processes)]
        self._restarts: set[asyncio.Task[None]] = set()

    async def start(self) -> None:
        """Start every process.

        Raises:
            ConfigurationError: the rule cannot be loaded; the message says why.
        """
        try:
            for process in self._processes:
                await process.start()
                self._idle.put_nowait(process)
        except BaseException:
            await self.stop()
            raise

    async def ask(self, question: Question, until: float) -> Outcome:
        """Return what became of a question; never raises for what a rule does.

        A question on which the process ended is asked once more, of another one: its predecessor may have caused it.

        Args:
            question: one response.
            until: absolute `loop.time()` by which the outcome is of use.
        """
        outcome = await self._ask(question, until)
        return outcome if outcome.kind != CRASHED else await self._ask(question, until)

    async def _ask(self, question: Question, until: float) -> Outcome:
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout_at(until):
                process = await self._idle.get()
        except TimeoutError:
            return Outcome(LATE, message="no process was free before the request's time was over")
        well = False
        try:
            own = loop.time() + self._config.rule_seconds
            outcome = await process.ask(question, min(own, until))
            well = process.alive and outcome.kind not in (SLOW, CRASHED, MEMORY)
            if outcome.kind == SLOW and until < own:
                # The rule had less than its own time: nothing is known of the input.
                return Outcome(LATE, message="the request's time was over while the rule ran")
            return outcome
        finally:
            if well:
                self._idle.put_nowait(process)
            else:
                self._restart(process)

    async def stop(self) -> None:
        """End every process."""
        for task in self._restarts:
            task.cancel()
        await asyncio.gather(*self._restarts, return_exceptions=True)
        await asyncio.gather(*(process.kill() for process in self._processes))

    def _restart(self, process: _Process) -> None:
        async def again() -> None:
            await process.kill()
            with suppress(ConfigurationError):
                await process.start()
            self._idle.put_nowait(process)

        task = asyncio.get_running_loop().create_task(again())
        self._restarts.add(task)
        task.add_done_callback(self._restarts.discard)


class _Process:
    """One process; it may be dead."""

    def __init__(self, config: RuleConfig) -> None:
        self._config = config
        self._process: asyncio.subprocess.Process | None = None

    @property
    def alive(self) -> bool:
        return self._process is not None and self._process.returncode is None

    async def start(self) -> None:
        """Start it and wait until the rule is loaded.

        Raises:
            ConfigurationError: it cannot be loaded.
        """
        config = self._config
        environment = {name: os.environ[name] for name in KEPT_VARIABLES if name in os.environ}
        threads = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")
        self._process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            "service.workers.rules.child",
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            env=environment | threads,
            start_new_session=True,
        )
        spec = Spec(config.rule, config.options, config.memory_mb * 1024 * 1024)
        try:
            async with asyncio.timeout(START_SECONDS):
                outcome = await self._exchange(spec)
        except TimeoutError:
            outcome = Outcome(SLOW, message=f"rule {config.rule} was not loaded within {START_SECONDS:g} s")
        if outcome.kind != REWARD:
            await self.kill()
            message = outcome.message or "its process ended while it was loaded: is --memory-mb large enough?"
            _log.error("a rule cannot be loaded", extra={"fields": {"rule": config.rule, "reason": message}})
            raise ConfigurationError(f"rule {config.rule}: {message}")

    async def ask(self, question: Question, until: float) -> Outcome:
        """Return the outcome of a question; the process is of no more use after `SLOW` and `CRASHED`."""
        if not self.alive:
            return Outcome(CRASHED, message="the rule's process could not be started again")
        try:
            async with asyncio.timeout_at(until):
                return await self._exchange(question)
        except TimeoutError:
            seconds = self._config.rule_seconds
            return Outcome(SLOW, message=f"the rule took longer than {seconds:g} s (--rule-seconds)")

    async def kill(self) -> None:
        """End it and what it has started, at once."""
        process, self._process = self._process, None
        if process is None:
            return
        if process.returncode is None:
            with suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, signal.SIGKILL)
        await process.wait()

    async def _exchange(self, message: Spec | Question) -> Outcome:
        assert self._process is not None
        reader, writer = self._process.stdout, self._process.stdin
        assert reader is not None
        assert writer is not None
        body = msgspec.msgpack.encode(message)
        try:
            writer.write(LENGTH.pack(len(body)) + body)
            await writer.drain()
            (length,) = LENGTH.unpack(await reader.readexactly(LENGTH.size))
            return msgspec.msgpack.decode(await reader.readexactly(length), type=Outcome)
        except (asyncio.IncompleteReadError, ConnectionError, msgspec.MsgspecError):
            return Outcome(CRASHED, message="the rule's process ended" if isinstance(message, Question) else "")

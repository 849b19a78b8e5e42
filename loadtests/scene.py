"""What several benchmarks begin with: a folder, a store and children that end with the block; small servers; a rule.

Used by the benchmarks of this folder.
"""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from loadtests.gateway import Children
from service.cli.processes import ProcessGroup, free_port
from service.cli.rule_serve import rule_words
from service.scorers.rule.entry import RuleEntry
from service.stores.embedded import EmbeddedStore


@dataclass(frozen=True, slots=True)
class Scene:
    """Where one measurement happens.

    Attributes:
        folder: for its files.
        store_url: of a real embedded store.
        children: the processes under test.
    """

    folder: Path
    store_url: str
    children: Children


@contextmanager
def scene(cores: tuple[int, int] | None = None) -> Iterator[Scene]:
    """Folder, store and children for the length of the block; `cores` as `Children` takes them."""
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="loadtest-")))
        store = stack.enter_context(EmbeddedStore(folder / "store"))
        yield Scene(folder, store.url, stack.enter_context(Children(folder, cores)))


@contextmanager
def rule_worker(folder: Path, rule: RuleEntry) -> Iterator[str]:
    """A real `reward-router worker --rule` for the length of the block; its URL."""
    with ProcessGroup(folder / "logs") as workers:
        port = free_port(0)
        workers.start("rule", rule_words(rule, host="127.0.0.1", port=port))
        url = f"http://127.0.0.1:{port}"
        workers.wait_until_ready(f"{url}/health", "rule", 60.0, lambda: None)
        yield url


class StubServer:
    """A small HTTP server on a free port of loopback; a subclass answers."""

    def __init__(self) -> None:
        self._server: asyncio.Server | None = None

    async def answer(self, method: str, path: str, body: bytes) -> tuple[int, bytes]:
        """Return status and body."""
        raise NotImplementedError

    async def start(self) -> str:
        """Serve; returns the URL."""
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        return f"http://127.0.0.1:{self._server.sockets[0].getsockname()[1]}"

    def stop(self) -> None:
        """Accept no more connections."""
        if self._server is not None:
            self._server.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                mark = head.lower().find(b"content-length:")
                length = int(head[mark + 15 : head.find(b"\r\n", mark)]) if mark >= 0 else 0
                method, path, _ = head.decode("latin-1").split(" ", 2)
                status, body = await self.answer(method, path, await reader.readexactly(length))
                writer.write(b"HTTP/1.1 %d -\r\nContent-Length: %d\r\n\r\n%b" % (status, len(body), body))
        except (asyncio.IncompleteReadError, ConnectionError, asyncio.CancelledError):
            writer.close()

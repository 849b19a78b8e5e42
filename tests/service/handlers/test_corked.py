"""One system call a reply: what is written in one turn of the loop leaves together, in order, and before a close."""

from __future__ import annotations

import asyncio
from typing import cast

from service.handlers.corked import CorkedTransport


class RecordingTransport:
    """Remembers the writes."""

    def __init__(self) -> None:
        self.writes: list[bytes] = []
        self.closed = False

    def write(self, data: bytes) -> None:
        """Remember."""
        self.writes.append(data)

    def is_closing(self) -> bool:
        """As a transport."""
        return self.closed

    def close(self) -> None:
        """As a transport."""
        self.closed = True

    def get_extra_info(self, name: str) -> str:
        """As a transport."""
        return f"the {name}"


def corked() -> tuple[CorkedTransport, RecordingTransport]:
    """A corked transport, and the one beneath it."""
    beneath = RecordingTransport()
    return CorkedTransport(cast(asyncio.Transport, beneath), asyncio.get_running_loop()), beneath


async def test_writes_of_one_turn_leave_as_one() -> None:
    transport, beneath = corked()
    transport.write(b"head ")
    transport.write(b"body")
    assert beneath.writes == []
    await asyncio.sleep(0)
    transport.write(b"next")
    await asyncio.sleep(0)
    assert beneath.writes == [b"head body", b"next"]


async def test_close_writes_what_is_held_first() -> None:
    transport, beneath = corked()
    transport.write(b"last words")
    transport.close()
    await asyncio.sleep(0)
    assert beneath.writes == [b"last words"]
    assert beneath.closed


async def test_nothing_is_written_to_a_connection_that_is_gone() -> None:
    transport, beneath = corked()
    transport.write(b"too late")
    beneath.closed = True
    await asyncio.sleep(0)
    assert beneath.writes == []


async def test_everything_else_is_the_transport_s_own() -> None:
    transport, _ = corked()
    assert transport.get_extra_info("peername") == "the peername"
    assert not transport.is_closing()

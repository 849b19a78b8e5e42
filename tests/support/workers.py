"""Which of several processes at one port has a connection: Linux says it in /proc."""

from __future__ import annotations

import http.client
import json
import os
from pathlib import Path
from typing import Any

TRIES = 400
"""The kernel chooses a process for each connection; with two of them none is missed so often."""


def children_of(pid: int) -> list[int]:
    """Pids of the children of a process's main thread that serve requests."""
    try:
        listed = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except FileNotFoundError:
        return []
    return sorted(int(child) for child in listed if b"serve_one" in _command(int(child)))


def _command(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except (FileNotFoundError, ProcessLookupError):
        return b""


def ask(port: int, pid: int, path: str, document: object = None) -> tuple[int, Any]:
    """Status and document of a GET, or of a POST of a document, that is answered by the process of that pid."""
    for _ in range(TRIES):
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
        try:
            connection.connect()
            # The process has the connection once it has answered something on it.
            connection.request("GET", "/healthz")
            connection.getresponse().read()
            if pid not in _owners(port, connection.sock.getsockname()[1]):
                continue
            body = None if document is None else json.dumps(document)
            connection.request("GET" if body is None else "POST", path, body, {"content-type": "application/json"})
            response = connection.getresponse()
            text = response.read()
            plain = "json" not in response.headers["content-type"]
            return response.status, text.decode() if plain else json.loads(text)
        except (OSError, http.client.HTTPException):
            continue  # a process that is being ended
        finally:
            connection.close()
    raise AssertionError(f"process {pid} has had none of {TRIES} connections")


def _owners(port: int, peer: int) -> set[int]:
    """Pids of the processes that have the server's end of a connection of loopback."""
    local, remote = f"0100007F:{port:04X}", f"0100007F:{peer:04X}"
    rows = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
    inodes = {f"socket:[{row[9]}]" for row in rows if (row[1], row[2]) == (local, remote)}
    found = set()
    for folder in Path("/proc").iterdir():
        if not folder.name.isdigit():
            continue
        try:
            if any(os.readlink(link) in inodes for link in (folder / "fd").iterdir()):
                found.add(int(folder.name))
        except (FileNotFoundError, ProcessLookupError, PermissionError):
            continue
    return found

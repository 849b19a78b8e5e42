"""A client of server-sent events over a real port: blocking, as they come."""

from __future__ import annotations

import http.client
import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from urllib.parse import urlsplit

WAIT_SECONDS = 20.0
"""Longest wait for the next bytes."""


class Stream:
    """One answer."""

    def __init__(self, response: http.client.HTTPResponse) -> None:
        self.status = response.status
        self.content_type = response.headers["content-type"]
        self._response = response

    def next(self, kind: str) -> Any:
        """Return the data of the next event of that kind."""
        while True:
            word = self._response.readline().decode().removeprefix("event: ").strip()
            data = json.loads(self._response.readline().decode().removeprefix("data: "))
            assert self._response.readline() == b"\n"
            if word == kind:
                return data

    def read_to_the_end(self) -> None:
        """Return when the server has ended the stream."""
        while self._response.readline():
            pass


@contextmanager
def watch(url: str, **headers: str) -> Iterator[Stream]:
    """Open a stream; it is closed with its connection."""
    parts = urlsplit(url)
    connection = http.client.HTTPConnection(parts.netloc, timeout=WAIT_SECONDS)
    connection.request("GET", f"{parts.path}?{parts.query}", headers=headers)
    try:
        yield Stream(connection.getresponse())
    finally:
        connection.close()

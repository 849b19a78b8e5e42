"""Rule workers as people start them, and what asks them."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from urllib.error import HTTPError
from urllib.request import Request, urlopen

from tests.conftest import free_port
from tests.support.processes import fetch

START_SECONDS = 60.0


@contextmanager
def rule_worker(*words: str, **environment: str) -> Iterator[str]:
    """`reward-router worker` until the block ends; yields its URL."""
    port = free_port()
    process = subprocess.Popen(
        [sys.executable, "-m", "service.cli", "worker", *words, "--port", str(port)],
        env={**os.environ, **environment},
        stderr=subprocess.DEVNULL,
    )
    try:
        url = f"http://127.0.0.1:{port}"
        until = time.monotonic() + START_SECONDS
        while fetch(f"{url}/health")[0] != 200:
            assert process.poll() is None, "the worker ended"
            assert time.monotonic() < until, "the worker did not start"
            time.sleep(0.05)
        yield url
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(20)


def call(url: str, body: Any, **headers: str) -> tuple[int, Any]:
    """POST: status and document."""
    request = Request(url, json.dumps(body).encode(), {"content-type": "application/json", **headers})
    try:
        with urlopen(request, timeout=30) as response:
            return response.status, json.load(response)
    except HTTPError as error:
        with error:
            return error.code, json.load(error)

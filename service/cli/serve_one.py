"""One of the processes of `reward-router serve --workers N`; `service.cli.serve_many` starts it.

Its settings come through standard input, a socket, which then takes the word that this process lives.
"""

from __future__ import annotations

import os
import pickle
import sys
from contextlib import suppress

from service.cli import report_errors
from service.cli.serve import run_gateway
from service.cli.serve_many import listen
from service.settings import Settings


def main() -> None:
    """Serve until a signal."""
    settings = pickle.load(sys.stdin.buffer)
    assert isinstance(settings, Settings)
    os.set_blocking(sys.stdin.fileno(), False)
    run_gateway(settings, listen(settings.host, settings.port), alive=_say)


async def _say() -> None:
    """Say that the event loop goes on. Nobody may listen, or not now."""
    with suppress(BlockingIOError, ConnectionError):
        os.write(sys.stdin.fileno(), b".")


if __name__ == "__main__":
    with report_errors():
        main()

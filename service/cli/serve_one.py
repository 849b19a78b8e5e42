"""One of the processes of `reward-router serve --workers N`; `service.cli.serve_many` starts it.

Its settings come through standard input.
"""

from __future__ import annotations

import pickle
import sys

from service.cli import report_errors
from service.cli.serve import run_gateway
from service.cli.serve_many import listen
from service.settings import Settings


def main() -> None:
    """Serve until a signal."""
    settings = pickle.load(sys.stdin.buffer)
    assert isinstance(settings, Settings)
    run_gateway(settings, listen(settings.host, settings.port))


if __name__ == "__main__":
    with report_errors():
        main()

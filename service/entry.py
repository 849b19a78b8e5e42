"""The command `reward-router` before it is known whether the server is installed.

The plain package is only what trainers import. Knows nothing but the name of the extra.
"""

from __future__ import annotations

import sys


def main() -> None:
    """Run `service.cli`, or say in one sentence what to install; exit status 2 then."""
    try:
        from service.cli import main as run
    except ModuleNotFoundError as error:
        sys.exit(missing(error))
    run()


def missing(error: ModuleNotFoundError) -> int:
    """Say on standard error what to install, and return the exit status.

    Raises:
        ModuleNotFoundError: what is missing is a part of our own.
    """
    if (error.name or "").split(".")[0] in ("service", "router_core"):
        raise error
    sys.stderr.write(
        f"error: reward-router needs {error.name or 'a package'!r}, which the light installation for trainers lacks: "
        "pip install 'reward-router[server]', or 'reward-router[embedded]' with a store and an encoder of its own\n"
    )
    return 2

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
        if (error.name or "").split(".")[0] in ("service", "router_core"):
            raise
        sys.exit(_missing(error.name or "a package"))
    run()


def _missing(package: str) -> int:
    sys.stderr.write(
        f"error: reward-router needs {package!r}, which the light installation for trainers lacks: "
        "pip install 'reward-router[server]', or 'reward-router[embedded]' with a store and an encoder of its own\n"
    )
    return 2

"""The real application behind a real port, for callers that speak HTTP themselves: blocking clients and trainers.

The gateway of `tests.support.gateway` in an event loop of its own thread, served as `reward-router serve` does. What
the scripted RMs do may be changed from the test's thread: they only read attributes.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import uvicorn
import uvloop

from service.app import create_app
from service.cli.serve import server_options
from service.pool import PoolFile
from service.settings import Settings
from tests.conftest import free_port
from tests.support.arms import ScriptedArm
from tests.support.gateway import WAIT_SECONDS, fresh_run, small_encoder
from tests.support.processes import fetch


@dataclass(frozen=True, slots=True)
class LiveGateway:
    """Where it listens, and its RMs."""

    url: str
    run: str
    arms: list[ScriptedArm]

    def posterior(self, run: str | None = None) -> dict[str, Any]:
        """GET /posterior; {} while the run is not open."""
        status, document = fetch(f"{self.url}/posterior?run={run or self.run}")
        return document if status == 200 else {}

    def until(self, version: int, run: str | None = None) -> dict[str, Any]:
        """GET /posterior once it has learned from that many events."""
        pause = threading.Event()
        for _ in range(int(WAIT_SECONDS / 0.02)):
            found = self.posterior(run)
            if found.get("version", -1) >= version:
                return found
            pause.wait(0.02)
        raise AssertionError(f"not within {WAIT_SECONDS} s: posterior of {version} events")


@contextmanager
def live_gateway(
    server_url: str,
    *,
    models: Sequence[str] = ("rm-a", "rm-b", "rm-c"),
    arms: Sequence[ScriptedArm] | None = None,
    pool: PoolFile | None = None,
    audit: dict[str, Any] | None = None,
    tracing: Any = None,
    **settings: Any,
) -> Iterator[LiveGateway]:
    """The application on a free port of loopback.

    Args:
        server_url: the Valkey process.
        models: names of the scripted RMs.
        arms: the scripted RMs themselves.
        pool: of servers that run, instead of scripted RMs.
        tracing: a `service.tracing.Tracing`; by default as the settings say.
        settings: of the gateway.
    """
    scripted = list(arms) if arms is not None else [ScriptedArm(name) for name in models]
    chosen = Settings(**{"store_url": server_url, "run": fresh_run(), "seed": 0, "port": free_port(), **settings})
    entries = pool or PoolFile.model_validate({"models": [{"name": arm.name} for arm in scripted], "audit": audit})
    arms = None if pool is not None else scripted
    app = create_app(chosen, entries, encoder=small_encoder(), arms=arms, tracing=tracing)
    server = uvicorn.Server(uvicorn.Config(app, **server_options(chosen, app.count_refusal)))
    thread = threading.Thread(target=lambda: uvloop.run(server.serve()), daemon=True)
    thread.start()
    gateway = LiveGateway(f"http://127.0.0.1:{chosen.port}", chosen.run, scripted)
    pause = threading.Event()
    try:
        for _ in range(int(WAIT_SECONDS / 0.02)):
            if fetch(f"{gateway.url}/readyz")[0] == 200:
                break
            pause.wait(0.02)
        else:
            raise AssertionError(f"not within {WAIT_SECONDS} s: ready")
        yield gateway
    finally:
        server.should_exit = True
        thread.join(WAIT_SECONDS)
        assert not thread.is_alive(), "the gateway did not stop"

"""The real application on a real Valkey process, with scripted reward models and a small real encoder."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import msgspec
import redis

from router_core.encoder.fuse import Fuse, PairEncoder
from router_core.encoder.surface import SurfaceBackbone
from router_core.policies import ScoreScale
from router_core.posterior import FoldSettings, Posterior, fold, start
from router_core.prior import Prior, no_prior
from router_core.records import Event
from service.app import create_app
from service.pool import PoolFile
from service.settings import Settings
from service.stores.acts import PREFIX
from service.stores.protocol import Store
from service.usecases.decisions import StoredDecision, event_of
from tests.support.arms import ScriptedArm
from tests.support.asgi import AsgiClient, running

DIM = 8
"""Length of the small encoder's contexts."""

WAIT_SECONDS = 20.0
"""Longest wait for what happens in the background; tests that pass wait milliseconds."""


def small_encoder(dim: int = DIM) -> PairEncoder:
    """The surface features of texts under an untrained fuse: real, and too small to cost anything."""
    backbone = SurfaceBackbone()
    return PairEncoder(backbone, Fuse.identity(backbone.dim, dim))


def fresh_run(prefix: str = "t") -> str:
    """A run's name that no other test of the shared server has."""
    return f"{prefix}-{os.urandom(5).hex()}"


async def until(condition: Callable[[], Any], what: str, seconds: float = WAIT_SECONDS) -> Any:
    """Wait until the condition holds (it may be a coroutine function); returns what it gave."""
    deadline = asyncio.get_running_loop().time() + seconds
    while True:
        found = condition()
        if asyncio.iscoroutine(found):
            found = await found
        if found:
            return found
        assert asyncio.get_running_loop().time() < deadline, f"not within {seconds} s: {what}"
        await asyncio.sleep(0.01)


def read_events(server_url: str, run: str) -> list[Event]:
    """Every feedback and audit of a run's log, read from the server without any code of the store."""
    with redis.Redis.from_url(server_url) as client:
        entries: Any = client.xrange(f"rr:{{{run}}}:log")
    told = [words for _, words in entries if not words[b"s"].startswith(PREFIX)]
    return [event_of(words[b"d"].decode(), words[b"p"], words[b"s"]) for words in told]


def read_decision(server_url: str, run: str, decision_id: str) -> StoredDecision | None:
    """The stored decision of that id, read from the server without any code of the store."""
    with redis.Redis.from_url(server_url) as client:
        value: Any = client.get(f"rr:{{{run}}}:d:{decision_id}")
    return None if value is None else msgspec.msgpack.decode(value.split(b" ", 1)[1], type=StoredDecision)


def fold_from_scratch(events: Sequence[Event], prior: Prior, settings: FoldSettings) -> Posterior:
    """The posterior of a log, folded in one go."""
    return fold(start(prior, settings), events)


@dataclass(slots=True)
class Gateway:
    """One running application and what surrounds it."""

    client: AsgiClient
    arms: list[ScriptedArm]
    settings: Settings
    server_url: str

    @property
    def run(self) -> str:
        """The default run."""
        return self.settings.run

    def arm(self, name: str) -> ScriptedArm:
        """The scripted RM of that name."""
        return next(arm for arm in self.arms if arm.name == name)

    def others(self, name: str) -> list[ScriptedArm]:
        """All the other ones."""
        return [arm for arm in self.arms if arm.name != name]

    def decision(self, decision_id: str, run: str | None = None) -> StoredDecision:
        """The stored decision of that id, which must be there."""
        found = read_decision(self.server_url, run or self.run, decision_id)
        assert found is not None
        return found

    def events(self, run: str | None = None) -> list[Event]:
        """The run's log."""
        return read_events(self.server_url, run or self.run)

    def folded(self, run: str | None = None, prior: Prior | None = None) -> Posterior:
        """The run's whole log, folded in one go, from no prior or the given one."""
        settings = FoldSettings(self.settings.block_size, self.settings.refresh_events)
        return fold_from_scratch(self.events(run), prior or no_prior(len(self.arms), DIM), settings)

    async def learned(self, version: int, run: str | None = None) -> dict[str, Any]:
        """GET /posterior once it has learned from that many events."""

        async def reached() -> dict[str, Any] | None:
            response = await self.client.get(f"/posterior?run={run or self.run}")
            assert response.status == 200, response.body
            document: dict[str, Any] = response.json
            return document if document["version"] >= version else None

        found: dict[str, Any] = await until(reached, f"posterior of {version} events")
        return found


@asynccontextmanager
async def open_gateway(
    server_url: str,
    *,
    models: Sequence[str] = ("rm-a", "rm-b", "rm-c"),
    arms: Sequence[ScriptedArm] | None = None,
    store: Store | None = None,
    encoder: PairEncoder | None = None,
    score_scale: ScoreScale | None = None,
    wait: bool = True,
    prices: Sequence[float] | None = None,
    audit: dict[str, Any] | None = None,
    referees: Sequence[dict[str, Any]] = (),
    **settings: Any,
) -> AsyncIterator[Gateway]:
    """The application in its lifespan.

    Args:
        server_url: the Valkey process.
        models: names of the scripted RMs.
        arms: the scripted RMs themselves.
        store: instead of the store of `server_url`.
        encoder: instead of the small one.
        score_scale: of the RMs' raw rewards.
        wait: until /readyz answers 200.
        audit: of the pool file.
        referees: of the pool file.
        settings: of the gateway; a new run's name is taken at once unless they say otherwise.
    """
    scripted = list(arms) if arms is not None else [ScriptedArm(name) for name in models]
    costs = [1.0] * len(scripted) if prices is None else prices
    entries = [{"name": arm.name, "price": price} for arm, price in zip(scripted, costs, strict=True)]
    pool = PoolFile.model_validate({"models": entries, "referees": referees, "audit": audit})
    chosen = Settings(**{"store_url": server_url, "run": fresh_run(), "seed": 0, "new_run_wait_seconds": 0, **settings})
    app = create_app(
        chosen, pool, encoder=encoder or small_encoder(), arms=scripted, store=store, score_scale=score_scale
    )
    async with running(app) as client:
        gateway = Gateway(client, scripted, chosen, server_url)
        if wait:

            async def ready() -> bool:
                return (await client.get("/readyz")).status == 200

            await until(ready, "ready")
        yield gateway


def pair(index: int = 0) -> dict[str, Any]:
    """One instance; its second response is the longer one, which the default RM likes better."""
    return {
        "prompt": f"Question {index}: what is {index} + 5?",
        "responses": [f"{index + 5}", f"{index} + 5 = {index + 5}"],
    }

"""The background task that keeps the breakers of the encoder's servers true.

A server that is new, or has been out, must pass the whole probe; one that is in use encodes a tiny text now and then.
`service.encoders.remote` starts and stops it. Knows servers; nothing of requests.
"""

from __future__ import annotations

import asyncio
import logging
from typing import Final

import numpy as np

from service.encoders.client import StateClient
from service.encoders.probe import ServerUnreachableError, ServerWrongError, probe, ready
from service.encoders.reading import Reading
from service.scorers.health import HealthPolicy
from service.scorers.transport.replica import Replica

PROBE_SECONDS: Final = 20.0
"""A whole probe may take this long, however short one request must be: a server's first texts are its slowest."""

_log = logging.getLogger(__name__)


class ServerMonitor:
    """Checks every server of a client until stopped.

    Args:
        client: whose servers.
        reading: what they are tried with.
        policy: how often.
        rng: for the jitter.
    """

    def __init__(self, client: StateClient, reading: Reading, policy: HealthPolicy, rng: np.random.Generator) -> None:
        self._client = client
        self._reading = reading
        self._policy = policy
        self._rng = rng
        self._tasks: list[asyncio.Task[None]] = []

    async def start(self) -> None:
        """Check every server once, all at once, then go on in the background of the running loop."""
        for replica in self._client.replicas:
            replica.supervised = True
            replica.withhold()
        await asyncio.gather(*(self.check(replica) for replica in self._client.replicas))
        self._tasks = [asyncio.create_task(self._watch(replica)) for replica in self._client.replicas]

    async def stop(self) -> None:
        """Stop checking; returns when the tasks have ended."""
        tasks, self._tasks = self._tasks, []
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def check(self, replica: Replica) -> None:
        """Check one server now; its breaker learns the outcome."""
        now, seconds = asyncio.get_running_loop().time(), self._policy.timeout_seconds
        try:
            if replica.proven:
                await ready(self._client, self._reading, replica, deadline=now + seconds)
                replica.report_check(None)
            else:
                await probe(self._client, self._reading, replica, deadline=now + max(seconds, PROBE_SECONDS))
                replica.admit()
        except ServerUnreachableError as error:
            replica.report_check(str(error))
        except ServerWrongError as error:
            replica.reject(str(error))

    async def _watch(self, replica: Replica) -> None:
        policy = self._policy
        while True:
            await asyncio.sleep(policy.interval_seconds * self._rng.uniform(1 - policy.jitter, 1 + policy.jitter))
            try:
                await self.check(replica)
            except Exception:  # noqa: BLE001 - a background task must outlive its own bugs
                _log.exception("encoder check failed unexpectedly", extra={"fields": {"url": replica.url}})
                replica.report_check("the health check itself failed")

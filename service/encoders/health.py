"""What the encoder's servers are asked by the health monitor: a tiny text, and first the whole probe.

`service.scorers.health` does the rest; `service.encoders.remote` starts and stops it. Knows servers; nothing of
requests.
"""

from __future__ import annotations

import asyncio
from typing import Final

from service.encoders.client import StateClient
from service.encoders.probe import probe, ready
from service.encoders.reading import Reading
from service.scorers.health import ProbeError, UnreachableError, settle
from service.scorers.transport.replica import Replica

PROBE_SECONDS: Final = 20.0
"""A whole probe may take this long, however short one request must be: a server's first texts are its slowest."""


class EncoderChecks:
    """Implements `service.scorers.health.Checks`.

    Args:
        client: whose servers.
        reading: what they are tried with.
    """

    name = "encoder"

    def __init__(self, client: StateClient, reading: Reading) -> None:
        self._client = client
        self._reading = reading
        self.replicas = client.replicas

    async def ready(self, replica: Replica, deadline: float) -> None:
        """Encode a tiny text. A server with other states gets no text more: they would be learned from."""
        try:
            await ready(self._client, self._reading, replica, deadline=deadline)
        except UnreachableError:
            raise
        except ProbeError as error:
            replica.reject(str(error))
            raise

    async def probe(self, replica: Replica, deadline: float) -> None:
        until = max(deadline, asyncio.get_running_loop().time() + PROBE_SECONDS)
        await settle(replica, probe(self._client, self._reading, replica, deadline=until))

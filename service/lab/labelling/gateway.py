"""The scorers of a running gateway, asked through it one by one: `label --url`.

`GatewayScorer` is a `Scorer` whose server is a gateway, asked with the policy `single:NAME`. Rewards are the gateway's
raw ones, so they are what `label --pool` would write with the gateway's pool file. Called by `service.cli.label`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any, Final

from router_core.records import Instance
from router_core.rows import written
from service.lab.client import GatewayClient, GatewayError
from service.scorers.admission import Ticket
from service.scorers.protocol import (
    AbstainedError,
    Scored,
    WorkerError,
    WorkerRejectedError,
    WorkerTooLongError,
    WorkerUnavailableError,
)
from service.scorers.status import ReplicaStatus, ScorerStatus

REFUSALS: Final = ("worker_rejected", "verdict_unreadable", "validation", "bad_request")
"""Codes of answers that asking again does not change."""


class GatewayScorer:
    """One scorer of a gateway's pool.

    Args:
        name: in the gateway's pool.
        url: of the gateway.
        api_key: of the gateway.
        connections: requests at once.
        run: whose decisions the answers become.
    """

    kind = "gateway"
    choosy = False
    timeout_seconds = None
    unexpected_errors = 0
    available = True
    reachable = True
    counts_to: int | None = None

    def __init__(self, name: str, url: str, api_key: str | None, connections: int, run: str) -> None:
        self.name = name
        self._run = run
        self._url = url
        self._connections = connections
        self._client = GatewayClient(url, api_key=api_key, connections=connections)

    def slots(self) -> asyncio.Semaphore:
        """Return as many slots as there are connections."""
        return asyncio.Semaphore(self._connections)

    def applies(self, instance: Instance) -> bool:
        """Return True: the gateway says where a scorer does not apply."""
        return True

    async def readable(self, instances: Sequence[Instance]) -> list[int]:
        """Return the number of responses of each instance: the gateway says what is too long."""
        return [len(instance.responses) for instance in instances]

    async def score(
        self, instances: Sequence[Instance], *, deadline: float, ticket: Ticket | None = None
    ) -> list[Scored | WorkerError]:
        """See `Scorer.score`."""
        items = [_item(it) for it in instances]
        body = {"items": items, "policy": f"single:{self.name}", "run": self._run, "normalize": False}
        try:
            reply = await self._client.post("/reward/batch", body)
        except GatewayError as error:
            return [WorkerUnavailableError(error.message)] * len(instances)
        return [_outcome(result) for result in reply["results"]]

    def status(self) -> ScorerStatus:
        """Return one replica: the gateway."""
        gateway = ReplicaStatus(
            url=self._url, state="closed", in_flight=0, failures=0, latency_ms=None, problem=None, max_model_len=None
        )
        return ScorerStatus(
            name=self.name,
            kind=self.kind,
            available=True,
            rendering=None,
            max_model_len=None,
            over_long=None,
            replicas=[gateway],
        )

    async def check(self) -> None:
        """Raises GatewayError if the gateway does not answer, or refuses the key."""
        await self._client.get("/models")

    def start(self) -> None:
        """Begin nothing: the gateway checks its scorers."""

    async def close(self) -> None:
        """Close the connections."""
        await self._client.close()


def _item(instance: Instance) -> dict[str, Any]:
    said = instance.items()
    item: dict[str, Any] = {"prompt": written(said[0][0]), "responses": [written(response) for _, response in said]}
    if instance.reference is not None:
        item["reference"] = instance.reference
    if instance.metadata:
        item["metadata"] = dict(instance.metadata)
    return item


def _outcome(result: dict[str, Any]) -> Scored | WorkerError:
    error = result.get("error")
    if error is None:
        rewards = [float("nan") if reward is None else float(reward) for reward in result["rewards"]]
        return Scored(rewards, failures=[code or "" for code in result.get("failure") or ()])
    code, message = error["code"], error["message"]
    if code == AbstainedError.code:
        return AbstainedError(message)
    if code == WorkerTooLongError.code:
        return WorkerTooLongError(message)
    return WorkerRejectedError(message) if code in REFUSALS else WorkerUnavailableError(message)

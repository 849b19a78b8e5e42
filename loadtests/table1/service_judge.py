"""The running service as judge: rewards from POST /reward/batch, losses back through POST /feedback/batch.

Knows the service's API and nothing of policies or tensors. Called by `campaign`.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any, Self

from loadtests.table1.judge import Pair, Verdict
from router_core.attempts import ASKED
from service.lab.client import GatewayClient, GatewayError

_POLL_SECONDS = 0.005
_LEARN_SECONDS = 30.0
"""Longest wait for the posterior; it follows the log within milliseconds."""


class ServiceJudge:
    """The running gateway, over HTTP; a context manager.

    Args:
        url: the gateway.
        run: name of the run, which nobody else uses.
        policy: which policy answers.
        signal: `loss`, the paper's; `preference`, the checker's answer, for analysis only; `audits`: no feedback, but
            the right response as reference, where exactly one is right, for the referee of the gateway.
    """

    def __init__(self, url: str, run: str, policy: str, signal: str = "loss") -> None:
        self.seconds = 0.0
        self._url, self._run, self._policy, self._signal = url, run, policy, signal
        self._learned = 0

    def __enter__(self) -> Self:
        self._runner = asyncio.Runner()
        self._client = self._runner.run(GatewayClient(self._url, connections=1).__aenter__())
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._runner.run(self._client.__aexit__(kind, error, trace))
        self._runner.close()

    def judge(self, pairs: Sequence[Pair]) -> list[Verdict]:
        """POST /reward/batch."""
        items = [self._item(pair) for pair in pairs]
        results = self._post("/reward/batch", {"items": items, "run": self._run, "policy": self._policy})
        return [self._verdict(result) for result in results]

    def _item(self, pair: Pair) -> dict[str, object]:
        item: dict[str, object] = {"prompt": pair.task.prompt, "responses": pair.responses}
        if self._signal == "audits" and (truth := pair.truth()) is not None:
            item["reference"] = pair.responses[truth]
        return item

    def learn(self, pairs: Sequence[Pair], verdicts: Sequence[Verdict], losses: Sequence[float]) -> None:
        """POST /feedback/batch, then wait until the posterior has folded all of it, so that runs can be repeated.

        With `audits` nothing is sent, and nobody waits.
        """
        if self._signal == "audits":
            return
        items = []
        for pair, verdict, loss in zip(pairs, verdicts, losses, strict=True):
            if self._signal == "loss":
                items.append({"decision_id": verdict.decision, "loss": loss})
            elif (truth := pair.truth()) is not None:
                items.append({"decision_id": verdict.decision, "preferred": truth})
        self._post("/feedback/batch", {"items": items, "run": self._run})
        self._learned += len(items)
        began = time.perf_counter()
        self._runner.run(self._followed())
        self.seconds += time.perf_counter() - began

    def audits(self) -> int:
        """Return how many audits the run has learned from; 0 with another signal."""
        if self._signal != "audits":
            return 0
        return int(self._runner.run(self._client.get(f"/posterior?run={self._run}"))["version"])

    async def _followed(self) -> None:
        deadline = time.monotonic() + _LEARN_SECONDS
        while (await self._client.get(f"/posterior?run={self._run}"))["version"] < self._learned:
            if time.monotonic() > deadline:
                raise GatewayError(f"run {self._run}: the posterior did not reach event {self._learned}")
            await asyncio.sleep(_POLL_SECONDS)

    def _post(self, path: str, body: Mapping[str, object]) -> list[dict[str, Any]]:
        if not body["items"]:
            return []
        began = time.perf_counter()
        results: list[dict[str, Any]] = self._runner.run(self._client.post(path, body))["results"]
        self.seconds += time.perf_counter() - began
        for result in results:
            if "error" in result:
                raise GatewayError(f"{path}: {result['error']['code']}: {result['error']['message']}")
        return results

    def _verdict(self, result: Mapping[str, Any]) -> Verdict:
        calls = sum(attempt["outcome"] in ASKED for attempt in result["attempts"])
        return Verdict(result["preferred"], result["model"], calls, result["decision_id"])

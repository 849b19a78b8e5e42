"""The same replay through a running gateway: POST /reward, POST /feedback, pair by pair, a run per policy and seed.

Knows the gateway's wire format and a `Plan`; no figures. Called by `service.cli.replay` and `loadtests`.
"""

from __future__ import annotations

import asyncio
import heapq
import secrets
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from router_core.attempts import ASKED
from router_core.errors import FeedbackError
from router_core.records import LabelledPair, Signal
from router_core.replay import ALL_ARMS, Pass, Plan, Scenario, Selected, Table, Trace, make_plan, select
from service.lab.client import GatewayClient, GatewayError

Advance = Callable[[int], None]
Observe = Callable[[int, dict[str, Any]], None]


async def replay_over_http(
    pairs: Sequence[LabelledPair],
    table: Table,
    policies: Sequence[str],
    seeds: Sequence[int],
    url: str,
    signal: Signal,
    concurrency: int,
    api_key: str | None,
    advance: Advance,
    observe: Observe | None = None,
    scenario: Scenario | None = None,
) -> dict[str, Trace]:
    """Every policy and seed as a fresh run of the gateway, with the orders, gaps and delays of the replay in process.

    With several instances in flight a delay is kept to within that many. The draws are the gateway's own.

    Args:
        pairs: the stream.
        table: the same, as arrays in the gateway's arm order.
        policies: names as the gateway knows them.
        seeds: each fixes the order of one pass.
        url: the gateway.
        signal: the gateway's signal.
        concurrency: requests in flight.
        api_key: of the gateway.
        advance: told of each instance done.
        observe: told the index and the reply of each instance.
        scenario: what happens to the stream.

    Raises:
        FeedbackError: a shadow rate, which is a setting of the gateway.
        GatewayError: the gateway refuses or does not answer.
    """
    scenario = scenario or Scenario()
    selected = [select(name, table.pool) for name in policies]
    for each in selected:
        if each.shadow:
            raise FeedbackError(
                f"policy {each.name!r}: a gateway shadows by its setting shadow_rate; drop the suffix, or drop --url"
            )
    plans = [make_plan(table, scenario, seed) for seed in seeds]
    suffix = secrets.token_hex(4)
    traces = {}
    async with GatewayClient(url, api_key=api_key, connections=concurrency) as client:
        for position, each in enumerate(selected):
            passes: list[Pass] = []
            calls: list[float] = []
            price: list[float] = []
            for plan in plans:
                run = f"replay-{suffix}-{position}-{plan.seed}"
                stream = _Stream(pairs, table, plan, scenario, signal, each, run)
                passes.append(await _one_pass(client, stream, concurrency, advance, observe))
                calls.append(stream.calls.mean())
                price.append(stream.price.mean())
            traces[each.name] = Trace(tuple(passes), len(table), float(np.mean(calls)), float(np.mean(price)))
    return traces


@dataclass(slots=True, eq=False)
class _Stream:
    """One pass under way: what is met, what was answered, and the feedback that is not due yet."""

    pairs: Sequence[LabelledPair]
    table: Table
    plan: Plan
    scenario: Scenario
    signal: Signal
    selected: Selected
    run: str
    correct: NDArray[np.float64] = field(init=False)
    asked: NDArray[np.int64] = field(init=False)
    calls: NDArray[np.float64] = field(init=False)
    price: NDArray[np.float64] = field(init=False)
    _waiting: list[tuple[int, int, dict[str, Any]]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.correct, self.asked = np.empty(len(self.plan)), np.full(len(self.plan), ALL_ARMS)
        self.calls, self.price = np.empty(len(self.plan)), np.empty(len(self.plan))

    def chunks(self) -> Iterator[range]:
        """Steps that are asked about in one request: a batch where the policy shares one RM per batch, else one."""
        size = self.scenario.batch if self.selected.policy.one_arm_per_batch else 1
        length = len(self.plan)
        return (range(begin, min(begin + size, length)) for begin in range(0, length, size))

    def request(self, step: int) -> dict[str, Any]:
        """The body of POST /reward for one step."""
        instance = self.pairs[self.plan.order[step]].instance
        return {
            "prompt": instance.prompt,
            "responses": instance.responses,
            "run": self.run,
            "policy": self.selected.name,
        }

    def answered(self, step: int, reply: dict[str, Any]) -> None:
        """Judge the reply, and put its feedback in the queue if it ever arrives."""
        pair = self.pairs[self.plan.order[step]]
        preferred, model = reply["preferred"], reply["model"]
        self.correct[step] = 0.5 if preferred is None else float(preferred == pair.label)
        self.asked[step] = self.table.pool.index(model) if model in self.table.pool else ALL_ARMS
        self.calls[step] = sum(attempt["outcome"] in ASKED for attempt in reply["attempts"])
        self.price[step] = reply["price"]
        due = int(self.plan.due[step])
        if due < len(self.plan):
            feedback = {"decision_id": reply["decision_id"], "run": self.run, **self._value(step, pair)}
            heapq.heappush(self._waiting, (due, step, feedback))

    def due(self, step: int) -> list[dict[str, Any]]:
        """Feedback that is due once this step has been answered, in its order."""
        ready = []
        while self._waiting and self._waiting[0][0] <= step:
            ready.append(heapq.heappop(self._waiting)[2])
        return ready

    def _value(self, step: int, pair: LabelledPair) -> dict[str, float | int]:
        if self.signal is Signal.PREFERENCE:
            return {"preferred": pair.label}
        if self.signal is Signal.REWARD:
            return {"reward": float(self.correct[step])}
        progress = np.array([step / len(self.plan)])
        at = slice(step, step + 1)
        return {"loss": float(self.scenario.loss.losses(self.correct[at], progress, self.plan.loss_noise[at])[0])}


async def _one_pass(
    client: GatewayClient, stream: _Stream, concurrency: int, advance: Advance, observe: Observe | None
) -> Pass:
    waiting = stream.chunks()

    async def drain() -> None:
        for steps in waiting:
            for step, reply in zip(steps, await _ask(client, stream, steps), strict=True):
                stream.answered(step, reply)
                if observe is not None:
                    observe(int(stream.plan.order[step]), reply)
            for feedback in stream.due(steps[-1]):
                await client.post("/feedback", feedback)
            advance(len(steps))

    await asyncio.gather(*(drain() for _ in range(concurrency)))
    return Pass(stream.plan.seed, stream.plan.order, stream.correct, stream.asked)


async def _ask(client: GatewayClient, stream: _Stream, steps: range) -> list[dict[str, Any]]:
    """The replies of one chunk, in order.

    Raises:
        GatewayError: an item of a batch was refused.
    """
    if not stream.selected.policy.one_arm_per_batch:
        return [await client.post("/reward", stream.request(step)) for step in steps]
    body = {"items": [stream.request(step) for step in steps]}
    replies: list[dict[str, Any]] = (await client.post("/reward/batch", body))["results"]
    for reply in replies:
        if "error" in reply:
            raise GatewayError(f"an item of /reward/batch was refused: {reply['error']}")
    return replies

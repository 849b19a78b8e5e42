"""`VllmArm`: one reward model behind any number of equal replicas that speak vLLM's `/classify`.

Renders instances and cuts batches into requests, which `service.scorers.requests` makes and divides where they fail.
`service.scorers.rm.build` makes one per RM of the pool; use cases see it as `service.scorers.protocol.Scorer`. Knows no
routing policy and no store.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Final, TypeGuard

from router_core.attempts import TOO_LONG
from router_core.records import MAX_ABS_SCORE, Instance
from service.errors import ConfigurationError
from service.scorers.admission import Ticket
from service.scorers.protocol import (
    OverLong,
    Scored,
    WorkerError,
    WorkerRejectedError,
    WorkerTooLongError,
    WorkerUnavailableError,
)
from service.scorers.requests import Monitor
from service.scorers.rm.answers import Heads, RewardBound, Rewards
from service.scorers.rm.dialogue import ClassifyDialogue
from service.scorers.rm.render import Content, Item, MessagesRendering, Prepared, RenderError, Rendering, TooLongError
from service.scorers.served import ServedConfig, ServedScorer
from service.scorers.status import ScorerStatus
from service.scorers.transport.replica import ReplicaSnapshot

TOKENS_PER_REQUEST: Final = 32_768
"""Bound on one request whose lengths are known: 64 items of 500 tokens; more than that would make one request of long
texts last several times as long as one of short ones."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ArmConfig(ServedConfig):
    """One RM of the pool file; see `ServedConfig`.

    Attributes:
        model: the name under which the workers serve it; the arm's name when None.
        rendering: what a request holds; see `service.scorers.rm.render`.
        fallback: a rendering for an RM whose workers read another text than `rendering` writes; see `fall_back`.
        items_per_request: (prompt, response) items per request where the rendering allows several; 64 = 32 pairs.
        tokens_per_request: tokens per request, where the rendering counts them; a single instance may have more.
        max_model_len: tokens that the RM reads at most; None for what the workers say.
        over_long: what becomes of an instance with more. A prompt can be cut only where tokens are counted.
        reward_scale: finite, not 0; see `reward_shift`.
        reward_shift: the arm's rewards are reward_scale * logit + reward_shift.
        reward_limit: largest size of a raw reward that is taken for one; None to learn it, see `RewardBound`.
        heads: what makes the reward of several labels; None for an RM with one.
    """

    model: str | None = None
    rendering: Rendering = field(default_factory=MessagesRendering)
    fallback: Rendering | None = None
    items_per_request: int = 64
    tokens_per_request: int = TOKENS_PER_REQUEST
    max_model_len: int | None = None
    over_long: OverLong = OverLong.SKIP
    reward_scale: float = 1.0
    reward_shift: float = 0.0
    reward_limit: float | None = None
    heads: Heads | None = None

    def __post_init__(self) -> None:
        ServedConfig.__post_init__(self)
        for option in (
            *("items_per_request", "tokens_per_request"),
            *(("max_model_len",) if self.max_model_len is not None else ()),
        ):
            if getattr(self, option) < 1:
                raise ConfigurationError(f"RM {self.name!r}: {option} is {getattr(self, option)}; use at least 1")
        if not (math.isfinite(self.reward_scale) and math.isfinite(self.reward_shift)) or self.reward_scale == 0:
            raise ConfigurationError(
                f"RM {self.name!r}: reward_scale {self.reward_scale}, reward_shift {self.reward_shift}; use finite "
                "numbers, and a scale other than 0"
            )
        if self.reward_limit is not None and not 0 < self.reward_limit <= MAX_ABS_SCORE:
            raise ConfigurationError(
                f"RM {self.name!r}: reward_limit is {self.reward_limit}; use a number in (0, {MAX_ABS_SCORE:g}]"
            )

    @property
    def served_model(self) -> str:
        """The `model` of every request."""
        return self.model or self.name


class VllmArm(ServedScorer):
    """One reward model behind equal replicas; implements `service.scorers.protocol.Scorer`.

    The request goes to the replica with the fewest items to score among those whose breaker allows it, ties in turn:
    ours in flight there, and others' by the worker's own metrics, where a health monitor polls them. Not thread-safe;
    one event loop. The owner calls `close`.

    Args:
        config: what to ask and how.
        clock: monotonic seconds, for breakers and latencies.
        monitor: makes the health monitor; None for a client whose owner checks, or nobody does.

    Raises:
        ConfigurationError: a URL or the key cannot be used.
    """

    def __init__(
        self,
        config: ArmConfig,
        *,
        clock: Callable[[], float] = time.monotonic,
        monitor: Callable[[VllmArm], Monitor] | None = None,
    ) -> None:
        super().__init__(config, "rm", "RM", clock)
        self.config = config
        self._bound = RewardBound(config.reward_limit)
        self._render_by(config.rendering)
        self._monitor = None if monitor is None else monitor(self)

    @property
    def rendering(self) -> Rendering:
        """What requests hold: the configured rendering, or the fallback since `fall_back`."""
        return self._rendering

    @property
    def may_fall_back(self) -> bool:
        """True if there is a fallback, and no replica was ever used: what was asked of an RM stays what it was."""
        return self.config.fallback is not None and not any(replica.admitted for replica in self.replicas)

    def fall_back(self) -> bool:
        """Use the fallback from now on. Return True if it is used now.

        Only while no replica was ever admitted, so that no call is under way whose requests are half rendered.
        """
        if self.config.fallback is not None and self.may_fall_back:
            self._render_by(self.config.fallback)
        return self._rendering is self.config.fallback

    def snapshots(self) -> tuple[ReplicaSnapshot, ...]:
        """The replicas' states, in the order of `config.urls`."""
        return tuple(replica.snapshot() for replica in self.replicas)

    async def score(
        self, instances: Sequence[Instance], *, deadline: float, ticket: Ticket | None = None
    ) -> list[Scored | WorkerError]:
        """Ask about many instances; see `Scorer.score`."""
        groups = [instance.items() for instance in instances]
        slots = ticket.slots if ticket is not None and ticket.shared else None
        return await self.score_groups(groups, deadline=deadline, slots=slots)

    async def score_groups(
        self,
        groups: Sequence[Sequence[Item]],
        *,
        deadline: float,
        slots: asyncio.Semaphore | None = None,
    ) -> list[Scored | WorkerError]:
        """Ask for the raw rewards of many instances' items.

        Whole groups, the responses to one prompt side by side, share a request of at most `items_per_request` items
        and, where tokens are counted, `tokens_per_request` tokens. A group that one request cannot hold (more items
        than that, or a rendering of one item per request) is asked in several, and the first that fails ends that
        group. Requests are filled longest groups first, so that those in flight at once are alike and the last are
        short. A request that is refused, or fails at a replica that is well, is halved by group until the culprits
        stand alone: about 2·log2(groups) more requests for one of them, at most 2·groups for any number, plus the
        repetition of each one that failed. Halves keep to the deadline and the slots of the call. At most
        `parallel_requests` requests of the call are in flight at once, and no more than the replicas' `max_in_flight`.

        Args:
            groups: (prompt, response) by instance. Equal items of an instance are asked once.
            deadline: see `Scorer.score`.
            slots: of the call that this is a piece of; its own when None.

        Returns:
            See `Scorer.score`.

        Raises:
            ValueError: no groups, or a group without items.
        """
        if not groups or not all(groups):
            raise ValueError("score_groups needs at least one group, and at least one item in each")
        # A part of a whole that was admitted queues for a connection, as later requests of one call do.
        if not (self.available if slots is None else self.reachable):
            return [self._out()] * len(groups)
        distinct = [list(dict.fromkeys(group)) for group in groups]
        prepared = await self._prepare(distinct)
        ready = [one for one in prepared if self._is_sent(one)]
        permits = slots or self.slots()
        answers = iter(
            await self._requester.ask_all(
                ready,
                content=lambda one: one.contents,
                cut=self._chunks_of,
                ask=lambda chunk: self._ask_chunk(chunk, deadline, permits),
            )
        )
        outcomes = [next(answers) if self._is_sent(one) else self._unsent(one) for one in prepared]
        return [
            outcome if isinstance(outcome, WorkerError) else _spread(outcome, once, group)
            for outcome, once, group in zip(outcomes, distinct, groups, strict=True)
        ]

    @property
    def counts_to(self) -> int | None:
        """See `Scorer.counts_to`."""
        if self.config.over_long is OverLong.REFUSE or not self._rendering.counts_tokens:
            return None
        return self.max_model_len

    async def readable(self, instances: Sequence[Instance]) -> list[int]:
        """Count tokens; see `Scorer.readable`."""
        if self.counts_to is None:
            return await super().readable(instances)
        prepared = await self._prepare([instance.items() for instance in instances])
        return [
            len(one.contents)
            if isinstance(one, Prepared)
            else 0
            if isinstance(one, TooLongError)
            else len(instance.responses)
            for one, instance in zip(prepared, instances, strict=True)
        ]

    def status(self) -> ScorerStatus:
        return ScorerStatus(
            name=self.name,
            kind=self.kind,
            available=self.available,
            rendering=self.rendering.name,
            max_model_len=self.max_model_len,
            over_long=self.config.over_long.value,
            replicas=[replica.snapshot().status() for replica in self.replicas],
        )

    @property
    def max_model_len(self) -> int | None:
        """Tokens that every replica which may be asked reads; None while nobody has said."""
        told = [self.config.max_model_len, *(r.max_model_len for r in self.replicas if r.breaker.allows)]
        return min((limit for limit in told if limit is not None), default=None)

    def _render_by(self, rendering: Rendering) -> None:
        config = self.config
        self._rendering = rendering
        self._dialogue = ClassifyDialogue(config, rendering, self._bound)
        self._chunk = min(config.items_per_request, rendering.items_limit or config.items_per_request)
        self._chunk_size = config.tokens_per_request if rendering.counts_tokens else math.inf

    async def _prepare(self, groups: Sequence[Sequence[Item]]) -> list[Prepared | RenderError]:
        rendering = self._rendering
        cut = self.config.over_long is OverLong.CUT_PROMPT
        limit = self.max_model_len if rendering.counts_tokens else None
        if rendering.lengthy(groups):
            return await asyncio.to_thread(rendering.prepare, groups, limit=limit, cut_prompt=cut)
        return rendering.prepare(groups, limit=limit, cut_prompt=cut)

    def _chunks_of(self, ready: Sequence[Prepared]) -> list[list[int]]:
        """Positions, cut where the next one would overfill the request; longest first, unless one is enough."""
        items = sum([len(one.contents) for one in ready])
        size = sum([one.size for one in ready])
        if items <= self._chunk and size <= self._chunk_size:
            return [[*range(len(ready))]] if ready else []
        chunks: list[list[int]] = []
        room, left = 0, 0.0
        for index in sorted(range(len(ready)), key=lambda index: -ready[index].size / len(ready[index].contents)):
            one = ready[index]
            if len(one.contents) > room or one.size > left:
                chunks.append([])
                room, left = self._chunk, self._chunk_size
            chunks[-1].append(index)
            room -= len(one.contents)
            left -= one.size
        return chunks

    async def _ask_chunk(self, chunk: Sequence[Prepared], deadline: float, slots: asyncio.Semaphore) -> list[Scored]:
        items = [content for one in chunk for content in one.contents]
        if len(chunk) == 1:
            told = await self._ask_in_parts(self._parts_of(items), deadline, slots)
        else:
            async with slots:
                told = await self._ask(items, deadline, alone=False)
        ends = accumulate(len(one.contents) for one in chunk)
        spans = [(one, slice(end - len(one.contents), end)) for one, end in zip(chunk, ends, strict=True)]
        return [
            _whole(Rewards(told.rewards[span], {name: part[span] for name, part in told.heads.items()}), one)
            for one, span in spans
        ]

    def _parts_of(self, items: Sequence[Content]) -> list[list[Content]]:
        """The items of one instance, in order, cut where the next one would overfill the request."""
        parts: list[list[Content]] = []
        room, left = 0, 0.0
        for item in items:
            size = len(item) if isinstance(item, list) else 0
            if room < 1 or size > left:
                parts.append([])
                room, left = self._chunk, self._chunk_size
            parts[-1].append(item)
            room -= 1
            left -= size
        return parts

    async def _ask_in_parts(
        self, parts: Sequence[Sequence[Content]], deadline: float, slots: asyncio.Semaphore
    ) -> Rewards:
        """Ask about one instance, in as many requests as it takes. The first that fails ends them all, but what is too
        long is searched for item by item: it has no reward (NaN), unless all are.
        """
        refused: list[WorkerTooLongError] = []

        async def ask(part: Sequence[Content]) -> Rewards:
            try:
                async with slots:
                    return await self._ask(part, deadline, alone=True)
            except WorkerTooLongError as error:
                if error.final:
                    raise
                if len(part) == 1:
                    refused.append(error)
                    return Rewards([math.nan], {})
            return _joined(await asyncio.gather(*(ask([item]) for item in part)))

        if len(parts) == 1:
            # Not in a task, which would begin later: others would find the RM free meanwhile.
            told = await ask(parts[0])
        else:
            try:
                async with asyncio.TaskGroup() as tasks:
                    asked = [tasks.create_task(ask(part)) for part in parts]
            except ExceptionGroup as errors:
                raise errors.exceptions[0] from None
            told = _joined([task.result() for task in asked])
        if len(refused) == len(told.rewards):
            raise refused[0]
        return told

    async def _ask(self, items: Sequence[Content], deadline: float, *, alone: bool) -> Rewards:
        try:
            body = self._rendering.body(self.config.served_model, items)
            single = items if alone else None
            return await self._requester.ask(self._dialogue, body, len(items), deadline, single=single)
        except RenderError as error:
            raise self._unsent(error) from error

    def _is_sent(self, one: Prepared | RenderError) -> TypeGuard[Prepared]:
        """Return True if workers are asked about an instance: not if a part of it is too long, and that is refused."""
        return isinstance(one, Prepared) and not (one.too_long and self.config.over_long is OverLong.REFUSE)

    def _unsent(self, one: Prepared | RenderError) -> WorkerRejectedError:
        """The error of an instance that was not sent."""
        limit = self.max_model_len
        error = one
        if isinstance(one, Prepared):
            longest = max(one.too_long.values())
            error = TooLongError(f"{longest} tokens are more than the {limit} that it reads", longest, limit or longest)
        if isinstance(error, TooLongError):
            return WorkerTooLongError(
                f"RM {self.name!r}: {error}",
                details={"model": self.name, "tokens": error.tokens, "max_model_len": error.limit},
                final=self.config.over_long is OverLong.REFUSE,
            )
        return WorkerRejectedError(f"RM {self.name!r}: {error}", details={"model": self.name})

    def _out(self) -> WorkerUnavailableError:
        return WorkerUnavailableError(
            f"RM {self.name!r}: every replica is out or at its limit of {self.config.max_in_flight} requests",
            details={"model": self.name},
            retry_after_seconds=1,
        )


def _joined(parts: Sequence[Rewards]) -> Rewards:
    """Join the rewards of an instance's requests, in order; a head that a request lacks is NaN for its responses."""
    names = dict.fromkeys(name for part in parts for name in part.heads)
    absent = {id(part): [math.nan] * len(part.rewards) for part in parts}
    return Rewards(
        [reward for part in parts for reward in part.rewards],
        {name: [value for part in parts for value in part.heads.get(name, absent[id(part)])] for name in names},
    )


def _whole(told: Rewards, one: Prepared) -> Scored:
    """Return what an RM made of an instance, with NaN and a code for each response that is too long."""
    if not one.too_long and not any(map(math.isnan, told.rewards)):
        return Scored(told.rewards, one.prompt_tokens_cut, told.heads)
    count = len(one.contents) + len(one.too_long)
    sent = [place for place in range(count) if place not in one.too_long]

    def spread(values: Sequence[float]) -> list[float]:
        placed = dict(zip(sent, values, strict=True))
        return [placed.get(place, math.nan) for place in range(count)]

    rewards = spread(told.rewards)
    return Scored(
        rewards,
        one.prompt_tokens_cut,
        {name: spread(part) for name, part in told.heads.items()},
        [TOO_LONG if math.isnan(reward) else "" for reward in rewards],
    )


def _spread(scored: Scored, distinct: Sequence[Item], items: Sequence[Item]) -> Scored:
    """Return the rewards of the distinct items, given to each item."""
    if len(distinct) == len(items):
        return scored
    place = {item: index for index, item in enumerate(distinct)}
    order = [place[item] for item in items]
    components = {name: [part[index] for index in order] for name, part in scored.components.items()}
    failures = [scored.failures[index] for index in order] if scored.failures else ()
    return Scored([scored.rewards[index] for index in order], scored.prompt_tokens_cut, components, failures)

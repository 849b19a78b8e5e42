"""`JudgeScorer`: a generative model that compares or grades responses, behind any number of equal servers.

Two responses are compared in both orders; more by a bounded tournament; one is graded. Each comparison is a request of
its own, which `service.scorers.requests` makes. `service.scorers.judge.build` makes one per judge of the pool. Knows no
routing policy and no store.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import math
import secrets
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Final, Literal

import numpy as np

from router_core.attempts import TOO_LONG
from router_core.records import Instance
from router_core.tournament import choose_pairs, connects
from service.scorers.admission import Ticket
from service.scorers.judge.dialogue import ChatDialogue, ChatOptions
from service.scorers.judge.ranking import Comparison, components_of, rewards_of
from service.scorers.judge.rubrics import Mode, Rubric, RubricError, Style
from service.scorers.judge.verdicts import VerdictError
from service.scorers.judge.wire import Choice
from service.scorers.protocol import (
    AbstainedError,
    Scored,
    UnreadableVerdictError,
    WorkerError,
    WorkerRejectedError,
    WorkerTooLongError,
    WorkerUnavailableError,
)
from service.scorers.requests import Monitor
from service.scorers.served import ServedConfig, ServedScorer
from service.scorers.status import JudgingStatus, ScorerStatus

THREADED_RESPONSES: Final = 16
"""Responses of an instance from which their strengths are computed off the event loop."""


@dataclass(frozen=True, slots=True, kw_only=True)
class JudgeConfig(ServedConfig):
    """One judge of the pool file; see `ServedConfig`.

    Attributes:
        options: what requests hold.
        rubric: what is asked.
        mode: of instances with several responses; a single one is graded.
        verdict: how verdicts are read; `auto` for log-probabilities where the servers give readable ones, else text.
        comparisons: pairs compared per instance at most; see `router_core.tournament.choose_pairs`.
        answer_seconds: time in which a server says what it serves, and that `check` waits; verdicts may come later.
    """

    options: ChatOptions
    rubric: Rubric
    mode: Mode = Mode.PAIRWISE
    verdict: Literal["auto", "logprobs", "text"] = "auto"
    comparisons: int = 16
    parallel_requests: int = 64
    attempt_timeout_seconds: float = 60.0
    answer_seconds: float = 10.0


@dataclass(slots=True)
class Tally:
    """What has been seen of a judge's comparisons. Mutable."""

    comparisons: int = 0
    consistent: int = 0
    first_excess: float = 0.0

    def count(self, comparison: Comparison) -> None:
        """Count one comparison."""
        self.comparisons += 1
        self.consistent += comparison.consistent
        self.first_excess += (comparison.i_first + comparison.j_first) / 2.0 - 0.5

    @property
    def position_bias(self) -> float | None:
        """Mean probability of the response shown first, less ½; None before the first comparison."""
        return self.first_excess / self.comparisons if self.comparisons else None


class JudgeScorer(ServedScorer):
    """One judge behind equal servers; implements `service.scorers.protocol.Scorer`.

    Not thread-safe; one event loop. The owner calls `close`.

    Args:
        config: whom to ask and how.
        clock: monotonic seconds, for breakers and latencies.
        monitor: makes the health monitor; None where nobody checks.
        secret: from which the keys of blocks are made; random by default.

    Raises:
        ConfigurationError: a URL or the key cannot be used.
    """

    def __init__(
        self,
        config: JudgeConfig,
        *,
        clock: Callable[[], float] = time.monotonic,
        monitor: Callable[[JudgeScorer], Monitor] | None = None,
        secret: bytes | None = None,
    ) -> None:
        super().__init__(config, "judge", "judge", clock)
        self.config = config
        self.choosy = config.applies is not None or bool(config.rubric.requires)
        self.timeout_seconds = config.attempt_timeout_seconds
        self.dialogue = ChatDialogue(config.options)
        self.style = Style.BRACKETS if config.verdict == "text" else Style.LETTER
        self.secret = secret if secret is not None else secrets.token_bytes(32)
        self.tally = Tally()
        self._monitor = None if monitor is None else monitor(self)
        self._checking: asyncio.Task[None] | None = None

    def applies(self, instance: Instance) -> bool:
        """Return False if the pool file bars the instance, or it lacks what the rubric requires."""
        return self.config.rubric.covers(instance) and super().applies(instance)

    async def score(
        self, instances: Sequence[Instance], *, deadline: float, ticket: Ticket | None = None
    ) -> list[Scored | WorkerError]:
        """Ask about many instances; see `Scorer.score`."""
        shared = ticket is not None and ticket.shared
        if not (self.reachable if shared else self.available):
            return [self._out()] * len(instances)
        slots = ticket.slots if ticket is not None and shared else self.slots()
        return await asyncio.gather(*(self._judge(instance, deadline, slots) for instance in instances))

    def status(self) -> ScorerStatus:
        tally = self.tally
        return ScorerStatus(
            name=self.name,
            kind=self.kind,
            available=self.available,
            rendering=None,
            max_model_len=min((r.max_model_len for r in self.replicas if r.max_model_len is not None), default=None),
            over_long=None,
            replicas=[replica.snapshot().status() for replica in self.replicas],
            judging=JudgingStatus(
                rubric=self.config.rubric.name,
                verdict="logprobs" if self.style is Style.LETTER else "text",
                comparisons=tally.comparisons,
                position_bias=tally.position_bias,
                consistency=tally.consistent / tally.comparisons if tally.comparisons else None,
            ),
        )

    async def check(self) -> None:
        """Probe every server, but wait for that no longer than `answer_seconds`: a judge may take long to answer."""
        if self._monitor is not None:
            self._checking = asyncio.create_task(self._monitor.check_all())
            done, _ = await asyncio.wait({self._checking}, timeout=self.config.answer_seconds)
            for task in done:
                task.result()

    async def close(self) -> None:
        if self._checking is not None:
            self._checking.cancel()
            await asyncio.gather(self._checking, return_exceptions=True)
        await super().close()

    async def _judge(self, instance: Instance, deadline: float, slots: asyncio.Semaphore) -> Scored | WorkerError:
        """Return what the judge makes of one instance, or its error."""
        if not self.config.rubric.covers(instance):
            wanted = ", ".join(self.config.rubric.requires)
            return AbstainedError(
                f"judge {self.name!r} does not apply: its rubric needs {wanted}", details={"model": self.name}
            )
        distinct = tuple(dict.fromkeys(instance.responses))
        one_each = Instance(instance.prompt, distinct, instance.reference, instance.metadata)
        if self.config.mode is Mode.POINTWISE or len(instance.responses) == 1:
            outcome = await self._grade(one_each, deadline, slots)
        elif len(distinct) == 1:
            # The same text twice is equally good, whatever it is.
            return Scored([0.0] * len(instance.responses))
        else:
            outcome = await self._compare(one_each, deadline, slots)
        return outcome if isinstance(outcome, WorkerError) else _spread(outcome, distinct, instance.responses)

    async def _grade(self, instance: Instance, deadline: float, slots: asyncio.Semaphore) -> Scored | WorkerError:
        """Return a grade per response; those that have none fail alone unless all do."""
        grades = await asyncio.gather(
            *(self._ask(instance, (index,), deadline, slots) for index in range(len(instance.responses)))
        )
        failed = [grade for grade in grades if isinstance(grade, WorkerError)]
        if len(failed) == len(grades):
            # Another scorer may read what is too long; what is unreadable here is this judge's own.
            return next((error for error in failed if not isinstance(error, WorkerTooLongError)), failed[0])
        rewards = [math.nan if isinstance(grade, WorkerError) else grade for grade in grades]
        codes = [grade.code if isinstance(grade, WorkerError) else "" for grade in grades]
        return Scored(rewards, failures=codes if failed else ())

    async def _compare(self, instance: Instance, deadline: float, slots: asyncio.Semaphore) -> Scored | WorkerError:
        """Return strengths from comparisons; those that fail are left out while the others connect all responses.

        Where two responses are too long together, the longer one has no reward, and the others are compared.
        """
        left = [*range(len(instance.responses))]
        made: dict[tuple[int, int], Comparison | WorkerError] = {}
        while True:
            n = len(left)
            pairs = [(left[i], left[j]) for i, j in choose_pairs(n, self.config.comparisons, _rng(instance))]
            among = [(i, j) for i, j in made if i in left and j in left]
            if not connects(n, [(left.index(i), left.index(j)) for i, j in among]):
                made |= await self._compared(instance, [pair for pair in pairs if pair not in made], deadline, slots)
                among = [(i, j) for i, j in made if i in left and j in left]
            refused = [(pair, it) for pair in among if isinstance(it := made[pair], WorkerTooLongError)]
            if not refused:
                break
            longest = {max(pair, key=lambda place: len(instance.responses[place])) for pair, _ in refused}
            left = [place for place in left if place not in longest]
            if len(left) < 2:
                return refused[0][1]
        comparisons = [
            replace(it, pair=(left.index(it.pair[0]), left.index(it.pair[1])))
            for pair in among
            if isinstance(it := made[pair], Comparison)
        ]
        failed = [it for pair in among if isinstance(it := made[pair], WorkerError)]
        if failed and not connects(n, [one.pair for one in comparisons]):
            return failed[0]
        if n > THREADED_RESPONSES:
            rewards = await asyncio.to_thread(rewards_of, n, comparisons)
        else:
            rewards = rewards_of(n, comparisons)
        return _placed(Scored(rewards, components=components_of(n, comparisons)), left, len(instance.responses))

    async def _compared(
        self, instance: Instance, pairs: Sequence[tuple[int, int]], deadline: float, slots: asyncio.Semaphore
    ) -> dict[tuple[int, int], Comparison | WorkerError]:
        """Compare each pair in both orders, and count what is seen of the judge."""
        asked = await asyncio.gather(
            *(self._ask(instance, shown, deadline, slots) for i, j in pairs for shown in ((i, j), (j, i)))
        )
        made: dict[tuple[int, int], Comparison | WorkerError] = {}
        for pair, i_first, j_first in zip(pairs, asked[::2], asked[1::2], strict=True):
            if isinstance(i_first, WorkerError):
                made[pair] = i_first
            elif isinstance(j_first, WorkerError):
                made[pair] = j_first
            else:
                made[pair] = comparison = Comparison(pair, i_first, j_first)
                self.tally.count(comparison)
        return made

    async def _ask(
        self, instance: Instance, shown: Sequence[int], deadline: float, slots: asyncio.Semaphore
    ) -> float | WorkerError:
        """Return the number that one answer says, or the error for which there is none."""
        style, details = self.style, {"model": self.name}
        try:
            body = self.dialogue.body(self.config.rubric.write(instance, shown, style, self.secret), style)
        except (RubricError, UnicodeEncodeError) as error:
            return WorkerRejectedError(f"judge {self.name!r}: {error}", details=details)
        try:
            # Both orders of a pair are one input.
            single = [instance.prompt, *sorted(instance.responses[index] for index in shown)]
            choice = await self._exchange(body, self.dialogue.answer_tokens(style), single, deadline, slots)
        except WorkerError as error:
            return error
        try:
            return self.dialogue.number_of(choice, Mode.PAIRWISE if len(shown) == 2 else Mode.POINTWISE, style)
        except VerdictError as error:
            return UnreadableVerdictError(f"judge {self.name!r}: no verdict: {error}", details=details)

    async def _exchange(
        self, body: bytes, answer_tokens: int, single: Sequence[str], deadline: float, slots: asyncio.Semaphore
    ) -> Choice:
        """Make a request; while all servers ask for patience that fits the deadline, wait and make it again."""
        loop = asyncio.get_running_loop()
        while True:
            try:
                async with slots:
                    return await self._requester.ask(
                        self.dialogue, body, 1, deadline, single=single, answer_tokens=answer_tokens
                    )
            except WorkerUnavailableError:
                rest = min((one.rest_seconds for one in self.replicas if one.breaker.allows), default=0.0)
                if not 0.0 < rest < deadline - loop.time():
                    raise
            await asyncio.sleep(rest)

    def _out(self) -> WorkerUnavailableError:
        return WorkerUnavailableError(
            f"judge {self.name!r}: every server is out or at a limit (`max_in_flight`, "
            "`requests_per_minute`, `tokens_per_minute`)",
            details={"model": self.name},
            retry_after_seconds=1,
        )


def _rng(instance: Instance) -> np.random.Generator:
    """The generator of an instance: the same texts are compared by the same pairs."""
    texts = json.dumps([instance.prompt, *instance.responses]).encode()
    return np.random.default_rng(int.from_bytes(hashlib.blake2b(texts, digest_size=8).digest(), "big"))


def _placed(scored: Scored, places: Sequence[int], count: int) -> Scored:
    """Return what some of `count` responses have, at their places; the others are too long, and have nothing."""
    if len(places) == count:
        return scored

    def spread(values: Sequence[float]) -> list[float]:
        placed = dict(zip(places, values, strict=True))
        return [placed.get(place, math.nan) for place in range(count)]

    return Scored(
        spread(scored.rewards),
        components={name: spread(values) for name, values in scored.components.items()},
        failures=["" if place in places else TOO_LONG for place in range(count)],
    )


def _spread(scored: Scored, distinct: Sequence[str], responses: Sequence[str]) -> Scored:
    """Return what distinct responses have, given to each response."""
    if len(distinct) == len(responses):
        return scored
    places = [distinct.index(response) for response in responses]
    return Scored(
        [scored.rewards[place] for place in places],
        components={name: [values[place] for place in places] for name, values in scored.components.items()},
        failures=[scored.failures[place] for place in places] if scored.failures else (),
    )

"""History: what a run has decided of late, on all gateways, for people who watch it.

Each gateway keeps its newest decisions and counts in memory (`score` adds to them), and tells them to the store every
few seconds, behind the replies. `watch` reads there what all have told; while the store is away, it shows what this
gateway knows.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import msgspec

from router_core.attempts import ASKED
from router_core.records import Instance
from service.errors import ServiceError
from service.stores.protocol import Store
from service.usecases.decisions import StoredDecision

NEWEST = 40
"""Decisions that are kept: 100 kB for each run at d = 576, without texts."""

KEPT_SECONDS = 3600.0
"""How long the newest decisions, and the texts that are shown with them, stay in the store after the last one."""

SHOWN_CHARACTERS = 2_000
"""Of a prompt or a response, where texts are kept."""

SHOWN_RESPONSES = 8

DECISIONS, PRICE, ASKED_OF = "decisions", "price", "asked:"
"""Names of the counts; the last one is followed by an arm's index."""


class Texts(msgspec.Struct, frozen=True):
    """The beginnings of an instance's texts."""

    prompt: str
    responses: list[str]


class Decided(msgspec.Struct, frozen=True):
    """One decision.

    Attributes:
        decision_id: its name.
        stored: what the store has of it.
        draws: of every arm (K,), −inf for arms that the policy never asks; None where an earlier draw was followed.
        recorded: False if it could not be saved.
        texts: None where texts are not kept.
    """

    decision_id: str
    stored: StoredDecision
    draws: list[float] | None
    recorded: bool
    texts: Texts | None


@dataclass(frozen=True, slots=True)
class Totals:
    """What a run has decided, counted over all gateways since it began.

    Attributes:
        decisions: how many.
        price: of all of them, in units of the cheapest scorer.
        asked: how many of them each arm was asked about, by index.
    """

    decisions: int
    price: float
    asked: Mapping[int, int]


class DecisionHistory:
    """What this gateway has decided for one run and what it has read of the others.

    Attributes:
        newest: of this gateway, oldest first.
    """

    def __init__(self) -> None:
        self.newest: deque[Decided] = deque(maxlen=NEWEST)
        self._untold: deque[Decided] = deque(maxlen=NEWEST)
        self._counts: Counter[str] = Counter()
        self._price = 0.0
        self._told: Mapping[str, float] = {}

    def add(self, decided: Decided) -> None:
        """Take one more."""
        self.newest.append(decided)
        self._untold.append(decided)
        self._counts[DECISIONS] += 1
        for attempt in decided.stored.attempts:
            self._price += attempt.price
            if attempt.outcome in ASKED:
                self._counts[f"{ASKED_OF}{attempt.arm}"] += 1

    async def tell(self, store: Store, run: str) -> None:
        """Tell the store what was decided since the last time; without anything new the store is not asked.

        Raises:
            ServiceError: the store is away; the next call tries again.
        """
        if not self._counts:
            return
        counts, price, untold = self._counts, self._price, [*self._untold]
        self._counts, self._price = Counter(), 0.0
        self._untold.clear()
        newest = [(one.stored.time_ms, _ENCODER.encode(one)) for one in untold]
        try:
            await store.tell_activity(run, {**counts, PRICE: price}, newest, keep=NEWEST, seconds=KEPT_SECONDS)
        except ServiceError:
            self._counts += counts
            self._price += price
            self._untold.extendleft(reversed(untold[: NEWEST - len(self._untold)]))
            raise

    async def read(self, store: Store, run: str, *, newest: bool) -> list[Decided]:
        """Read what all gateways have told; return the newest decisions of all, oldest first.

        Where the store is away, `totals` says what was read last, and the decisions are this gateway's.

        Args:
            store: where they told it.
            run: of this history.
            newest: False to read the counts only, and return nothing.
        """
        try:
            activity = await store.activity(run, newest=NEWEST if newest else 0)
        except ServiceError:
            return [*self.newest] if newest else []
        self._told = activity.counts
        found = {one.decision_id: one for one in _decoded(activity.newest)}
        if newest:
            # Of those that are not told yet; and of all, where the store has dropped them since nobody decides.
            found |= {one.decision_id: one for one in self.newest}
        return sorted(found.values(), key=lambda one: one.stored.time_ms)[-NEWEST:]

    @property
    def totals(self) -> Totals:
        """What was read last, with what this gateway has not told yet."""
        counts = Counter(self._counts)
        counts.update({name: int(count) for name, count in self._told.items() if name != PRICE})
        asked = {int(name[len(ASKED_OF) :]): count for name, count in counts.items() if name.startswith(ASKED_OF)}
        return Totals(counts[DECISIONS], self._told.get(PRICE, 0.0) + self._price, asked)


def beginnings(instance: Instance) -> Texts:
    """Return the beginnings of the instance's texts."""
    responses = [response[:SHOWN_CHARACTERS] for response in instance.responses[:SHOWN_RESPONSES]]
    return Texts(instance.prompt[:SHOWN_CHARACTERS], responses)


def _decoded(told: Sequence[bytes]) -> list[Decided]:
    """Return decisions as gateways have told them, without those that are in other words than this one's."""
    found = []
    for one in told:
        try:
            found.append(_DECODER.decode(one))
        except msgspec.DecodeError:
            continue
    return found


_ENCODER = msgspec.msgpack.Encoder()
_DECODER = msgspec.msgpack.Decoder(Decided)

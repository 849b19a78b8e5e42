"""Sticky choices: singles of one prompt are asked of the RM that the first of them drew, on every gateway, for a while.

A trainer that sends one response at a time carries no group id, and rewards of different RMs cannot be compared. So
the first draw for (run, policy, prompt) is kept in the store, whole: with its ranking, so that all gateways fall back
to the same RM, and with its beliefs, so that what is logged is the propensity of the draw that made the choice. Pairs
and groups are scored by one RM anyway and never come here. Called by `score`; knows no RM and no reward.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import msgspec

from service.errors import StoreUnavailableError
from service.stores.protocol import Store
from service.telemetry import Telemetry


class StickyChoice(msgspec.Struct, frozen=True, array_like=True):
    """One draw, as it sticks.

    Attributes:
        order: arms by decreasing draw, those that the policy never asks left out.
        means: of the draws, per arm.
        sds: of the draws, per arm.
        propensities: of every arm, as drawn.
        version: events the posterior had learned from.
        floors: as `StoredDecision.floors`.
        group: id of the audit that compares the singles; "" where audits are off.
        inclusion: probability with which they are audited; None where audits are off.
    """

    order: list[int]
    means: list[float]
    sds: list[float]
    propensities: list[float]
    version: int
    floors: list[float]
    group: str = ""
    inclusion: float | None = None


_ENCODER = msgspec.msgpack.Encoder()
_DECODER = msgspec.msgpack.Decoder(StickyChoice)


def sticky_key(policy: str, prompt: str) -> str:
    """Names the choice inside its run. Policies do not share one: a request that names another gets another draw."""
    h = hashlib.blake2b(policy.encode(), digest_size=16, person=b"sticky")
    h.update(b"\0" + prompt.encode("utf-8", "surrogatepass"))
    return h.hexdigest()


class StickyChoices:
    """Makes choices stick; one per process.

    Args:
        store: where they stand.
        telemetry: counters.
        seconds: how long a choice sticks, from the draw that made it; 0 for not at all.
        required: whether a store that is away is an error; else every instance keeps its own draw then.
    """

    def __init__(self, store: Store, telemetry: Telemetry, *, seconds: float, required: bool) -> None:
        self.seconds = seconds
        self._store = store
        self._telemetry = telemetry
        self._required = required

    async def settle(self, run: str, drawn: Sequence[tuple[str, StickyChoice]]) -> list[StickyChoice | None]:
        """Offer each draw under its key.

        Args:
            run: whose instances they are.
            drawn: (key, the instance's own draw).

        Returns:
            Per instance, in order, the draw to follow; None where its own one now stands.

        Raises:
            StoreUnavailableError: the store is away, and rewards are refused then.
        """
        offers = [(key, _ENCODER.encode(choice)) for key, choice in drawn]
        try:
            standing = await self._store.stick(run, offers, seconds=self.seconds)
        except StoreUnavailableError:
            self._telemetry.store_errors.labels("stick").inc()
            if self._required:
                raise
            return [None] * len(offers)
        followed = len(standing) - standing.count(None)
        self._telemetry.sticky.labels(run, "followed").inc(followed)
        self._telemetry.sticky.labels(run, "made").inc(len(standing) - followed)
        return [None if found is None else _DECODER.decode(found) for found in standing]

"""Decisions and feedback against a store itself, while something happens to it; every acknowledgement is kept."""

from __future__ import annotations

import os
import time

import msgspec

from service.errors import StoreUnavailableError
from service.stores.ids import new_decision_id
from service.stores.protocol import DecisionRecord, FeedbackRecord, FeedbackStatus
from service.stores.redis import RedisStore
from tests.support.gateway import until


def decision(content_key: str | None = None) -> DecisionRecord:
    """A fresh decision about two responses."""
    decision_id = new_decision_id(time.time_ns() // 1_000_000, os.urandom(10))
    return DecisionRecord(decision_id, msgspec.msgpack.encode({"n": 2}), content_key)


class Traffic:
    """Decisions and feedback of one run, one after the other, until stopped; every acknowledgement is kept."""

    def __init__(self, store: RedisStore, run: str) -> None:
        self._store = store
        self._run = run
        self._stopped = False
        self.acknowledged: dict[str, str] = {}
        """Event id -> decision id."""

        self.refused = 0

    async def __call__(self) -> None:
        while not self._stopped:
            record = decision()
            feedback = [FeedbackRecord(b"1", decision_id=record.decision_id)]
            while not await self._saved(record):
                pass
            while not self._stopped:
                try:
                    (result,) = await self._store.apply_feedback(self._run, feedback)
                except StoreUnavailableError:
                    self.refused += 1
                    continue
                # A repetition of our own, or of the client after a drop, is a duplicate.
                assert result.status in (FeedbackStatus.APPLIED, FeedbackStatus.DUPLICATE)
                assert result.event_id is not None
                self.acknowledged[result.event_id] = record.decision_id
                break

    async def _saved(self, record: DecisionRecord) -> bool:
        try:
            await self._store.save_decisions(self._run, [record])
        except StoreUnavailableError:
            self.refused += 1
            return self._stopped
        return True

    async def further(self, count: int) -> None:
        """Wait for so many more acknowledgements."""
        wanted = len(self.acknowledged) + count
        await until(lambda: len(self.acknowledged) >= wanted, f"{wanted} acknowledgements", 60)

    def stop(self) -> None:
        """Let it end after what is under way."""
        self._stopped = True


async def check_log(store: RedisStore, run: str, acknowledged: dict[str, str]) -> None:
    """Everything acknowledged is in the log, under its id, and nothing is there twice."""
    log = await store.read_log(run, "0-0", count=1_000_000, block_ms=0)
    assert acknowledged.items() <= {entry.event_id: entry.decision_id for entry in log}.items()
    assert len({entry.decision_id for entry in log}) == len(log)
    assert (await store.log_status(run)).appended == len(log)

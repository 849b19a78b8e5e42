"""A decision's life as a state machine: whatever is done to it in whatever order, the log tells it once.

Two gateways share a real store and a run. Hypothesis decides, teaches, repeats, contradicts, judges, lets time pass and
restarts gateways; a model of a few lines says what each answer must be.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from hypothesis import Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, precondition, rule, run_state_machine_as_test

from router_core.records import Source
from service.stores.redis import RedisStore
from tests.support.clock import Clock
from tests.support.gateway import Gateway, fresh_run, open_gateway, pair, read_decision, until

if TYPE_CHECKING:
    from tests.conftest import ValkeyProcess

WINDOW_SECONDS = 3600.0
AUDIT = {"referee": "rm-c", "rate": 0.5, "schedule": "even"}

replicas = st.integers(0, 1)
choices = st.integers(0, 1)
places = st.integers(0, 1_000_000)


@dataclass
class Decided:
    """What the model knows of a decision."""

    index: int
    value: int | None = None
    event_id: str | None = None
    judged: int | None = None
    expired: bool = False


class Life(RuleBasedStateMachine):
    """See the module.

    Args:
        server_url: the store.
    """

    def __init__(self, server_url: str) -> None:
        super().__init__()
        self.url = server_url
        self.run = fresh_run("life")
        self.clock = Clock(lambda _: server_url)
        self.loop = asyncio.Runner()
        self.decided: dict[str, Decided] = {}
        self.open: list[Any] = [None, None]
        self.gateways: list[Gateway] = [self.start(0), self.start(1)]

    def start(self, replica: int) -> Gateway:
        """Start a gateway in the place of one that is not there."""
        store = RedisStore(self.url, window_seconds=WINDOW_SECONDS, timeout_seconds=10, now_ms=self.clock.now_ms)
        self.open[replica] = open_gateway(
            self.url, store=store, run=self.run, audit=AUDIT, seed=replica, block_size=4, refresh_events=8
        )
        gateway: Gateway = self.loop.run(self.open[replica].__aenter__())
        return gateway

    def post(self, replica: int, path: str, document: object) -> Any:
        """POST to one of the gateways."""
        return self.loop.run(self.gateways[replica].client.post(path, document))

    def one(self, place: int) -> tuple[str, Decided]:
        """Return one of the decisions."""
        return list(self.decided.items())[place % len(self.decided)]

    @rule(replica=replicas, index=st.integers(0, 30))
    def decide(self, replica: int, index: int) -> None:
        """A reward that is answered has its record."""
        reply = self.post(replica, "/reward", pair(index))
        assert reply.status == 200, reply.body
        name = reply.json["decision_id"]
        assert name not in self.decided
        assert reply.json["recorded"]
        assert read_decision(self.url, self.run, name) is not None
        self.decided[name] = Decided(index)

    @precondition(lambda self: self.decided)
    @rule(replica=replicas, place=places, preferred=choices)
    def teach(self, replica: int, place: int, preferred: int) -> None:
        """Feedback is new, a duplicate, a conflict or too late, as the model says."""
        name, one = self.one(place)
        answer = self.post(replica, "/feedback", {"decision_id": name, "preferred": preferred})
        if one.value is None:
            assert answer.status == (410 if one.expired else 200), answer.body
            if not one.expired:
                assert answer.json["duplicate"] is False
                one.value, one.event_id = preferred, answer.json["event_id"]
        elif one.expired and answer.status == 410:
            pass
        elif one.value == preferred:
            assert (answer.status, answer.json["duplicate"]) == (200, True), answer.body
            assert answer.json["event_id"] == one.event_id
        else:
            assert (answer.status, answer.error["code"]) == (409, "feedback_conflict")

    @precondition(lambda self: self.decided)
    @rule(replica=replicas, place=places, preferred=choices)
    def judge(self, replica: int, place: int, preferred: int) -> None:
        """A person may judge what was audited, once."""
        name, one = self.one(place)
        answer = self.post(replica, "/audits/judge", {"decision_id": name, "preferred": preferred})
        if answer.status == 404:
            assert one.judged is None
        elif one.judged is None:
            assert (answer.status, answer.json["duplicate"]) == (200, False), answer.body
            one.judged = preferred
        elif one.judged == preferred:
            assert (answer.status, answer.json["duplicate"]) == (200, True), answer.body
        else:
            assert answer.status == 409

    @rule(replica=replicas)
    def teach_unknown(self, replica: int) -> None:
        """Nothing is learned of a decision that never was."""
        answer = self.post(replica, "/feedback", {"decision_id": "d" + "0" * 26, "preferred": 0})
        assert answer.status in (404, 410)

    @rule()
    def expire(self) -> None:
        """The feedback window of all decisions passes."""
        self.clock.advance(WINDOW_SECONDS * 1.5, self.run)
        for one in self.decided.values():
            one.expired = True

    @rule(replica=replicas)
    def restart(self, replica: int) -> None:
        """A gateway ends, and another one begins."""
        self.loop.run(self.open[replica].__aexit__(None, None, None))
        self.gateways[replica] = self.start(replica)

    @rule()
    def compare(self) -> None:
        """The log holds what was acknowledged, once; both gateways have folded it into the same posterior."""

        async def same() -> bool:
            count = len(self.gateways[0].events())
            found = [await gateway.learned(count) for gateway in self.gateways]
            now = len(self.gateways[0].events())
            if not all(one["version"] == now for one in found):
                return False
            folded = self.gateways[0].folded()
            assert [one["digest"] for one in found] == [folded.digest()] * 2
            return True

        self.loop.run(until(same, "both have learned the log"))
        events = self.gateways[0].events()
        counts = Counter((event.decision_id, event.source) for event in events)
        assert max(counts.values(), default=1) == 1
        assert {event.decision_id for event in events} <= set(self.decided)
        taught = {event.decision_id: event.feedback.value for event in events if event.source is Source.TRAINER}
        assert taught == {name: one.value for name, one in self.decided.items() if one.value is not None}
        people = {event.decision_id: event.feedback.value for event in events if event.source is Source.PERSON}
        assert people == {name: one.judged for name, one in self.decided.items() if one.judged is not None}

    def teardown(self) -> None:
        """Compare once more, and end."""
        try:
            self.compare()
        finally:
            for opened in self.open:
                self.loop.run(opened.__aexit__(None, None, None))
            self.loop.close()


def test_a_decisions_life_is_told_once(valkey_server: ValkeyProcess) -> None:
    run_state_machine_as_test(
        lambda: Life(valkey_server.url),
        settings=settings(
            max_examples=8,
            stateful_step_count=20,
            phases=[Phase.generate],
            deadline=None,
            derandomize=True,
            database=None,
        ),
    )

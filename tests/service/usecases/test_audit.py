"""Audits through the real application: a rule worker judges chosen decisions after the reply, and the run learns."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import pytest
import redis

from router_core.audits.schedule import is_chosen
from router_core.audits.signs import signs_of
from router_core.records import TIE, Source
from service.errors import ConfigurationError
from service.scorers.protocol import AbstainedError, WorkerUnavailableError
from service.stores.redis import RedisStore
from service.usecases import audit
from service.usecases.audit_choice import decode_task
from service.usecases.decisions import StoredDecision
from tests.support.gateway import Gateway, fresh_run, open_gateway, pair, until
from tests.support.rules import rule_worker
from tests.support.votes import MODELS, VOTES, checkpoint

if TYPE_CHECKING:
    from tests.conftest import ValkeyProcess

EVERY = {"referee": "sums", "rate": 1.0, "schedule": "even"}


@pytest.fixture(scope="module")
def rule_url() -> Iterator[str]:
    with rule_worker("--rule", "math", "--name", "sums") as url:
        yield url


def sums(url: str, **fields: Any) -> list[dict[str, Any]]:
    return [{"name": "sums", "kind": "rule", "urls": [url], **fields}]


@pytest.fixture
async def gateway(valkey_server: ValkeyProcess, rule_url: str) -> AsyncIterator[Gateway]:
    """Every decision is audited by the rule; rm-c prefers the shorter response."""
    async with open_gateway(valkey_server.url, audit=EVERY, referees=sums(rule_url, price=2.0)) as opened:
        opened.arm("rm-c").score_of = lambda _, response: -float(len(response))
        yield opened


def sum_of(index: int, *, right: int = 0) -> dict[str, Any]:
    """A sum with its reference; the longer response is wrong unless `right` says otherwise."""
    answers = ["12", f"The answer is surely {index + 20}"]
    return {"prompt": f"What is 7 + 5? ({index})", "responses": answers, "reference": ["12", str(index + 20)][right]}


async def counted(gateway: Gateway, **expected: float) -> None:
    """Wait until exactly these outcomes of audits are counted."""

    async def reached() -> bool:
        text = (await gateway.client.get("/metrics")).body.decode()
        found = {
            line.split('outcome="')[1].split('"')[0]: float(line.rsplit(" ", 1)[1])
            for line in text.splitlines()
            if line.startswith("reward_router_audits_total{") and f'run="{gateway.run}"' in line
        }
        return found == expected

    await until(reached, f"audits {expected}")


async def test_a_rule_judges_after_the_reply_and_every_rm_learns(gateway: Gateway) -> None:
    reply = await gateway.client.ok("/reward", {**sum_of(0), "policy": "single:rm-a"})
    await counted(gateway, recorded=1.0)
    (event,) = gateway.events()
    assert (event.source, event.decision_id, event.feedback.value) == (Source.AUDIT, reply["decision_id"], 0.0)
    assert event.audit is not None
    assert (event.audit.referee, event.audit.verdict, event.audit.probability) == ("sums", 0, 1.0)
    assert (event.arm, event.credit) == (0, 0.0)
    assert [(arm, credit) for arm, _, credit in event.shadows] == [(1, 0.0), (2, 1.0)]
    learned = await gateway.learned(1)
    assert [model["feedbacks"] for model in learned["models"]] == [1, 1, 1]
    assert learned["digest"] == gateway.folded().digest()
    stored = gateway.decision(reply["decision_id"]).audit
    assert stored is not None
    assert stored.price == 2.0 + 2.0


async def test_drawn_asks_nobody_else(valkey_server: ValkeyProcess, rule_url: str) -> None:
    setting = {**EVERY, "ask": "drawn"}
    async with open_gateway(valkey_server.url, audit=setting, referees=sums(rule_url)) as gateway:
        await gateway.client.ok("/reward", {**sum_of(0), "policy": "single:rm-b"})
        await counted(gateway, recorded=1.0)
        assert [len(arm.calls) for arm in gateway.arms] == [0, 1, 0]
        assert [event.shadows for event in gateway.events()] == [()]


async def test_gold_that_comes_later_wins(gateway: Gateway) -> None:
    reply = await gateway.client.ok("/reward", {**sum_of(0), "policy": "single:rm-a"})
    await counted(gateway, recorded=1.0)
    await gateway.client.ok("/feedback", {"decision_id": reply["decision_id"], "preferred": 1})
    first, second = gateway.events()
    assert (first.source, first.feedback.value, first.credit) == (Source.AUDIT, 0.0, 0.0)
    assert (second.source, second.feedback.value, second.credit) == (Source.TRAINER, 1.0, 1.0)
    assert second.audit is not None
    assert sorted(second.audit.taught) == [(0, 0.0), (1, 0.0), (2, 1.0)]
    learned = await gateway.learned(2)
    assert learned["digest"] == gateway.folded().digest()


async def test_gold_that_came_first_is_kept_beside_the_audit(valkey_server: ValkeyProcess, rule_url: str) -> None:
    run = fresh_run()
    # The first gateway has no time to audit: its referee is asked by the second one.
    async with open_gateway(valkey_server.url, run=run, audit=EVERY, referees=sums("http://127.0.0.1:9")) as gateway:
        reply = await gateway.client.ok("/reward", {**sum_of(0), "policy": "single:rm-a"})
        await counted(gateway, away=1.0)
        await gateway.client.ok("/feedback", {"decision_id": reply["decision_id"], "preferred": 1})
    unlease(valkey_server.url, run)
    async with open_gateway(valkey_server.url, run=run, audit=EVERY, referees=sums(rule_url)) as gateway:
        await counted(gateway, recorded=1.0)
        first, second = gateway.events()
        assert (first.source, first.feedback.value, first.audit) == (Source.TRAINER, 1.0, None)
        assert second.audit is not None
        assert (second.source, second.audit.verdict, second.audit.after_gold) == (Source.AUDIT, 0, True)
        # Gold has taught rm-a; the others were asked by the audit and learn from gold.
        assert (second.arm, [(arm, credit) for arm, _, credit in second.shadows]) == (-1, [(1, 1.0), (2, 1.0)])
        assert second.audit.earned == 1.0
        assert (await gateway.learned(2))["digest"] == gateway.folded().digest()


def unlease(url: str, run: str) -> None:
    """Let the leases of a run's waiting decisions end now."""
    with redis.Redis.from_url(url) as client:
        for name in client.zrange(f"rr:{{{run}}}:waiting", 0, -1):  # type: ignore[union-attr]
            client.zadd(f"rr:{{{run}}}:waiting", {name: 0})


async def test_what_was_chosen_survives_a_restart_with_its_texts(valkey_server: ValkeyProcess, rule_url: str) -> None:
    run = fresh_run()
    async with open_gateway(valkey_server.url, run=run, audit=EVERY, referees=sums("http://127.0.0.1:9")) as gateway:
        reply = await gateway.client.ok("/reward", sum_of(3))
        await counted(gateway, away=1.0)
        assert gateway.events() == []
    with redis.Redis.from_url(valkey_server.url) as client:
        task: Any = client.get(f"rr:{{{run}}}:t:{reply['decision_id']}")
    ((_, instance),) = decode_task(task)
    assert (list(instance.responses), instance.reference) == (sum_of(3)["responses"], "12")
    unlease(valkey_server.url, run)
    async with open_gateway(valkey_server.url, run=run, audit=EVERY, referees=sums(rule_url)) as gateway:
        await counted(gateway, recorded=1.0)
        assert [event.decision_id for event in gateway.events()] == [reply["decision_id"]]
        assert [len(arm.calls) for arm in gateway.arms].count(1) == 2, "only those who were not asked before"


async def test_gateways_share_the_work_without_doing_it_twice(valkey_server: ValkeyProcess, rule_url: str) -> None:
    run = fresh_run()
    async with (
        open_gateway(valkey_server.url, run=run, audit=EVERY, referees=sums(rule_url)) as one,
        open_gateway(valkey_server.url, run=run, audit=EVERY, referees=sums(rule_url)) as two,
    ):
        ids = []
        for start in range(0, 60, 20):
            items = [sum_of(index) for index in range(start, start + 20)]
            results = (await one.client.ok("/reward/batch", {"items": items}))["results"]
            ids += [result["decision_id"] for result in results]
        await one.learned(60)
        first, second = await one.learned(60), await two.learned(60)
        assert first["digest"] == second["digest"] == one.folded().digest()
        assert sorted(event.decision_id for event in one.events()) == sorted(ids)
        assert sum(len(call) for arm in (*one.arms, *two.arms) for call in arm.calls) == 60 * 3 * 2


async def test_the_share_and_its_probability_are_as_configured(valkey_server: ValkeyProcess, rule_url: str) -> None:
    setting = {**EVERY, "rate": 0.3}
    async with open_gateway(valkey_server.url, audit=setting, referees=sums(rule_url)) as gateway:
        items = [sum_of(index) for index in range(200)]
        results = (await gateway.client.ok("/reward/batch", {"items": items}))["results"]
        chosen = {result["decision_id"] for result in results if is_chosen(result["decision_id"], 0.3)}
        assert 30 < len(chosen) < 90
        assert {gateway.decision(result["decision_id"]).inclusion for result in results} == {0.3}
        await counted(gateway, recorded=float(len(chosen)))
        assert {event.decision_id for event in gateway.events()} == chosen


async def test_a_front_schedule_goes_on_over_gateways(valkey_server: ValkeyProcess, rule_url: str) -> None:
    run, setting = fresh_run(), {"referee": "sums", "rate": 0.01}
    found = []
    for _ in range(2):
        async with open_gateway(valkey_server.url, run=run, audit=setting, referees=sums(rule_url)) as gateway:
            for index in range(3):
                reply = await gateway.client.ok("/reward", sum_of(index))
                found.append(gateway.decision(reply["decision_id"]).inclusion)
    assert all(later < earlier for earlier, later in itertools.pairwise(found)), found


async def test_the_first_referee_that_does_not_abstain_is_heard(valkey_server: ValkeyProcess, rule_url: str) -> None:
    setting = {**EVERY, "referee": ["sums", "rm-c"]}
    async with open_gateway(valkey_server.url, audit=setting, referees=sums(rule_url)) as gateway:
        await gateway.client.ok("/reward", {**pair(), "policy": "single:rm-a"})
        await counted(gateway, recorded=1.0)
        await gateway.client.ok("/reward", {**sum_of(1), "policy": "single:rm-a"})
        await counted(gateway, recorded=2.0)
        referees = [event.audit.referee for event in gateway.events() if event.audit is not None]
        assert referees == ["rm-c", "sums"]
        assert [len(call) for call in gateway.arm("rm-c").calls] == [2, 2], "an arm's answer is used, not asked again"


async def test_the_vote_of_all_rms_may_be_the_referee(valkey_server: ValkeyProcess, tmp_path: Path) -> None:
    path, encoder = checkpoint(tmp_path, VOTES)
    setting = {**EVERY, "referee": "stacked"}
    async with open_gateway(
        valkey_server.url, models=MODELS, encoder=encoder, checkpoint=path, audit=setting
    ) as gateway:
        gateway.arm("rm-a").score_of = lambda _, response: -float(len(response))
        await gateway.client.ok("/reward", {**pair(), "policy": "single:rm-a"})
        await counted(gateway, recorded=1.0)
        (event,) = gateway.events()
        assert event.audit is not None
        assert (event.audit.referee, event.audit.verdict, event.credit) == ("stacked", 1, 0.0)
    async with open_gateway(valkey_server.url, audit=setting) as gateway:
        await gateway.client.ok("/reward", pair())
        await counted(gateway, abstained=1.0)


async def test_where_all_abstain_nothing_is_learned(gateway: Gateway) -> None:
    await gateway.client.ok("/reward", pair())
    await counted(gateway, abstained=1.0)
    assert gateway.events() == []
    assert sum(len(arm.calls) for arm in gateway.arms) == 1, "nobody else is asked in vain"


async def test_a_tie_of_the_referee_teaches_nothing(gateway: Gateway) -> None:
    await gateway.client.ok("/reward", {**sum_of(0), "reference": "99"})
    await counted(gateway, recorded=1.0)
    (event,) = gateway.events()
    assert event.audit is not None
    assert (event.audit.verdict, event.credit, event.shadows) == (TIE, None, ())
    assert (await gateway.learned(1))["digest"] == gateway.folded().digest()


async def test_a_decision_that_fails_alone_is_given_up_and_the_others_are_not(
    gateway: Gateway, monkeypatch: pytest.MonkeyPatch
) -> None:
    def poisoned(response: str) -> tuple[float, ...]:
        if "21" in response:
            raise ZeroDivisionError(response)
        return signs_of(response)

    monkeypatch.setattr(audit, "signs_of", poisoned)
    await gateway.client.ok("/reward/batch", {"items": [sum_of(index) for index in range(3)]})
    await counted(gateway, recorded=2.0, failed=1.0)
    assert len(gateway.events()) == 2


async def test_runs_of_losses_are_not_audited(gateway: Gateway) -> None:
    run = gateway.run + "-losses"
    first = await gateway.client.ok("/reward", {**sum_of(0), "run": run, "signal": "loss"})
    await gateway.client.ok("/reward", sum_of(1))
    # The later one has been audited; the first one was given no probability of it.
    await counted(gateway, recorded=1.0)
    assert gateway.events(run) == []
    assert gateway.decision(first["decision_id"], run).inclusion is None


async def test_singles_that_share_no_draw_are_not_audited(valkey_server: ValkeyProcess, rule_url: str) -> None:
    async with open_gateway(valkey_server.url, audit=EVERY, referees=sums(rule_url), sticky_seconds=0.0) as gateway:
        reply = await gateway.client.ok("/reward", {"prompt": "What is 7 + 5?", "responses": ["12"]})
        assert gateway.decision(reply["decision_id"]).inclusion is None


async def test_a_budget_stops_audits_for_the_hour(valkey_server: ValkeyProcess, rule_url: str) -> None:
    setting = {**EVERY, "budget": 3.0}
    async with open_gateway(valkey_server.url, audit=setting, referees=sums(rule_url)) as gateway:
        await gateway.client.ok("/reward", sum_of(0))
        await counted(gateway, recorded=1.0)
        await gateway.client.ok("/reward", sum_of(1))

        async def waiting() -> bool:
            text = (await gateway.client.get("/metrics")).body.decode()
            return f'reward_router_audits_waiting{{run="{gateway.run}"}} 1.0' in text

        await until(waiting, "one waits")
        assert len(gateway.events()) == 1


async def test_audits_wait_while_requests_are_answered(gateway: Gateway, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(audit, "YIELD_SECONDS", 3600.0)
    gate = asyncio.Event()
    gateway.arm("rm-b").gate = gate
    slow = asyncio.ensure_future(gateway.client.ok("/reward", {**sum_of(0), "policy": "single:rm-b"}))
    await until(lambda: gateway.arm("rm-b").calls, "asked")
    await gateway.client.ok("/reward", {**sum_of(1), "policy": "single:rm-a"})
    await asyncio.sleep(0.05)
    assert gateway.events() == []
    gate.set()
    await slow
    await counted(gateway, recorded=2.0)


async def test_an_rm_that_is_away_leaves_the_others_to_learn(gateway: Gateway) -> None:
    gateway.arm("rm-b").error = WorkerUnavailableError("down")
    gateway.arm("rm-c").error = AbstainedError("not for me")
    await gateway.client.ok("/reward", {**sum_of(0), "policy": "single:rm-a"})
    await counted(gateway, recorded=1.0)
    (event,) = gateway.events()
    assert (event.arm, event.credit, event.shadows) == (0, 0.0, ())


async def test_a_referee_that_read_a_part_has_no_opinion(valkey_server: ValkeyProcess) -> None:
    async with open_gateway(valkey_server.url, audit={**EVERY, "referee": "rm-b"}) as gateway:
        gateway.arm("rm-b").too_long = lambda response: response != "12"
        for policy in ("single:rm-a", "single:rm-b"):
            reply = await gateway.client.ok("/reward", {**sum_of(0), "policy": policy})
        assert reply["failure"] == [None, "too_long"]
        await counted(gateway, abstained=2.0)
        assert gateway.events() == []


async def test_a_shadow_leaves_what_is_audited_to_the_audit(valkey_server: ValkeyProcess, rule_url: str) -> None:
    async with open_gateway(valkey_server.url, audit=EVERY, referees=sums(rule_url), shadow_rate=1.0) as gateway:
        await gateway.client.ok("/reward", sum_of(0))
        await counted(gateway, recorded=1.0)
        assert [sum(map(len, arm.calls)) for arm in gateway.arms] == [2, 2, 2]


async def test_without_audits_nothing_of_them_is_stored(valkey_server: ValkeyProcess) -> None:
    async with open_gateway(valkey_server.url) as gateway:
        reply = await gateway.client.ok("/reward", sum_of(0))
        with redis.Redis.from_url(valkey_server.url) as client:
            raw: Any = client.get(f"rr:{{{gateway.run}}}:d:{reply['decision_id']}")
            kept = client.exists(f"rr:{{{gateway.run}}}:schedule", f"rr:{{{gateway.run}}}:waiting")
        assert kept == 0
        assert "inclusion" not in msgspec.msgpack.decode(raw.split(b" ", 1)[1])
        assert isinstance(gateway.decision(reply["decision_id"]), StoredDecision)


async def test_a_signal_that_is_no_preference_is_refused(valkey_server: ValkeyProcess, rule_url: str) -> None:
    with pytest.raises(ConfigurationError, match="signal is 'loss'"):
        async with open_gateway(valkey_server.url, audit=EVERY, referees=sums(rule_url), signal="loss"):
            pass


async def test_a_store_that_is_away_loses_no_chosen_decision(own_valkey_server: ValkeyProcess, rule_url: str) -> None:
    async with open_gateway(own_valkey_server.url, audit=EVERY, referees=sums(rule_url)) as gateway:
        original = RedisStore.finish_audits
        failures = []

        async def failing(*args: Any, **kwargs: Any) -> Any:
            failures.append(1)
            raise WorkerUnavailableError("store away")

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(RedisStore, "finish_audits", failing)
            await gateway.client.ok("/reward", sum_of(0))
            await until(lambda: failures, "a failure")
        assert RedisStore.finish_audits is original
        unlease(own_valkey_server.url, gateway.run)
        await counted(gateway, recorded=1.0)
        assert len(gateway.events()) == 1


def single(index: int, text: str, prompt: int = 0) -> dict[str, Any]:
    """One response to a sum; a group has sum, reference and RM in common."""
    return {"prompt": f"What is 7 + 5? ({prompt})", "responses": [text], "reference": "12"}


ANSWERS = ["12", "It is 11, I would say", "twelve or 13"]


def end_collecting(url: str, run: str) -> list[str]:
    """Let the time of a run's groups be over; return their ids."""
    with redis.Redis.from_url(url) as client:
        names: Any = client.zrange(f"rr:{{{run}}}:waiting", 0, -1)
    unlease(url, run)
    return [name.decode() for name in names]


async def test_singles_of_a_prompt_are_compared_once_they_are_there(
    valkey_server: ValkeyProcess, rule_url: str
) -> None:
    run = fresh_run()
    async with open_gateway(valkey_server.url, run=run, audit=EVERY, referees=sums(rule_url)) as gateway:
        gateway.arm("rm-c").score_of = lambda _, response: -float(len(response))
        replies = [await gateway.client.ok("/reward", single(i, text)) for i, text in enumerate(ANSWERS[:2])]
        other = await gateway.client.ok("/reward", single(0, "12", prompt=1))
        assert gateway.events() == []
    async with open_gateway(valkey_server.url, run=run, audit=EVERY, referees=sums(rule_url)) as gateway:
        gateway.arm("rm-c").score_of = lambda _, response: -float(len(response))
        for text in (ANSWERS[2], ANSWERS[0]):
            replies.append(await gateway.client.ok("/reward", single(2, text)))
        assert len({reply["model"] for reply in replies}) == 1
        groups = end_collecting(valkey_server.url, run)
        assert len(groups) == 2
        await counted(gateway, recorded=1.0, alone=1.0)
        (event,) = gateway.events()
        assert event.audit is not None
        assert (event.decision_id in groups, event.audit.verdict, event.audit.probability) == (True, 0, 1.0)
        drawn = MODELS.index(replies[0]["model"])
        asked = {event.arm: event.credit, **{arm: credit for arm, _, credit in event.shadows}}
        assert event.arm == drawn
        assert asked == {0: 0.0, 1: 0.0, 2: 1.0}, "rm-a and rm-b like the longest best, rm-c the shortest"
        members = [gateway.decision(reply["decision_id"]) for reply in [*replies, other]]
        assert {(one.group in groups, one.inclusion) for one in members} == {(True, 1.0)}
        learned = await gateway.learned(1)
        assert learned["digest"] == gateway.folded().digest()
        late = await gateway.client.ok("/reward", single(3, "a late one"))
        await until(lambda: gateway.decision(late["decision_id"]).group, "the decision is saved")
        assert end_collecting(valkey_server.url, run) == [], "its group is finished"


async def test_singles_are_audited_in_their_share(valkey_server: ValkeyProcess, rule_url: str) -> None:
    setting = {**EVERY, "rate": 0.3}
    async with open_gateway(valkey_server.url, audit=setting, referees=sums(rule_url)) as gateway:
        items = [single(i, text, prompt) for prompt in range(60) for i, text in enumerate(ANSWERS)]
        results = (await gateway.client.ok("/reward/batch", {"items": items}))["results"]
        groups = [gateway.decision(result["decision_id"]) for result in results]
        chosen = {one.group for one in groups if one.inclusion == 0.3 and is_chosen(one.group, 0.3)}
        assert len({one.group for one in groups}) == 60
        waiting = end_collecting(valkey_server.url, gateway.run)
        assert set(waiting) == chosen
        await counted(gateway, recorded=float(len(chosen)))
        assert sorted(event.decision_id for event in gateway.events()) == sorted(chosen)
        with redis.Redis.from_url(valkey_server.url) as client:
            assert client.hget(f"rr:{{{gateway.run}}}:schedule", "count") == b"60", "a group counts once"


async def test_audits_by_environment(valkey_server: ValkeyProcess, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REWARD_ROUTER_AUDIT", '{"referee": "rm-c", "rate": 1.0, "schedule": "even"}')
    async with open_gateway(valkey_server.url) as gateway:
        await gateway.client.ok("/reward", pair(0))
        await counted(gateway, recorded=1.0)
        assert [event.audit.referee for event in gateway.events() if event.audit is not None] == ["rm-c"]


async def test_the_environment_changes_single_fields(
    valkey_server: ValkeyProcess, rule_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("REWARD_ROUTER_AUDIT", '{"rate": 0.25}')
    async with open_gateway(valkey_server.url, audit=EVERY, referees=sums(rule_url)) as gateway:
        reply = await gateway.client.ok("/reward", sum_of(0))
        assert gateway.decision(reply["decision_id"]).inclusion == 0.25


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [('{"rate": 2}', "audit.referee"), ('{"referee": "rm-a", "rate": 2}', "audit.rate"), ('{"referee": "x"}', "'x'")],
)
async def test_an_environment_that_cannot_be_names_its_field(
    valkey_server: ValkeyProcess, monkeypatch: pytest.MonkeyPatch, fields: str, sentence: str
) -> None:
    monkeypatch.setenv("REWARD_ROUTER_AUDIT", fields)
    with pytest.raises(ConfigurationError, match=sentence):
        async with open_gateway(valkey_server.url):
            pass


async def test_a_run_learns_from_rewards_and_from_audits(valkey_server: ValkeyProcess, rule_url: str) -> None:
    run = fresh_run()
    words: dict[str, Any] = {"run": run, "audit": EVERY, "signal": "reward"}
    async with open_gateway(valkey_server.url, referees=sums("http://127.0.0.1:9"), **words) as gateway:
        first = await gateway.client.ok("/reward", {**sum_of(0), "policy": "single:rm-a"})
        await counted(gateway, away=1.0)
        await gateway.client.ok("/feedback", {"decision_id": first["decision_id"], "reward": 0.75})
    unlease(valkey_server.url, run)
    async with open_gateway(valkey_server.url, referees=sums(rule_url), **words) as gateway:
        await counted(gateway, recorded=1.0)
        second = await gateway.client.ok("/reward", {**sum_of(1), "policy": "single:rm-b"})
        await counted(gateway, recorded=2.0)
        await gateway.client.ok("/feedback", {"decision_id": second["decision_id"], "reward": 0.25})
        rewarded, audited, again, corrected = gateway.events()
        assert (rewarded.arm, rewarded.feedback.value, rewarded.audit) == (0, 0.75, None)
        assert audited.audit is not None
        assert (audited.source, audited.audit.after_gold, audited.feedback.value) == (Source.AUDIT, False, 0.0)
        assert len({audited.arm, *(arm for arm, _, _ in audited.shadows)}) == 3, "the referee speaks of all"
        assert again.source is Source.AUDIT
        assert corrected.audit is not None
        assert (corrected.arm, corrected.feedback.value, len(corrected.audit.taught)) == (1, 0.25, 3)
        learned = await gateway.learned(4)
        assert learned["digest"] == gateway.folded().digest()

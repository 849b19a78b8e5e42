"""`/audits` and the command that asks people, against the real application."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from typer.testing import CliRunner

from router_core.records import Source
from service.cli import app
from tests.support.gateway import Gateway, open_gateway, pair
from tests.support.live import live_gateway
from tests.support.processes import fetch
from tests.support.rules import call

if TYPE_CHECKING:
    from tests.conftest import ValkeyProcess

EVERY = {"referee": "rm-c", "rate": 1.0, "schedule": "even"}


@pytest.fixture
async def gateway(valkey_server: ValkeyProcess) -> AsyncIterator[Gateway]:
    """Every decision is audited; the referee prefers the longer response."""
    async with open_gateway(valkey_server.url, audit=EVERY) as opened:
        yield opened


async def audited(gateway: Gateway, *indices: int, **fields: Any) -> list[str]:
    ids = []
    for index in indices:
        reply = await gateway.client.ok("/reward", {**pair(index), "policy": "single:rm-a", **fields})
        ids.append(reply["decision_id"])
        await gateway.learned(len(ids))
    return ids


async def shown(gateway: Gateway, query: str = "") -> list[dict[str, Any]]:
    response = await gateway.client.get(f"/audits{query}")
    assert response.status == 200, response.body
    found: list[dict[str, Any]] = response.json
    return found


async def test_the_newest_audits_are_shown_with_their_texts(gateway: Gateway) -> None:
    ids = await audited(gateway, 0, 1, reference="5", metadata={"task": "sums"})
    newest, older = await shown(gateway)
    assert [newest["decision_id"], older["decision_id"]] == ids[::-1]
    assert (older["prompt"], older["responses"]) == (pair(0)["prompt"], pair(0)["responses"])
    assert (older["reference"], older["metadata"], older["probability"]) == ("5", {"task": "sums"}, 1.0)
    assert (older["referee"], older["preferred"], older["judged"]) == ("rm-c", 1, False)
    assert older["verdicts"] == {"rm-a": 1, "rm-b": 1, "rm-c": 1}
    assert await shown(gateway, "?count=1") == [newest]


async def test_a_person_is_gold_and_judges_the_referee(gateway: Gateway) -> None:
    (name,) = await audited(gateway, 0)
    judged = await gateway.client.ok("/audits/judge", {"decision_id": name, "preferred": 0})
    assert not judged["duplicate"]
    again = await gateway.client.ok("/audits/judge", {"decision_id": name, "preferred": 0})
    assert (again["duplicate"], again["event_id"]) == (True, judged["event_id"])
    first, second = gateway.events()
    assert (first.source, second.source, second.feedback.value, second.credit) == (
        Source.AUDIT,
        Source.PERSON,
        0.0,
        0.0,
    )
    assert second.audit is not None
    assert (second.audit.verdict, [arm for arm, _ in second.audit.taught]) == (1, [0, 1, 2])
    learned = await gateway.learned(2)
    assert learned["digest"] == gateway.folded().digest()
    assert gateway.folded().referees["rm-c"].right == 0.0
    (one,) = await shown(gateway)
    assert (one["judged"], one["judged_preferred"]) == (True, 0)


async def test_only_the_first_gold_teaches(gateway: Gateway) -> None:
    names = await audited(gateway, 0, 1)
    await gateway.client.ok("/audits/judge", {"decision_id": names[0], "preferred": 0})
    await gateway.client.ok("/feedback", {"decision_id": names[0], "preferred": 1})
    await gateway.client.ok("/feedback", {"decision_id": names[1], "preferred": 1})
    await gateway.client.ok("/audits/judge", {"decision_id": names[1], "preferred": 0})
    learned = await gateway.learned(6)
    later, person = gateway.events()[3], gateway.events()[5]
    assert (later.source, later.arm, later.shadows, later.audit) == (Source.TRAINER, -1, (), None)
    assert (person.source, person.arm, person.shadows, person.audit) == (Source.PERSON, -1, (), None)
    assert learned["digest"] == gateway.folded().digest()


async def test_a_tie_is_kept_and_teaches_nothing(gateway: Gateway) -> None:
    (name,) = await audited(gateway, 0)
    await gateway.client.ok("/audits/judge", {"decision_id": name, "preferred": None})
    assert (gateway.events()[1].arm, gateway.events()[1].feedback.value) == (-1, -1.0)
    (one,) = await shown(gateway)
    assert (one["judged"], one["judged_preferred"]) == (True, None)


@pytest.mark.parametrize(
    ("body", "status", "words"),
    [
        ({"decision_id": "nobody", "preferred": 0}, 404, "not among the audits"),
        ({"preferred": 2}, 422, "has 2 responses"),
        ({"preferred": 1}, 409, "judged before"),
    ],
)
async def test_what_cannot_be_judged_is_refused(
    gateway: Gateway, body: dict[str, Any], status: int, words: str
) -> None:
    (name,) = await audited(gateway, 0)
    await gateway.client.ok("/audits/judge", {"decision_id": name, "preferred": 0})
    reply = await gateway.client.post("/audits/judge", {"decision_id": name, **body})
    assert (reply.status, words in reply.json["error"]["message"]) == (status, True), reply.body
    assert len(gateway.events()) == 2


def test_people_judge_blind_in_shuffled_order(valkey_server: ValkeyProcess) -> None:
    with live_gateway(valkey_server.url, audit=EVERY) as gateway:
        items = [{**pair(index), "policy": "single:rm-a"} for index in range(4)]
        assert call(f"{gateway.url}/reward/batch", {"items": items})[0] == 200
        gateway.until(4)
        words = ["audit", gateway.run, "--url", gateway.url, "--seed", "0"]
        done = CliRunner().invoke(app, words, input="1\nnonsense\nt\ns\nq\n")
        assert done.exit_code == 0, done.output
        _, audits = fetch(f"{gateway.url}/audits?run={gateway.run}")
    first, second, *others = audits
    order = np.random.default_rng(0).permutation(2).tolist()
    assert (first["judged_preferred"], second["judged_preferred"]) == (order[0], None)
    assert [one["judged"] for one in audits] == [True, True, False, False]
    assert "2 judgements" in done.output
    assert "'nonsense'" in done.output
    assert "rm-" not in done.output, "nothing is shown of referee and RMs"
    places = [done.output.index(first["responses"][index]) for index in order]
    assert others
    assert places == sorted(places)

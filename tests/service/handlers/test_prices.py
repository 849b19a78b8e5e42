"""Prices over HTTP: what a call costs, what a budget buys, and two calls at once."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from router_core.dataset import load_pairs
from service.app import create_app
from service.pool import ModelEntry, PoolFile
from service.settings import Settings
from service.workers.recorded import recorded_app
from tests.service.scorers.worker_servers import Serve
from tests.support.asgi import AsgiClient, running
from tests.support.gateway import fresh_run, open_gateway, pair, until
from tests.support.votes import MODELS, VOTES, checkpoint

if TYPE_CHECKING:
    from tests.conftest import ValkeyProcess

PAIRS = 120


async def test_a_reply_says_what_its_calls_cost(valkey_server: ValkeyProcess, tmp_path: Path) -> None:
    path, encoder = checkpoint(tmp_path, VOTES)
    async with open_gateway(
        valkey_server.url, models=MODELS, encoder=encoder, checkpoint=path, prices=[0.5, 1.0, 2.0]
    ) as gateway:
        reply = await gateway.client.ok("/reward", {**pair(0), "policy": "stacked"})
        assert [attempt["price"] for attempt in reply["attempts"]] == [1.0, 2.0, 4.0]
        assert reply["price"] == 7.0
        assert [attempt.price for attempt in gateway.decision(reply["decision_id"]).attempts] == [1.0, 2.0, 4.0]
        shown = (await gateway.client.get("/metrics")).body.decode()
    assert f'reward_router_price_total{{policy="stacked",run="{gateway.run}"}} 7.0' in shown


async def test_a_budget_is_kept_in_price_and_dear_arms_are_drawn_less(
    valkey_server: ValkeyProcess, tmp_path: Path
) -> None:
    path, encoder = checkpoint(tmp_path, VOTES)
    prices = [10.0, 1.0, 1.0]
    async with open_gateway(
        valkey_server.url, models=MODELS, encoder=encoder, checkpoint=path, prices=prices, run="priced", seed=0
    ) as gateway:
        firsts, spent, multipliers = [], [], []
        for index in range(150):
            reply = await gateway.client.ok("/reward", {**pair(index), "policy": "cascade:2"})
            stored = gateway.decision(reply["decision_id"])
            firsts.append(stored.attempts[0].arm)
            spent.append(reply["price"])
            multipliers.append(stored.multiplier)
            assert reply["price"] == sum(prices[attempt.arm] for attempt in stored.attempts)
            first, *further = stored.attempts
            chance = stored.propensities[first.arm] * np.prod([attempt.chance for attempt in further])
            assert stored.propensity == pytest.approx(chance, abs=2e-3)
    # ln μ moves with the price beyond the budget, as far for the dearest call as for one where all cost the same.
    assert np.diff(np.log(multipliers)) == pytest.approx(0.005 * (np.array(spent[:-1]) - 2.0))
    # The best arm costs ten times as much, which its better verdicts are not worth.
    assert firsts.count(0) < 75


async def test_the_chance_of_a_draw_leaves_out_what_is_closed(valkey_server: ValkeyProcess, tmp_path: Path) -> None:
    path, encoder = checkpoint(tmp_path, VOTES)
    async with open_gateway(
        valkey_server.url, models=MODELS, encoder=encoder, checkpoint=path, max_calls_per_instance=2
    ) as gateway:
        gateway.arm("rm-c").available = False
        further = []
        for index in range(80):
            reply = await gateway.client.ok("/reward", {**pair(index), "policy": "cascade:3"})
            stored = gateway.decision(reply["decision_id"])
            further += [attempt for attempt in stored.attempts if attempt.turn == 1 and attempt.outcome == "answered"]
    # Of three RMs one has answered and one is away: the third was certain, whichever was drawn first.
    assert further
    assert {attempt.chance for attempt in further} == {1.0}


async def test_two_are_asked_at_once_where_one_will_not_do(
    valkey_server: ValkeyProcess, tmp_path: Path, serve: Serve
) -> None:
    """Real recorded workers over HTTP, with rounds bounded to one."""
    rows = [
        {
            "id": f"pair/{i}",
            "prompt": f"Question {i}?\n",
            "response_a": f"good {i}",
            "response_b": f"bad {i}",
            "label": "a",
            "rm": {name: {"score_a": 1.0, "score_b": 0.0, "verdict": "a"} for name in MODELS},
        }
        for i in range(PAIRS)
    ]
    file = tmp_path / "pairs.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    pairs = load_pairs(file)
    urls = {name: serve(recorded_app(pairs, [name])) for name in MODELS}
    pool = PoolFile(
        models=tuple(ModelEntry(name=name, urls=(url,), rendering="template") for name, url in urls.items())
    )
    path, encoder = checkpoint(tmp_path, VOTES)
    found: dict[int, list[list[dict[str, Any]]]] = {}
    for parallel in (1, 2):
        settings = Settings(
            store_url=valkey_server.url, run=fresh_run(), seed=0, checkpoint=path, parallel_calls=parallel,
            max_rounds_per_instance=1,
        )  # fmt: skip
        async with running(create_app(settings, pool, encoder=encoder)) as client:
            await _ready(client)
            replies = [
                await client.ok(
                    "/reward",
                    {
                        "prompt": row["prompt"],
                        "responses": [row["response_a"], row["response_b"]],
                        "policy": "cascade:2",
                    },
                )
                for row in rows
            ]
        found[parallel] = [reply["attempts"] for reply in replies]
    assert {len(attempts) for attempts in found[1]} == {1}
    assert {len(attempts) for attempts in found[2]} == {1, 2}
    twice = [attempts for attempts in found[2] if len(attempts) == 2]
    assert all(attempt["outcome"] == "answered" for attempts in twice for attempt in attempts)


async def _ready(client: AsgiClient) -> None:
    async def ready() -> bool:
        return (await client.get("/readyz")).status == 200

    await until(ready, "ready")

"""The frontier of a run's own log: every policy on the decisions that were shadowed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
from typer.testing import CliRunner

pytest.importorskip("torch")

from service.cli import app
from service.errors import ConfigurationError
from service.lab.eventlog.export import export_log
from service.lab.eventlog.frontier import logged_frontier
from service.lab.eventlog.load import load_log
from service.lab.eventlog.targets import load_checkpoint
from service.stores.redis import RedisStore
from tests.support.gateway import open_gateway, pair, until
from tests.support.votes import MODELS, VOTES, checkpoint

if TYPE_CHECKING:
    from tests.conftest import ValkeyProcess

DECISIONS = 160
RATE = 0.5


async def exported(server: str, folder: Path, rate: float, name: str) -> tuple[Path, Path, dict[str, np.ndarray]]:
    """A log of cascades with shadows, the checkpoint, and how often each RM was right where all were asked."""
    path, encoder = checkpoint(folder, VOTES)
    right: dict[str, list[float]] = {model: [] for model in MODELS}
    async with open_gateway(
        server, models=MODELS, encoder=encoder, checkpoint=path, shadow_rate=rate, run=name, seed=0
    ) as gateway:
        gateway.arm("rm-b").score_of = lambda prompt, response: (-1.0 if "3" in prompt else 1.0) * len(response)
        gateway.arm("rm-c").score_of = lambda prompt, response: (-1.0 if "5" in prompt else 1.0) * len(response)
        replies = [
            await gateway.client.ok("/reward", {**pair(index), "policy": "cascade:2"}) for index in range(DECISIONS)
        ]

        async def drained() -> bool:
            shown = (await gateway.client.get("/metrics")).body.decode()
            return "reward_router_shadows_in_flight 0.0" in shown

        await until(drained, "no shadows under way")
        for reply in replies:
            stored = gateway.decision(reply["decision_id"])
            if stored.shadows is not None:
                for answer in stored.heard:
                    right[MODELS[answer.arm]].append(float(answer.verdict == 1))
            await gateway.client.ok("/feedback", {"decision_id": reply["decision_id"], "preferred": 1})
        store = RedisStore(server, window_seconds=60)
        await export_log(store, gateway.run, folder / "log.parquet")
        await store.close()
    return folder / "log.parquet", path, {model: np.array(values) for model, values in right.items()}


async def test_shadowed_decisions_show_every_policy(valkey_server: ValkeyProcess, tmp_path: Path) -> None:
    file, path, right = await exported(valkey_server.url, tmp_path, RATE, "frontier-of-a-log")
    log = load_log(file)
    loaded = load_checkpoint(path, log.header)
    assert loaded is not None
    found = logged_frontier(log, loaded, [1.5])
    assert (found.n, found.logged) == (len(right["rm-a"]), DECISIONS)
    points = {point.policy: point for point in found.points}
    wanted = {"single:best", "offline", "cascade:1.5", "random-cascade:1.5", "majority:2", "majority", "uwo", "stacked"}
    assert wanted <= set(points)
    assert points["offline"].accuracy == 1.0  # Always rm-a, the best.
    seconded = right["rm-b"] + right["rm-c"] > 0
    assert points["majority"].accuracy == pytest.approx(seconded.mean())
    assert points["majority"].price == pytest.approx(3.0)
    out, picture = tmp_path / "frontier.json", tmp_path / "frontier.png"
    result = CliRunner().invoke(
        app,
        ["frontier", str(file), "--checkpoint", str(path), "--budgets", "1.5", "--price", "rm-a=4", "--json", str(out),
         "--plot", str(picture)],
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    document = json.loads(out.read_text())
    assert document["prices"] == {"rm-a": 4.0, "rm-b": 1.0, "rm-c": 1.0}
    assert [point["price"] for point in document["points"] if point["policy"] == "majority"] == [pytest.approx(6.0)]
    assert picture.read_bytes().startswith(b"\x89PNG")


async def test_without_shadows_there_is_no_frontier(valkey_server: ValkeyProcess, tmp_path: Path) -> None:
    file, path, _ = await exported(valkey_server.url, tmp_path, 0.0, "frontier-without-shadows")
    log = load_log(file)
    loaded = load_checkpoint(path, log.header)
    assert loaded is not None
    with pytest.raises(ConfigurationError, match="shadow rate"):
        logged_frontier(log, loaded, [1.5])

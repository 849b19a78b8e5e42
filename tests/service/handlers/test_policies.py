"""Every system of the paper's tables through the real application: who is asked, what is answered, what is learned."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest

from router_core.checkpoint import Checkpoint
from router_core.encoder.fuse import Fuse, PairEncoder
from router_core.encoder.surface import SurfaceBackbone
from router_core.policies import ScoreScale
from router_core.prior import linucb_prior
from service.errors import ConfigurationError
from service.gateway import build_gateway
from service.pool import ModelEntry, PoolFile
from service.scorers.protocol import WorkerUnavailableError
from service.settings import Settings
from tests.support.arms import ScriptedArm
from tests.support.gateway import DIM, Gateway, fresh_run, open_gateway, pair, small_encoder

if TYPE_CHECKING:
    from tests.conftest import ValkeyProcess

MODELS = ("rm-a", "rm-b", "rm-c")


@pytest.fixture
async def gateway(valkey_server: ValkeyProcess) -> AsyncIterator[Gateway]:
    """Three RMs, no checkpoint."""
    async with open_gateway(valkey_server.url) as opened:
        yield opened


def checkpoint(folder: Path) -> tuple[Path, PairEncoder]:
    """A checkpoint for `MODELS` over the small encoder, and that encoder."""
    rng = np.random.default_rng(0)
    backbone = SurfaceBackbone()
    made = Checkpoint(
        pool=MODELS,
        encoder_spec="surface",
        fuse=Fuse.identity(backbone.dim, DIM),
        bt_embeddings=np.eye(3, DIM, dtype=np.float32),
        cls_weight=np.zeros((3, DIM), dtype=np.float32),
        cls_bias=np.array([2.0, 0.0, -2.0], dtype=np.float32),
        calibration_scale=np.ones(3, dtype=np.float32),
        calibration_shift=np.zeros(3, dtype=np.float32),
        metrics={"seed": float(rng.random())},
    )
    made.save(folder / "checkpoint")
    return folder / "checkpoint", PairEncoder(backbone, made.fuse)


@pytest.mark.parametrize(
    ("policy", "calls", "prior"),
    [
        ("single:rm-b", 1, "none"),
        ("random", 1, "none"),
        ("majority", 3, "none"),
        ("uwo", 3, "none"),
        ("laser", 1, "linucb"),
        ("bayesian", 1, "none"),
        ("bayesian:none", 1, "none"),
        ("offline", 1, "none"),
    ],
)
async def test_every_policy_can_be_asked_for_without_a_checkpoint(
    gateway: Gateway, policy: str, calls: int, prior: str
) -> None:
    run = f"{gateway.run}-own"
    reply = await gateway.client.ok("/reward", {**pair(), "policy": policy, "run": run})
    assert sum(len(arm.calls) for arm in gateway.arms) == calls
    assert reply["policy"] == policy
    assert reply["model"] in ((policy,) if calls > 1 else MODELS)
    assert reply["preferred"] == 1
    await gateway.client.ok("/feedback", {"decision_id": reply["decision_id"], "preferred": 1, "run": run})
    learned = await gateway.learned(1, run)
    assert learned["prior"] == prior
    assert sum(model["feedbacks"] for model in learned["models"]) == calls


@pytest.mark.parametrize("policy", ["bayesian:paper", "bayesian:calibrated", "offline:paper", "offline:calibrated"])
async def test_forms_that_a_checkpoint_holds_are_asked_for_by_name(
    valkey_server: ValkeyProcess, tmp_path: Path, policy: str
) -> None:
    path, encoder = checkpoint(tmp_path)
    async with open_gateway(valkey_server.url, models=MODELS, encoder=encoder, checkpoint=path) as gateway:
        run = f"{gateway.run}-own"
        reply = await gateway.client.ok("/reward", {**pair(), "policy": policy, "run": run})
        assert (await gateway.learned(0, run))["prior"] == policy.partition(":")[2]
        stored = gateway.decision(reply["decision_id"], run)
        if policy.endswith("calibrated"):
            assert stored.means == pytest.approx([0.881, 0.5, 0.119], abs=1e-3)
        else:
            x = np.frombuffer(stored.x, "<f4")
            assert stored.means == pytest.approx(x[:3].tolist(), abs=1e-6)


@pytest.mark.parametrize("policy", ["bayesian:paper", "bayesian:calibrated", "offline:paper"])
async def test_a_form_that_needs_a_checkpoint_is_refused_without_one(gateway: Gateway, policy: str) -> None:
    run = f"{gateway.run}-own"
    response = await gateway.client.post("/reward", {**pair(), "policy": policy, "run": run})
    assert (response.status, response.error["code"]) == (422, "validation")
    assert response.error["details"] == {"field": "policy"}
    assert "--checkpoint" in response.error["message"]
    # The refused request has opened nothing.
    assert (await gateway.client.post("/feedback", {"decision_id": "d", "preferred": 0, "run": run})).status == 404
    assert (await gateway.client.ok("/reward", {**pair(), "run": run}))["recorded"] is True


async def test_uwo_answers_the_careful_mean_and_prefers_by_the_stronger_penalty(valkey_server: ValkeyProcess) -> None:
    # On the given scale the two responses score (4, 1) and (0, 2), as in the policy's own test by hand.
    scores = {"rm-a": (40.0, 10.0), "rm-b": (-3.0, 1.0)}
    arms = [ScriptedArm(name, lambda _, text, s=s: s[len(text) - 1]) for name, s in scores.items()]  # type: ignore[misc]
    scale = ScoreScale(np.array([0.0, -3.0]), np.array([10.0, 2.0]))
    async with open_gateway(valkey_server.url, arms=arms, score_scale=scale) as gateway:
        body = {"prompt": "p", "responses": ["x", "yy"], "policy": "uwo"}
        reply = await gateway.client.ok("/reward", body)
        assert reply["rewards"] == pytest.approx([1.6, 1.475])
        assert (reply["model"], reply["preferred"], reply["propensity"]) == ("uwo", 1, 1.0)
        assert reply["margin"] == pytest.approx(0.125)
        assert gateway.decision(reply["decision_id"]).verdict == 1
        # Without rm-b there is nothing to disagree with.
        gateway.arm("rm-b").error = WorkerUnavailableError("down")
        reply = await gateway.client.ok("/reward", body)
        assert (reply["rewards"], reply["preferred"]) == ([4.0, 1.0], 0)
        assert [fallback["model"] for fallback in reply["fallbacks"]] == ["rm-b"]
        gateway.arm("rm-a").error = WorkerUnavailableError("down")
        assert (await gateway.client.post("/reward", body)).error["code"] == "no_worker"


async def test_uwo_learns_the_scales_of_a_run_from_the_rewards_it_has_seen(gateway: Gateway) -> None:
    gateway.arm("rm-a").score_of = lambda _, text: 100.0 * len(text)
    gateway.arm("rm-b").score_of = lambda _, text: 0.01 * len(text)
    gateway.arm("rm-c").score_of = lambda _, text: float(len(text)) - 50.0
    lengths = [(1, 2), (4, 9), (3, 3), (7, 5)]
    run, seen = f"{gateway.run}-uwo", list[int]()
    for pair_of in lengths:
        responses = ["x" * length for length in pair_of]
        body = {"prompt": "p", "responses": responses, "policy": "uwo", "run": run}
        reply = await gateway.client.ok("/reward", body)
        # All three are linear in the length, so that on the right scale they agree and nothing is taken off.
        seen.extend(pair_of)
        z = (np.array(pair_of) - np.mean(seen)) / np.std(seen)
        assert reply["rewards"] == pytest.approx(z.tolist())
    fresh = {"prompt": "p", "responses": ["one"], "policy": "uwo", "run": run + "-2"}
    refused = await gateway.client.post("/reward", {**fresh, "responses": ["xxx"]})
    assert (refused.status, refused.error["code"]) == (503, "no_reward")
    # Two rewards are a spread, of mean 4 and deviation 1 in units of a character.
    reply = await gateway.client.ok("/reward", {**fresh, "responses": ["xxxxx"]})
    assert reply["rewards"] == pytest.approx([1.0])


async def test_uwo_has_one_scale_on_every_gateway(valkey_server: ValkeyProcess) -> None:
    arms = [ScriptedArm(name, lambda _, text: float(len(text))) for name in ("rm-a", "rm-b")]
    run = fresh_run("uwo")
    async with open_gateway(valkey_server.url, arms=arms) as one, open_gateway(valkey_server.url, arms=arms) as other:
        body = {"prompt": "p", "responses": ["x", "xxx"], "policy": "uwo", "run": run}
        assert (await one.client.ok("/reward", body))["rewards"] == pytest.approx([-1.0, 1.0])
        reply = await other.client.ok("/reward", {**body, "responses": ["xxxxx", "xxxxxxx"]})
        assert reply["rewards"] == pytest.approx([1 / 5**0.5, 3 / 5**0.5])


async def test_laser_asks_one_rm_per_batch_and_requests_at_once_draw_apart(gateway: Gateway) -> None:
    run = f"{gateway.run}-laser"
    document = {"policy": "laser", "run": run}
    batches = [{**document, "items": [pair(10 * b + i) for i in range(5)]} for b in range(24)]
    answers = await asyncio.gather(*(gateway.client.ok("/reward/batch", batch) for batch in batches))
    asked = []
    for answer in answers:
        models = {result["model"] for result in answer["results"]}
        assert len(models) == 1
        asked.extend(models)
    # Nothing is known yet: ties are broken evenly, once per batch.
    assert set(asked) == set(MODELS)
    assert all(r["propensity"] == pytest.approx(1 / 3) for answer in answers for r in answer["results"])


async def test_laser_is_deterministic_once_it_has_learned(gateway: Gateway) -> None:
    run = f"{gateway.run}-laser"
    document = {"policy": "laser", "run": run}
    for index in range(12):
        reply = await gateway.client.ok("/reward", {**pair(index), **document})
        preferred = 1 if reply["model"] == "rm-b" else 0
        body = {"decision_id": reply["decision_id"], "preferred": preferred, "run": run}
        await gateway.client.ok("/feedback", body)
        await gateway.learned(index + 1, run)
    replies = await asyncio.gather(*(gateway.client.ok("/reward", {**pair(99), **document}) for _ in range(6)))
    assert {(reply["model"], reply["propensity"]) for reply in replies} == {("rm-b", 1.0)}
    # The fold is that of any other run, from LinUCB's start.
    learned = await gateway.learned(12, run)
    assert learned["digest"] == gateway.folded(run, linucb_prior(3, DIM)).digest()
    gateway.arm("rm-b").available = False
    assert (await gateway.client.ok("/reward", {**pair(99), **document}))["model"] != "rm-b"


async def test_laser_scales_losses_by_their_quantiles(valkey_server: ValkeyProcess) -> None:
    async with open_gateway(valkey_server.url, policy="laser", signal="loss") as gateway:
        losses = [4.0, 3.0, 1.0, 0.0, 2.0, 9.0, -9.0]
        for index, loss in enumerate(losses):
            reply = await gateway.client.ok("/reward", pair(index))
            await gateway.client.ok("/feedback", {"decision_id": reply["decision_id"], "loss": loss})
            learned = await gateway.learned(index + 1)
        assert (learned["prior"], learned["policy"]) == ("linucb", "laser")
        assert learned["digest"] == gateway.folded(prior=linucb_prior(3, DIM)).digest()
        posterior = gateway.folded(prior=linucb_prior(3, DIM))
        # Four losses only warm up; then half way, beyond the 80% and the 20% quantile.
        assert posterior.statistics.reward_sum.sum() == pytest.approx(0.5 + 0.0 + 1.0)
        assert posterior.statistics.reward_count.sum() == 3


async def test_a_policy_that_insists_on_a_prior_opens_the_default_run_with_it(valkey_server: ValkeyProcess) -> None:
    async with open_gateway(valkey_server.url, policy="laser") as gateway:
        assert (await gateway.learned(0))["prior"] == "linucb"
        assert (await gateway.client.ok("/reward", pair()))["policy"] == "laser"
        # A policy that takes any prior may be mixed in.
        assert (await gateway.client.ok("/reward", {**pair(), "policy": "random"}))["policy"] == "random"


def test_a_prior_that_contradicts_the_policy_is_refused_at_the_start() -> None:
    pool = PoolFile(models=(ModelEntry(name="rm-a"),))
    settings = Settings(policy="laser", prior="none", run=fresh_run())
    with pytest.raises(ConfigurationError, match=r"policy 'laser' insists on 'linucb'"):
        build_gateway(settings, pool, encoder=small_encoder(), arms=[ScriptedArm("rm-a")])
    settings = Settings(policy="bayesian:paper", run=fresh_run())
    with pytest.raises(ConfigurationError, match="--checkpoint"):
        build_gateway(settings, pool, encoder=small_encoder(), arms=[ScriptedArm("rm-a")])


async def test_a_batch_of_runs_with_different_priors_gives_each_its_own_offsets(
    valkey_server: ValkeyProcess, tmp_path: Path
) -> None:
    path, encoder = checkpoint(tmp_path)
    async with open_gateway(valkey_server.url, models=MODELS, encoder=encoder, checkpoint=path) as gateway:
        forms = ["paper", "none", "calibrated"]
        bodies = [
            {**pair(i), "run": f"{gateway.run}-{forms[i % 3]}", "policy": f"bayesian:{forms[i % 3]}"} for i in range(9)
        ]
        # Open the runs first, so that all requests of the second round are drawn together.
        await asyncio.gather(*(gateway.client.ok("/reward", body) for body in bodies[:3]))
        replies = await asyncio.gather(*(gateway.client.ok("/reward", body) for body in bodies))
        for body, reply in zip(bodies, replies, strict=True):
            stored = gateway.decision(reply["decision_id"], str(body["run"]))
            expected = {"paper": [0.0] * 3, "none": [0.5] * 3, "calibrated": [0.881, 0.5, 0.119]}
            form = str(body["policy"]).partition(":")[2]
            assert stored.offsets == pytest.approx(expected[form], abs=1e-3)


async def test_two_gateways_learn_a_laser_run_alike(valkey_server: ValkeyProcess) -> None:
    run = fresh_run()
    async with open_gateway(valkey_server.url) as one, open_gateway(valkey_server.url) as two:
        for index in range(30):
            scorer, teller = (one, two) if index % 2 else (two, one)
            reply = await scorer.client.ok("/reward", {**pair(index), "policy": "laser", "run": run})
            body = {"decision_id": reply["decision_id"], "preferred": int(index % 3 == 0), "run": run}
            await teller.client.ok("/feedback", body)
        first, second = await one.learned(30, run), await two.learned(30, run)
        assert first["digest"] == second["digest"] == one.folded(run, linucb_prior(3, DIM)).digest()

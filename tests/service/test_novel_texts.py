"""A checkpoint with landmarks through the real application: who watches for novel texts; all replicas agree."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest

from router_core.checkpoint import Checkpoint
from router_core.encoder.fuse import Fuse, PairEncoder
from router_core.encoder.surface import SurfaceBackbone
from router_core.novelty import Landmarks
from router_core.prior import CALIBRATED_HYPERPARAMETERS, Prior, PriorForm
from router_core.records import Signal
from service.lab.eventlog.export import export_log
from service.lab.eventlog.load import load_log
from service.lab.eventlog.targets import Targets
from service.priors import build_prior
from service.settings import Settings
from service.stores.redis import RedisStore
from tests.support.gateway import DIM, fresh_run, open_gateway, pair

if TYPE_CHECKING:
    from tests.conftest import ValkeyProcess

MODELS = ("rm-a", "rm-b", "rm-c")


def checkpoint() -> Checkpoint:
    """Landmarks far from any text, so that all are novel; rm-a is said to be the best."""
    rng = np.random.default_rng(0)
    fuse = Fuse.identity(SurfaceBackbone().dim, DIM)
    context = rng.standard_normal((fuse.projection.shape[1], 2)).astype(np.float32)
    return Checkpoint(
        pool=MODELS,
        encoder_spec="surface",
        fuse=Fuse(fuse.shift, fuse.projection, fuse.w1, fuse.b1, fuse.w2, fuse.b2, context=context),
        bt_embeddings=np.eye(3, DIM, dtype=np.float32),
        cls_weight=np.zeros((3, DIM), dtype=np.float32),
        cls_bias=np.array([2.0, 0.0, -2.0], dtype=np.float32),
        calibration_scale=np.ones(3, dtype=np.float32),
        calibration_shift=np.zeros(3, dtype=np.float32),
        landmarks=Landmarks(np.full((8, 2), 99.0, dtype=np.float32), 0.5),
    )


def prior_of(**settings: object) -> Prior:
    made = checkpoint()
    return build_prior(Settings.model_validate(settings), made, 3, made.d)


@pytest.mark.parametrize(
    ("settings", "watched", "precision"),
    [
        ({}, True, CALIBRATED_HYPERPARAMETERS.lambda_novel),
        ({"signal": Signal.LOSS}, False, 0.0),
        ({"signal": Signal.LOSS, "adapt": True, "lambda_novel": 50.0}, True, 50.0),
        ({"lambda_novel": 7.0}, True, 7.0),
        ({"lambda_novel": 0.0}, False, 0.0),
        ({"lambda0": 50.0}, False, CALIBRATED_HYPERPARAMETERS.lambda_novel),
        ({"prior": "none"}, False, 0.0),
        ({"prior": "paper"}, False, 0.0),
    ],
)
def test_novel_texts_are_watched_for_where_the_precision_follows_the_feedback(
    settings: dict[str, object], watched: bool, precision: float
) -> None:
    prior = prior_of(**settings)
    assert (prior.watches_novelty, prior.hyper.lambda_novel) == (watched, precision)


async def test_replicas_and_an_exported_log_come_to_the_same_posterior(
    valkey_server: ValkeyProcess, tmp_path: Path
) -> None:
    made, url, run = checkpoint(), valkey_server.url, fresh_run()
    made.save(tmp_path / "checkpoint")
    common = {
        "models": MODELS,
        "encoder": PairEncoder(SurfaceBackbone(), made.fuse),
        "checkpoint": tmp_path / "checkpoint",
        "run": run,
        "lambda_novel": 20.0,
    }
    async with open_gateway(url, **common) as one, open_gateway(url, **common) as two:
        for index in range(70):
            gateway = (one, two)[index % 2]
            reply = await gateway.client.ok("/reward", pair(index))
            await gateway.client.ok("/feedback", {"decision_id": reply["decision_id"], "preferred": 1})
        there, here = await two.learned(70), await one.learned(70)
        folded = one.folded(run, prior_of(lambda_novel=20.0))
        assert there["digest"] == here["digest"] == folded.digest()
        assert folded.tally.met == folded.tally.novel == 70.0
        assert folded.digest() != one.folded(run, prior_of(lambda_novel=0.0)).digest()
        assert (there["novel_share"], there["lambda0"]) == (1.0, folded.lambda0)
        assert there["dim"] == made.d > folded.n_weights
    store = RedisStore(url, window_seconds=60)
    try:
        await export_log(store, run, tmp_path / "log.parquet")
    finally:
        await store.close()
    log = await asyncio.to_thread(load_log, tmp_path / "log.parquet")
    assert json.loads(json.dumps(log.header.fingerprint))["lambda_novel"] == 20.0
    again = Targets(log, made, 1.0)._prior("bayesian", PriorForm.CALIBRATED)
    assert again.hyper.lambda_novel == 20.0
    assert again.watches_novelty


async def test_runs_that_watch_for_nothing_keep_the_fingerprint_that_they_always_had(
    valkey_server: ValkeyProcess,
) -> None:
    async with open_gateway(valkey_server.url) as gateway:
        await gateway.client.ok("/reward", pair())
        store = RedisStore(valkey_server.url, window_seconds=60)
        try:
            fingerprint = json.loads((await store.open_run(gateway.run, b"{}")).fingerprint)
        finally:
            await store.close()
        assert fingerprint["prior"] == "none"
        assert (await gateway.client.get("/posterior")).json["novel_share"] is None
        assert "lambda_novel" not in fingerprint

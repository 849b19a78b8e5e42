"""Kinds of texts: what all RMs of the data say about the directions that matter."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

pytest.importorskip("torch")

from router_core.encoder.base import Block
from router_core.offline.kinds import fit_kinds
from router_core.offline.members import MembersFit, TrainConfig

CONFIG = TrainConfig(members=2, kind_members=1, kinds=1, hidden=4, member_dim=4, components=2, kind_components=2)


def one_kind(n: int = 400, rms: int = 20) -> tuple[np.ndarray, np.ndarray]:
    """Ten features, of which the fourth says which half of the RMs is mostly right."""
    rng = np.random.default_rng(0)
    u = rng.standard_normal((n, 10)).astype(np.float32)
    sign = np.where(np.arange(rms) % 2, 1, -1)
    right = rng.random((n, rms)) < 1 / (1 + np.exp(-2 * u[:, 3:4] * sign))
    return u, right.astype(float)


def test_the_kind_is_the_feature_that_moves_the_rms() -> None:
    u, right = one_kind()
    directions = fit_kinds(u, right, 1)
    assert directions.shape == (10, 1)
    assert abs(np.corrcoef((u @ directions)[:, 0], u[:, 3])[0, 1]) > 0.95
    assert (u @ directions).std() == pytest.approx(1.0, rel=1e-3)


def test_an_rm_that_was_not_asked_says_nothing() -> None:
    u, right = one_kind()
    silent = np.hstack([right, np.full((len(u), 3), np.nan)])
    np.testing.assert_allclose(fit_kinds(u, silent, 1), fit_kinds(u, right, 1), atol=1e-9)


def test_rms_that_are_always_right_give_no_kind() -> None:
    u, _ = one_kind()
    assert fit_kinds(u, np.ones((len(u), 4)), 2).shape == (10, 0)


def test_kinds_are_learned_from_rms_outside_the_pool() -> None:
    u, right = one_kind()
    z = np.hstack([u, np.zeros_like(u)])
    blocks = (Block(10, dense=False),)
    pool = np.random.default_rng(1).integers(0, 2, (len(u), 2)).astype(float)
    pool_alone, of_all = (MembersFit(z, pool, blocks, CONFIG, 0, columns) for columns in (None, right))
    fuses = []
    for fit in (pool_alone, of_all):
        fit.advance(2)
        fuses.append(fit.export(z)[0])
    kinds = [fuse.standardise(z)[:, -1] for fuse in fuses]
    quality = [abs(np.corrcoef(kind, u[:, 3])[0, 1]) for kind in kinds]
    assert quality[0] < 0.8
    assert quality[1] > 0.95


def test_members_read_directions_or_kinds() -> None:
    u, right = one_kind()
    z = np.hstack([u, np.zeros_like(u)])
    fit = MembersFit(z, right[:, :2], (Block(10, dense=False),), CONFIG, 0)
    fit.advance(3)
    fuse, _ = fit.export(z)
    w1 = fuse.w1.reshape(11, 2, 4)
    assert not w1[10, 0].any()
    assert not w1[:10, 1].any()
    assert fuse.context is not None
    assert not fuse.context[10].any()
    plain, _ = MembersFit(z, right[:, :2], (Block(10, dense=False),), replace(CONFIG, kind_members=0), 0).export(z)
    assert plain.projection.shape[1] == 10

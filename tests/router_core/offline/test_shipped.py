"""Kinds of texts that come with the package: when they are used, and that they fit the encoder."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("torch")

from router_core.encoder.registry import load_backbone
from router_core.encoder.surface import SurfaceBackbone
from router_core.errors import ShapeMismatchError
from router_core.offline.shipped import FEW, MANY_MODELS, read_kinds, shipped_kinds, write_kinds
from router_core.offline.train import TrainConfig, pair_features, train
from tests.support.offline import two_domains


def test_they_are_for_few_pairs_of_few_models_on_their_encoder() -> None:
    static = load_backbone("static")
    found = shipped_kinds(static, FEW - 1, 6)
    assert found is not None
    assert found.shape[0] == 2 * static.dim
    assert np.isfinite(found).all()
    assert shipped_kinds(static, FEW, 6) is None
    assert shipped_kinds(static, 32, MANY_MODELS) is None
    assert shipped_kinds(SurfaceBackbone(), 32, 6) is None


def test_kinds_of_another_encoding_are_not_read(tmp_path: Path) -> None:
    backbone = SurfaceBackbone()
    kinds = np.ones((2 * backbone.dim, 2), np.float32)
    write_kinds(tmp_path / "kinds.npz", kinds, backbone)
    read = read_kinds(tmp_path / "kinds.npz", backbone)
    assert read is not None
    assert (read == kinds).all()
    assert read_kinds(tmp_path / "kinds.npz", load_backbone("static")) is None


def test_a_fit_reads_the_kinds_that_it_is_given() -> None:
    backbone, pairs = SurfaceBackbone(), two_domains(40)
    z = pair_features(pairs, backbone)
    config = TrainConfig(max_epochs=2, folds=2, members=2, kind_members=1)
    kinds = np.zeros((z.shape[1], 1), np.float32)
    kinds[int(z.std(axis=0).argmax())] = 1.0
    fuse = train(pairs, ("coder", "talker"), backbone, config, z, kinds).fuse
    own = train(pairs, ("coder", "talker"), backbone, config, z).fuse
    along = fuse.projection[:, -1] / np.linalg.norm(fuse.projection[:, -1])
    np.testing.assert_allclose(along, kinds[:, 0], atol=1e-6)
    assert not np.array_equal(fuse.projection, own.projection)
    with pytest.raises(ShapeMismatchError, match="of this encoder"):
        train(pairs, ("coder", "talker"), backbone, config, z, kinds[1:])

"""Checkpoints on disk: exact round trip, refusal of anything altered, and the arithmetic of the prior."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from router_core.checkpoint import METADATA_FILE, WEIGHTS_FILE, Checkpoint
from router_core.combine import Multipliers, Votes
from router_core.encoder.fuse import Fuse, Kernel
from router_core.errors import CheckpointError, ShapeMismatchError
from router_core.novelty import Landmarks
from router_core.prior import Hyperparameters, PriorForm


def make(K: int = 3, d: int = 4, seed: int = 0) -> Checkpoint:
    rng = np.random.default_rng(seed)
    bt = rng.standard_normal((K, d))
    return Checkpoint(
        pool=tuple(f"R{k}" for k in range(K)),
        encoder_spec="static",
        fuse=Fuse.identity(5, d, seed=seed),
        bt_embeddings=(bt / np.linalg.norm(bt, axis=1, keepdims=True)).astype(np.float32),
        cls_weight=rng.standard_normal((K, d)).astype(np.float32),
        cls_bias=rng.standard_normal(K).astype(np.float32),
        calibration_scale=np.full(K, 0.5, dtype=np.float32),
        calibration_shift=np.zeros(K, dtype=np.float32),
        hyperparameters=Hyperparameters(lambda0=30.0, sigma2=0.12, v=0.3, gamma=0.999),
        metrics={"routing_accuracy_bt": 0.9},
        data_digest="abc",
    )


def contexts(checkpoint: Checkpoint, rows: int = 6) -> np.ndarray:
    x = np.random.default_rng(1).standard_normal((rows, checkpoint.d)).astype(np.float32)
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def test_a_saved_checkpoint_is_loaded_bit_for_bit(tmp_path: Path) -> None:
    saved = make()
    assert saved.save(tmp_path / "deep" / "ckpt") == saved.digest
    loaded = Checkpoint.load(tmp_path / "deep" / "ckpt")
    assert loaded.digest == saved.digest
    assert (loaded.pool, loaded.encoder_spec, loaded.prior_form) == (saved.pool, "static", "calibrated")
    assert loaded.hyperparameters == saved.hyperparameters
    assert dict(loaded.metrics) == dict(saved.metrics)
    x = contexts(saved)
    np.testing.assert_array_equal(loaded.class_probabilities(x), saved.class_probabilities(x))
    np.testing.assert_array_equal(loaded.bt_scores(x), saved.bt_scores(x))
    z = np.random.default_rng(2).standard_normal((3, 10)).astype(np.float32)
    np.testing.assert_array_equal(loaded.fuse.apply(z), saved.fuse.apply(z))


def test_a_kernel_is_saved_with_its_fuse(tmp_path: Path) -> None:
    base, rng = make(K=3, d=4), np.random.default_rng(3)
    shapes = ((4,), (6, 4), (6, 3))
    kernel = Kernel(*(rng.standard_normal(shape).astype(np.float32) for shape in shapes))
    weight = np.hstack([base.cls_weight, np.eye(3, dtype=np.float32)])
    saved = replace(base, fuse=replace(base.fuse, kernel=kernel), cls_weight=weight)
    saved.save(tmp_path / "ckpt")
    loaded = Checkpoint.load(tmp_path / "ckpt")
    z = rng.standard_normal((5, 10)).astype(np.float32)
    x = saved.fuse.apply(z)
    assert x.shape == (5, 7)
    np.testing.assert_array_equal(loaded.fuse.apply(z), x)
    np.testing.assert_array_equal(loaded.class_probabilities(x), saved.class_probabilities(x))
    np.testing.assert_array_equal(saved.bt_scores(x), base.bt_scores(x[:, :4]))
    joined = saved.select_pool(["R1"]).extended({"R0": saved.column("R0")})
    np.testing.assert_allclose(joined.class_probabilities(x), saved.class_probabilities(x)[:, [1, 0]])
    with pytest.raises(CheckpointError, match="cls_weight has shape"):
        replace(saved, cls_weight=base.cls_weight)


def test_transposed_views_survive_saving(tmp_path: Path) -> None:
    base = make(K=3, d=4)
    view = replace(base, cls_weight=np.asfortranarray(base.cls_weight))
    view.save(tmp_path / "ckpt")
    np.testing.assert_array_equal(Checkpoint.load(tmp_path / "ckpt").cls_weight, base.cls_weight)
    assert view.digest == base.digest


def test_saving_again_replaces_the_old_checkpoint_and_leaves_nothing_behind(tmp_path: Path) -> None:
    make(seed=0).save(tmp_path / "ckpt")
    make(seed=1).save(tmp_path / "ckpt")
    assert Checkpoint.load(tmp_path / "ckpt").digest == make(seed=1).digest
    assert [entry.name for entry in tmp_path.iterdir()] == ["ckpt"]


def test_a_directory_that_is_something_else_is_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(CheckpointError, match="is not a checkpoint"):
        make().save(tmp_path)
    assert (tmp_path / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize("file", [WEIGHTS_FILE, METADATA_FILE])
def test_one_altered_value_is_noticed(tmp_path: Path, file: str) -> None:
    make().save(tmp_path / "ckpt")
    path = tmp_path / "ckpt" / file
    content = path.read_bytes()
    if file == METADATA_FILE:
        path.write_bytes(content.replace(b'"lambda0": 30.0', b'"lambda0": 31.0'))
    else:
        path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    assert path.read_bytes() != content
    with pytest.raises(CheckpointError, match=r"digest does not match.*copy it again"):
        Checkpoint.load(tmp_path / "ckpt")


def test_a_missing_file_a_broken_json_and_a_newer_format_each_say_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="the directory does not exist; correct the path, or train one"):
        Checkpoint.load(tmp_path / "absent")
    make().save(tmp_path / "ckpt")
    metadata = tmp_path / "ckpt" / METADATA_FILE
    content = json.loads(metadata.read_text())
    metadata.write_text(json.dumps({**content, "format_version": 99}))
    with pytest.raises(CheckpointError, match="format version 99"):
        Checkpoint.load(tmp_path / "ckpt")
    metadata.write_text("{")
    with pytest.raises(CheckpointError, match="is not JSON"):
        Checkpoint.load(tmp_path / "ckpt")


def test_probabilities_are_the_calibrated_sigmoid_by_hand() -> None:
    checkpoint = replace(
        make(K=2, d=4),
        cls_weight=np.array([[2, 0, 0, 0], [0, 0, 0, 0]], dtype=np.float32),
        cls_bias=np.array([0, 4], dtype=np.float32),
        calibration_scale=np.array([0.5, 0.5], dtype=np.float32),
        calibration_shift=np.array([0, -2], dtype=np.float32),
    )
    probabilities = checkpoint.class_probabilities(np.array([[1, 0, 0, 0]], dtype=np.float32))
    np.testing.assert_allclose(probabilities, [[1 / (1 + np.exp(-1.0)), 0.5]], rtol=1e-6)


def test_contexts_of_another_width_are_refused() -> None:
    with pytest.raises(ShapeMismatchError, match=r"expected \(B, 4\)"):
        make().class_probabilities(np.zeros((2, 5), dtype=np.float32))


def test_a_sub_pool_keeps_each_arms_probabilities() -> None:
    whole = make()
    part = whole.select_pool(["R2", "R0"])
    x = contexts(whole)
    np.testing.assert_allclose(part.class_probabilities(x), whole.class_probabilities(x)[:, [2, 0]], rtol=1e-6)
    np.testing.assert_allclose(part.bt_scores(x), whole.bt_scores(x)[:, [2, 0]], rtol=1e-6)
    assert part.pool == ("R2", "R0")
    assert part.digest != whole.digest
    with pytest.raises(CheckpointError, match=r"knows no RM \['R9'\]"):
        whole.select_pool(["R0", "R9"])
    with pytest.raises(CheckpointError, match="each once"):
        whole.select_pool(["R0", "R0"])


def test_another_pool_or_encoder_is_refused() -> None:
    checkpoint = make()
    checkpoint.require_pool(["R0", "R1", "R2"])
    checkpoint.require_encoder("static", 5)
    with pytest.raises(CheckpointError, match="same order"):
        checkpoint.require_pool(["R1", "R0", "R2"])
    with pytest.raises(CheckpointError, match="set the encoder to 'static'"):
        checkpoint.require_encoder("minilm", 5)
    with pytest.raises(CheckpointError, match=r"\(6\)"):
        checkpoint.require_encoder("static", 6)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"cls_bias": np.zeros(2, dtype=np.float32)}, "cls_bias has shape"),
        ({"cls_bias": np.zeros(3, dtype=np.float64)}, "cls_bias: must be finite float32"),
        ({"cls_bias": np.full(3, np.nan, dtype=np.float32)}, "cls_bias: must be finite"),
        ({"pool": ("R0", "R0", "R1")}, "each once"),
        ({"prior_form": PriorForm.NONE}, "choose 'paper'"),
    ],
)
def test_a_checkpoint_that_cannot_be_is_never_built(changes: dict[str, object], named: str) -> None:
    with pytest.raises(CheckpointError, match=named):
        replace(make(), **changes)


def with_landmarks(columns: int = 2) -> Checkpoint:
    """A checkpoint whose fuse makes a context of 1 + 2 columns, and landmarks of so many."""
    base = make()
    rng = np.random.default_rng(3)
    fuse = replace(base.fuse, context=rng.standard_normal((4, 2)).astype(np.float32))
    landmarks = Landmarks(rng.standard_normal((8, columns)).astype(np.float32), 0.1 + 0.2)
    hyper = replace(base.hyperparameters, lambda_novel=30.0)
    return replace(base, fuse=fuse, landmarks=landmarks, hyperparameters=hyper)


def test_landmarks_and_the_precision_beside_them_survive_the_disk(tmp_path: Path) -> None:
    saved = with_landmarks()
    assert saved.landmarks is not None
    assert saved.save(tmp_path / "ckpt") == saved.digest
    loaded = Checkpoint.load(tmp_path / "ckpt")
    assert loaded.landmarks is not None
    np.testing.assert_array_equal(loaded.landmarks.positions, saved.landmarks.positions)
    assert loaded.landmarks.radius == 0.1 + 0.2
    assert loaded.hyperparameters.lambda_novel == 30.0
    assert loaded.digest == saved.digest
    assert loaded.select_pool(["R2"]).landmarks is loaded.landmarks


def test_a_checkpoint_from_before_landmarks_keeps_its_meaning_and_its_digest(tmp_path: Path) -> None:
    make().save(tmp_path / "ckpt")
    metadata = json.loads((tmp_path / "ckpt" / METADATA_FILE).read_text())
    assert "lambda_novel" not in metadata["hyperparameters"]
    assert "landmark_radius" not in metadata
    loaded = Checkpoint.load(tmp_path / "ckpt")
    assert (loaded.landmarks, loaded.hyperparameters.lambda_novel) == (None, 0.0)
    assert loaded.digest == metadata["digest"]


def test_landmarks_that_do_not_fit_the_fuse_are_refused() -> None:
    with pytest.raises(CheckpointError, match="landmarks have 3 columns and the fuse's context 2"):
        with_landmarks(columns=3)


def with_votes(K: int = 3) -> Checkpoint:
    rng = np.random.default_rng(5)
    votes = Votes(
        rng.normal(size=(2, 4, K)), rng.uniform(0.5, 2.0, K), rng.uniform(0.0, 2.0, (3, K)), rng.normal(size=1)
    )
    multipliers = Multipliers(np.array([1.0, 1.5, 2.0]), np.array([1.0, 0.02, 0.001]))
    return replace(make(K), votes=votes.rounded(), multipliers=multipliers.rounded())


def test_learned_votes_survive_the_disk_bit_for_bit(tmp_path: Path) -> None:
    saved = with_votes()
    assert saved.votes is not None
    saved.save(tmp_path / "ckpt")
    loaded = Checkpoint.load(tmp_path / "ckpt")
    assert loaded.digest == saved.digest != make().digest
    assert loaded.votes is not None
    np.testing.assert_array_equal(loaded.votes.weights, saved.votes.weights)
    np.testing.assert_array_equal(loaded.votes.deviations, saved.votes.deviations)
    np.testing.assert_array_equal(loaded.votes.margins, saved.votes.margins)
    np.testing.assert_array_equal(loaded.votes.level, saved.votes.level)
    assert loaded.multipliers is not None
    assert loaded.multipliers.at(1.5) == pytest.approx(0.02)


def test_a_part_of_the_pool_keeps_its_votes_and_no_multipliers() -> None:
    whole = with_votes()
    part = whole.select_pool(("R2", "R0"))
    assert whole.votes is not None
    assert part.votes is not None
    np.testing.assert_array_equal(part.votes.weights, whole.votes.weights[:, :, [2, 0]])
    assert part.multipliers is None


def test_votes_of_another_number_of_arms_are_refused() -> None:
    with pytest.raises(CheckpointError, match="votes are of 3 arms, the pool has 2"):
        replace(make(2), votes=with_votes(3).votes)

"""The offline stage: losses by hand, calibration that recovers what was distorted, training that finds the domain."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from router_core.checkpoint import Checkpoint  # noqa: E402
from router_core.dataset import load_pairs  # noqa: E402
from router_core.encoder.base import Block  # noqa: E402
from router_core.encoder.fuse import PairEncoder  # noqa: E402
from router_core.encoder.surface import SurfaceBackbone  # noqa: E402
from router_core.errors import DatasetError, ShapeMismatchError  # noqa: E402
from router_core.offline.calibrate import (  # noqa: E402
    expected_calibration_error,
    fit_calibration,
    negative_log_likelihood,
)
from router_core.offline.evaluate import (  # noqa: E402
    baselines,
    cross_validate,
    evaluate,
    majority_correctness,
    route,
    wilson,
)
from router_core.offline.losses import bradley_terry, correctness_bce  # noqa: E402
from router_core.offline.members import input_projection  # noqa: E402
from router_core.offline.train import TrainConfig, pair_features, train  # noqa: E402
from router_core.records import TIE, Instance, LabelledPair  # noqa: E402

RB9_DEV = Path(os.environ.get("RB9_DEV", Path(__file__).parents[2] / "../shared/data/rb9_dev.jsonl"))
K4 = ("internlm2-1_8b-reward", "GRM-Gemma-2B-rewardmodel-ft", "FsfairX-LLaMA3-RM-v0.1", "RM-Mistral-7B")
FAST = TrainConfig(max_epochs=8, folds=2, directions=4, hidden=8)


def two_domains(n: int = 240, seed: int = 0) -> list[LabelledPair]:
    """Code pairs, on which `coder` is nearly always right and `talker` a coin, and prose the other way round."""
    rng = np.random.default_rng(seed)
    pairs = []
    for i in range(n):
        code = bool(i % 2)
        text = "x = {}; y[{}] = (x);\n" if code else "The weather of day {} was rather like day {}. "
        responses = tuple(text.format(*rng.integers(0, 99, 2)) * int(rng.integers(3, 9)) for _ in range(2))
        label = int(rng.integers(2))
        right = {"coder": rng.random() < (0.95 if code else 0.5), "talker": rng.random() < (0.5 if code else 0.95)}
        verdicts = {name: label if good else 1 - label for name, good in right.items()}
        scores = {name: (float(verdict == 0), float(verdict == 1)) for name, verdict in verdicts.items()}
        instance = Instance(f"question {i}", responses)
        pairs.append(LabelledPair(str(i), instance, label, scores, verdicts, group=str(i)))
    return pairs


def judged(verdicts: dict[str, int], label: int = 0, pair_id: str = "p") -> LabelledPair:
    scores = dict.fromkeys(verdicts, (0.0, 0.0))
    return LabelledPair(pair_id, Instance("p", ("a", "b")), label, scores, verdicts, group=pair_id)


def test_bradley_terry_by_hand() -> None:
    scores = torch.tensor([[2.0, 0.0, 1.0], [5.0, 1.0, 0.0]])
    correctness = torch.tensor([[1.0, 0.0, 0.0], [1.0, 1.0, 1.0]])
    expected = (np.log1p(np.exp(-2.0)) + np.log1p(np.exp(-1.0))) / 2
    assert float(bradley_terry(scores, correctness)) == pytest.approx(expected, rel=1e-5)


def test_bradley_terry_leaves_out_models_that_were_not_asked() -> None:
    scores = torch.tensor([[2.0, 0.0, 9.0]], requires_grad=True)
    loss = bradley_terry(scores, torch.tensor([[1.0, 0.0, float("nan")]]))
    assert float(loss.detach()) == pytest.approx(np.log1p(np.exp(-2.0)), rel=1e-5)
    loss.backward()
    assert scores.grad is not None
    assert float(scores.grad[0, 2]) == 0.0


def test_losses_without_information_are_zero_with_zero_gradient() -> None:
    scores = torch.tensor([[1.0, 2.0]], requires_grad=True)
    loss = bradley_terry(scores, torch.tensor([[1.0, 1.0]])) + correctness_bce(scores, torch.full((1, 2), torch.nan))
    loss.backward()
    assert float(loss.detach()) == 0.0
    assert scores.grad is not None
    assert not scores.grad.any()


def test_correctness_bce_by_hand() -> None:
    logits = torch.tensor([[0.0, 3.0, 7.0]])
    loss = correctness_bce(logits, torch.tensor([[1.0, 0.5, float("nan")]]))
    expected = (np.log(2.0) + 0.5 * np.log1p(np.exp(-3.0)) + 0.5 * np.log1p(np.exp(3.0))) / 2
    assert float(loss) == pytest.approx(expected, rel=1e-5)


def test_calibration_recovers_a_known_distortion() -> None:
    rng = np.random.default_rng(0)
    true = rng.normal(1.0, 1.0, (20_000, 2))
    outcomes = (rng.random(true.shape) < 1 / (1 + np.exp(-true))).astype(float)
    outcomes[:5000, 0] = np.nan
    calibration = fit_calibration((true - [0.5, -0.5]) * 4, outcomes)
    np.testing.assert_allclose(calibration.scale, 0.25, atol=0.02)
    np.testing.assert_allclose(calibration.shift, [0.5, -0.5], atol=0.1)
    probabilities = calibration.probabilities((true - [0.5, -0.5]) * 4)
    assert expected_calibration_error(probabilities, outcomes) < 0.02


def test_a_model_that_was_always_right_gets_a_finite_bias() -> None:
    calibration = fit_calibration(np.zeros((50, 1)), np.ones((50, 1)))
    assert 0.9 < calibration.probabilities(np.zeros((1, 1)))[0, 0] < 1.0


def test_calibration_refuses_shapes_that_differ() -> None:
    with pytest.raises(ShapeMismatchError):
        fit_calibration(np.zeros((3, 2)), np.zeros((3, 3)))


def test_calibration_measures_by_hand() -> None:
    probabilities, outcomes = np.array([[0.5], [1.0], [0.9]]), np.array([[1.0], [1.0], [np.nan]])
    assert negative_log_likelihood(probabilities, outcomes) == pytest.approx(np.log(2) / 2)
    assert expected_calibration_error(probabilities, outcomes, bins=1) == pytest.approx(0.25)


def test_wilson_interval_by_hand() -> None:
    interval = wilson(8, 10)
    assert (interval.value, round(interval.low, 4), round(interval.high, 4)) == (0.8, 0.4902, 0.9433)
    assert wilson(5, 5).high == pytest.approx(1.0)
    assert (wilson(0, 0).low, wilson(0, 0).high) == (0.0, 1.0)


def test_majority_counts_ties_as_no_vote_and_a_draw_as_one_half() -> None:
    pairs = [
        judged({"A": 0, "B": 0, "C": 1}, pair_id="1"),
        judged({"A": 0, "B": 1}, pair_id="2"),
        judged({"A": 1, "B": TIE, "C": TIE}, pair_id="3"),
    ]
    np.testing.assert_array_equal(majority_correctness(pairs, ("A", "B", "C")), [1, 0.5, 0])


def test_baselines_by_hand() -> None:
    table = baselines([judged({"A": 0, "B": 1}, pair_id="1"), judged({"A": 1, "B": 1}, pair_id="2")], ("A", "B"))
    values = {name: accuracy.value for name, accuracy in table.items()}
    assert values == {"A": 0.5, "B": 0.0, "random": 0.25, "majority": 0.25, "oracle": 0.5}


def test_the_projection_standardises_measured_columns_and_drops_constant_ones() -> None:
    rng = np.random.default_rng(0)
    z = rng.normal(3.0, 2.0, (500, 10)).astype(np.float32)
    z[:, 1] = 7.0
    shift, projection = input_projection(z, (Block(2, dense=False), Block(3, dense=True)), components=2)
    u = (z - shift) @ projection
    assert u.shape == (500, (2 - 1) + 2 + 2 + 2)
    np.testing.assert_allclose(u.mean(axis=0), 0.0, atol=1e-4)
    np.testing.assert_allclose(u.std(axis=0), [1, *[0.5**0.5] * 2, 1, 1, *[0.5**0.5] * 2], rtol=1e-3)


def test_texts_that_are_all_equal_cannot_be_trained_on() -> None:
    pairs = [judged({"A": i % 2}, pair_id=str(i)) for i in range(8)]
    with pytest.raises(DatasetError, match="all equal"):
        train(pairs, ("A",), SurfaceBackbone(), FAST)


def test_training_learns_which_model_is_right_where() -> None:
    backbone = SurfaceBackbone()
    pairs = two_domains()
    checkpoint = train(pairs, ("coder", "talker"), backbone, replace(FAST, max_epochs=20))
    unseen = two_domains(100, seed=1)
    x = PairEncoder(backbone, checkpoint.fuse).encode([pair.instance for pair in unseen])
    code = np.arange(100) % 2 == 1
    for head in ("bt", "cls"):
        assert (route(checkpoint, x, head) == np.where(code, 0, 1)).mean() > 0.97
    probabilities = checkpoint.class_probabilities(x)
    seen = np.mean([[pair.correctness(name) for name in checkpoint.pool] for pair in pairs[1::2]], axis=0)
    np.testing.assert_allclose(probabilities[code].mean(axis=0), seen, atol=0.1)
    report = evaluate(checkpoint, unseen, pair_features(unseen, backbone))
    assert report.accuracies["router_bt"].value > report.accuracies[report.best_single].value


def test_equal_seeds_give_equal_checkpoints_and_the_process_wide_generator_is_left_alone() -> None:
    pairs = two_domains(40)
    state = torch.random.get_rng_state()
    first = train(pairs, ("coder", "talker"), SurfaceBackbone(), FAST)
    torch.rand(3)
    second = train(pairs, ("coder", "talker"), SurfaceBackbone(), FAST)
    other = train(pairs, ("coder", "talker"), SurfaceBackbone(), replace(FAST, seed=1))
    assert first.digest == second.digest != other.digest
    torch.random.set_rng_state(state)
    train(pairs, ("coder", "talker"), SurfaceBackbone(), FAST)
    assert torch.equal(torch.random.get_rng_state(), state)


def test_a_trained_checkpoint_survives_the_disk(tmp_path: Path) -> None:
    backbone = SurfaceBackbone()
    trained = train(two_domains(40), ("coder", "talker"), backbone, FAST)
    trained.save(tmp_path / "ckpt")
    loaded = Checkpoint.load(tmp_path / "ckpt")
    loaded.require_encoder(backbone.spec, backbone.dim)
    assert loaded.digest == trained.digest
    np.testing.assert_allclose(np.linalg.norm(loaded.bt_embeddings, axis=1), 1.0, rtol=1e-5)


def test_models_that_were_not_asked_everywhere_can_be_trained_but_not_judged() -> None:
    pairs = two_domains(60)
    alone = [
        replace(pair, verdicts={"coder": pair.verdicts["coder"]}, scores={"coder": pair.scores["coder"]})
        for pair in pairs[:20]
    ]
    partial = alone + pairs[20:]
    checkpoint = train(partial, ("coder", "talker"), SurfaceBackbone(), FAST)
    assert 0.0 < checkpoint.metrics["routing_accuracy_bt"] <= 1.0
    with pytest.raises(DatasetError, match="20 incomplete pairs"):
        cross_validate(partial, ("coder", "talker"), SurfaceBackbone(), FAST, n_folds=2)


def test_without_the_correctness_loss_the_head_is_the_base_rate() -> None:
    pairs = two_domains(80)
    checkpoint = train(pairs, ("coder", "talker"), SurfaceBackbone(), replace(FAST, lambda_cls=0.0))
    assert not checkpoint.cls_weight.any()
    base = [np.mean([pair.correctness(name) for pair in pairs]) for name in ("coder", "talker")]
    probabilities = checkpoint.class_probabilities(np.eye(1, checkpoint.d, dtype=np.float32))
    given_up = probabilities[0] - base
    np.testing.assert_allclose(given_up[np.argmax(base)], 0.0, atol=0.05)
    assert given_up[np.argmin(base)] < 0.05


def test_no_pairs_are_refused() -> None:
    with pytest.raises(DatasetError, match="there are none"):
        train([], ("A",), SurfaceBackbone())


@pytest.mark.slow
@pytest.mark.skipif(not RB9_DEV.is_file(), reason="set RB9_DEV to the recorded evaluation pairs")
def test_on_recorded_pairs_routing_beats_the_best_single_model_and_the_majority() -> None:
    pairs = load_pairs(RB9_DEV)
    report = cross_validate(pairs, K4, SurfaceBackbone(), n_folds=5)
    accuracy = {name: value.value for name, value in report.accuracies.items()}
    assert accuracy[report.best_single] == pytest.approx(0.8533, abs=1e-4)
    assert min(accuracy["router_bt"], accuracy["router_cls"]) > 0.90 > accuracy["majority"]
    assert report.expected_calibration_error < 0.04

"""The model card: its figures can be computed by hand, and it survives beside the checkpoint."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("matplotlib")

from router_core.checkpoint import Checkpoint
from router_core.encoder.fuse import Fuse
from router_core.errors import ShapeMismatchError
from router_core.offline.card import best_single, card, reliability, reliability_figure, write_card
from router_core.offline.train import TrainConfig
from router_core.records import Instance, LabelledPair

POOL = ("first", "se|cond")
SUBSETS = ("code", "code", "chat", "")
CORRECTNESS = np.array([[1.0, 0.0], [0.0, 1.0], [0.5, np.nan], [1.0, 1.0]])
PROBABILITIES = np.array([[0.9, 0.2], [0.8, 0.6], [0.3, 0.9], [0.4, 0.7]])


def pairs() -> list[LabelledPair]:
    found = []
    for i, (subset, right) in enumerate(zip(SUBSETS, CORRECTNESS, strict=True)):
        verdicts = {n: {1.0: 0, 0.0: 1, 0.5: -1}[y] for n, y in zip(POOL, right, strict=True) if not np.isnan(y)}
        found.append(LabelledPair(str(i), Instance("p", ("a", "b")), 0, {}, verdicts, subset=subset, group=str(i // 2)))
    return found


def checkpoint() -> Checkpoint:
    return Checkpoint(
        pool=POOL,
        encoder_spec="static",
        fuse=Fuse.identity(3, 4),
        bt_embeddings=np.eye(2, 4, dtype=np.float32),
        cls_weight=np.zeros((2, 4), np.float32),
        cls_bias=np.zeros(2, np.float32),
        calibration_scale=np.ones(2, np.float32),
        calibration_shift=np.zeros(2, np.float32),
        metrics={"pairs": 4, "routing_accuracy_cls": 0.625},
        data_digest="d" * 64,
    )


def lines(text: str, start: str) -> list[str]:
    return [line for line in text.splitlines() if line.startswith(start)]


def test_the_figures_are_those_of_the_held_out_predictions() -> None:
    text = card(checkpoint(), pairs(), pairs(), PROBABILITIES, CORRECTNESS, PROBABILITIES, TrainConfig(seed=7))
    # Chosen: first (right), first (wrong), first (tie: the other was not asked), second (right).
    assert lines(text, "| **all**")[0].startswith("| **all** | 4 | **0.625** |")
    assert lines(text, "| code | 2 | **0.500**")
    assert lines(text, "| chat | 1 | **0.500** | 0.")[0].endswith("| first | 0.500 | 0.500 |")
    assert lines(text, "| (none) | 1 | **1.000**")
    assert lines(text, "| first | 4 | 0.625 | 0.600 |")
    assert lines(text, "| se\\|cond | 3 | 0.667 | 0.500 |")
    assert lines(text, "| seed | 7 |")
    # One domain: no rows per domain. Said .9, .8, .3 and .7, right 1, 0, .5 and 1; gaps per RM .025 and .167.
    assert lines(text, "| **all** | 4 | 0.675 | 0.625 | 0.096 |")
    assert lines(text, "| labelled pairs | 4 in 2 groups |")
    assert checkpoint().digest in text
    assert "d" * 64 in text


def test_a_router_by_other_scores_is_judged_by_these() -> None:
    text = card(checkpoint(), pairs(), pairs(), PROBABILITIES, CORRECTNESS, PROBABILITIES[:, ::-1], TrainConfig())
    assert lines(text, "| **all** | 4 | **0.625**")
    by_second = card(checkpoint(), pairs(), pairs(), PROBABILITIES, CORRECTNESS, np.eye(2)[[1, 1, 0, 0]], TrainConfig())
    assert lines(by_second, "| code | 2 | **0.500**")


def test_held_out_pairs_may_be_a_part_of_all(tmp_path: Path) -> None:
    checkpoint().save(tmp_path / "c")
    write_card(tmp_path / "c", checkpoint(), pairs(), PROBABILITIES[1:3], CORRECTNESS[1:3], TrainConfig(), rows=[1, 2])
    text = (tmp_path / "c/README.md").read_text("utf-8")
    assert "2 pairs, none of which was trained on" in text
    assert lines(text, "| **all** | 2 | **0.250**")
    assert lines(text, "| code | 2 |"), "the data's own counts are of all pairs"


def test_the_card_lies_beside_a_checkpoint_that_still_loads(tmp_path: Path) -> None:
    checkpoint().save(tmp_path / "c")
    write_card(tmp_path / "c", checkpoint(), pairs(), PROBABILITIES, CORRECTNESS, TrainConfig())
    assert (tmp_path / "c/calibration.png").read_bytes().startswith(b"\x89PNG")
    first = (tmp_path / "c/README.md").read_bytes(), (tmp_path / "c/calibration.png").read_bytes()
    assert Checkpoint.load(tmp_path / "c").digest == checkpoint().digest
    write_card(tmp_path / "c", checkpoint(), pairs(), PROBABILITIES, CORRECTNESS, TrainConfig())
    again = (tmp_path / "c/README.md").read_bytes(), (tmp_path / "c/calibration.png").read_bytes()
    assert first == again, "nothing of when it was written"


def test_what_does_not_belong_together_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ShapeMismatchError, match=r"expected \(4, 2\)"):
        write_card(tmp_path, checkpoint(), pairs(), PROBABILITIES[:3], CORRECTNESS[:3], TrainConfig())


def test_reliability_by_hand() -> None:
    points = reliability(np.array([0.9, 0.1, 0.2, 0.8, 0.5]), np.array([1.0, 0.0, 0.5, 1.0, np.nan]), bins=2)
    assert [(round(p, 3), y) for p, y, _, _ in points] == [(0.15, 0.25), (0.85, 1.0)]
    assert all(low <= y <= high + 1e-9 for _, y, low, high in points)
    assert reliability(np.array([0.5]), np.array([np.nan])) == []


@pytest.mark.parametrize("K", [1, 2, 4, 9])
def test_the_figure_has_a_panel_for_every_model(K: int) -> None:
    rng = np.random.default_rng(0)
    outcomes = np.where(rng.random((30, K)) < 0.5, 1.0, 0.0)
    outcomes[:, 0] = np.nan
    figure = reliability_figure([f"model {k}" for k in range(K)], rng.random((30, K)), outcomes)
    assert sum(axis.get_visible() for axis in figure.axes) == K


def test_a_model_that_was_never_asked_among_the_held_out_has_no_figures() -> None:
    alone = np.column_stack([CORRECTNESS[:, 0], np.full(4, np.nan)])
    text = card(checkpoint(), pairs(), pairs(), PROBABILITIES, alone, PROBABILITIES, TrainConfig(directions=3))
    assert lines(text, "| se\\|cond | 0 | – |")


def test_silence_is_no_accuracy() -> None:
    seldom, always = [1.0, np.nan, np.nan, np.nan], [1.0, 1.0, 1.0, 0.0]
    assert best_single(np.array([seldom, always]).T) == (1, 0.75)

"""A checkpoint with learned votes that are easy to work out by hand."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from router_core.checkpoint import Checkpoint
from router_core.combine import Multipliers, Votes
from router_core.encoder.fuse import Fuse, PairEncoder
from router_core.encoder.surface import SurfaceBackbone
from tests.support.gateway import DIM

MODELS = ("rm-a", "rm-b", "rm-c")
OFFSETS = [0.75, 0.7, 0.65]
VOTES = Votes(np.array([[[0.0] * 3, [1.0] * 3, [0.0] * 3, [0.0] * 3], [[0.0] * 3] * 4]), np.ones(3), np.zeros((1, 3)))
"""Every RM's verdict counts with the logit of its offset."""


def checkpoint(folder: Path, votes: Votes | None) -> tuple[Path, PairEncoder]:
    """A checkpoint that believes `OFFSETS` of the RMs, whatever the text."""
    backbone = SurfaceBackbone()
    made = Checkpoint(
        pool=MODELS,
        encoder_spec="surface",
        fuse=Fuse.identity(backbone.dim, DIM),
        bt_embeddings=np.eye(3, DIM, dtype=np.float32),
        cls_weight=np.zeros((3, DIM), dtype=np.float32),
        cls_bias=np.log(np.array(OFFSETS) / (1 - np.array(OFFSETS))).astype(np.float32),
        calibration_scale=np.ones(3, dtype=np.float32),
        calibration_shift=np.zeros(3, dtype=np.float32),
        metrics={},
        votes=votes,
        multipliers=None if votes is None else Multipliers(np.array([1.0, 2.0, 3.0]), np.array([1.0, 0.01, 0.001])),
    )
    made.save(folder / "checkpoint")
    return folder / "checkpoint", PairEncoder(backbone, made.fuse)

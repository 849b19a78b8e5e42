"""Kinds of texts that come with the package, for pools with few labelled pairs: learned once from 85 published RMs.

Knows a file of our own numbers beside this module, and how to tell whether it fits an encoder. Called by the `train`
command; `evaluate`, `replay` and `make tables` learn their kinds inside the folds, as the file was learned from pairs
of public benchmarks. Written by `python -m loadtests.kinds FILE --ship OUT`.

The verdicts are those of AI2's published RewardBench results, by way of aims-foundations/torch_measure (MIT, commit
a2ef142e); 1,498 pairs of RewardBench's chat, adversarial, code and maths subsets.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from router_core.encoder.base import Backbone

FEW = 256
"""Labelled pairs below which the shipped kinds are used; above, a pool's own verdicts teach as much (S6, 512 pairs:
+.003, standard error .004).
"""
MANY_MODELS = 20
"""Data with the verdicts of so many RMs teach their own kinds."""

_FILES = {"static": "kinds-static.npz"}
_PROBE = ("Write a short poem about the sea.", "The sea is wide,\nthe sea is deep.\n\n* waves\n* wind")
"""Its encoding is kept in the file, so that kinds are never read with other features than they were learned on."""
_TOLERANCE = 1e-4


def shipped_kinds(backbone: Backbone, pairs: int, models: int) -> NDArray[np.float32] | None:
    """The kinds for this encoder, (2 * dim, r) float32; None where the data teach better ones, or none were shipped.

    Args:
        backbone: whose encodings the kinds read.
        pairs: labelled pairs at hand.
        models: RMs with verdicts in the data, of the pool or not.
    """
    if pairs >= FEW or models >= MANY_MODELS or backbone.spec not in _FILES:
        return None
    return read_kinds(Path(__file__).with_name(_FILES[backbone.spec]), backbone)


def write_kinds(path: Path, kinds: NDArray[np.floating], backbone: Backbone) -> None:
    """Write kinds (2 * dim, r) that were learned from this encoder's encodings."""
    np.savez_compressed(path, kinds=kinds.astype(np.float32), probe=backbone.embed([_PROBE])[0].astype(np.float32))


def read_kinds(path: Path, backbone: Backbone) -> NDArray[np.float32] | None:
    """The kinds of a file; None where this encoder does not encode as the file's did."""
    with np.load(path) as stored:
        kinds, probe = np.asarray(stored["kinds"], np.float32), stored["probe"]
    found = backbone.embed([_PROBE])[0]
    return kinds if found.shape == probe.shape and np.allclose(found, probe, atol=_TOLERANCE) else None

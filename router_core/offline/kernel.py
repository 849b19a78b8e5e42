"""Which RM was right on the training pairs most like this one: kernel ridge regression on the standardised encodings.

The networks of `offline.members` see a pair through a few directions; this sees which training pairs are near it. The
two err differently, and where routing pays their sum routes better than either (docs/experiments.md). Knows
standardised encodings and targets; called by `offline.members`. What it fits is read by `encoder.fuse`.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from router_core.encoder.fuse import Kernel

ANCHORS = 512
"""Training pairs that the fit is spread over; with all of a thousand it routes alike (docs/experiments.md)."""
RIDGE = 1.0
"""Ridge penalty; one half and two are alike."""
GAIN = 8.0
"""By how much a prediction of 1 raises a logit of the networks, before the calibration; 4 to 18 are alike where the
kernel helps (docs/experiments.md)."""
KINDS = 4.0
"""How much more a kind of text counts in distances than another input."""
_JITTER = 1e-6


def fit_kernel(
    u: NDArray[np.float32], targets: NDArray[np.float64], kinds: int, rng: np.random.Generator
) -> tuple[Kernel, NDArray[np.float64]]:
    """Fit the kernel exp(−‖s∘u − s∘a‖) over anchors a, with s such that the median squared distance of pairs is 1.

    Subset of regressors (Nyström): the weights W minimise ‖Y − K_NA W‖² + ridge · tr(Wᵀ K_AA W), Y the targets less
    each RM's mean; so far from all training pairs the prediction is that mean.

    Args:
        u: (N, p) standardised encodings.
        targets: (N, K) in [0, 1], NaN where an RM was not asked.
        kinds: how many of the last columns are kinds of texts.
        rng: chooses the anchors where there are more pairs.

    Returns:
        The kernel, and the RMs' means (K,).
    """
    reach = np.ones(u.shape[1])
    reach[u.shape[1] - kinds :] = KINDS
    anchors = np.sort(rng.permutation(len(u))[:ANCHORS])
    rows = u * reach
    near = rows[anchors]
    scale = np.sqrt(max(float(np.median(_squares(near, near))), _JITTER))
    reach, near = reach / scale, near / scale
    similar = np.exp(-np.sqrt(_squares(rows / scale, near)))
    inner = similar[anchors] + _JITTER * np.eye(len(anchors))
    asked = np.isfinite(targets)
    means = np.where(asked, targets, 0.0).sum(axis=0) / np.maximum(asked.sum(axis=0), 1)
    departures = targets - means
    weights = np.empty((len(anchors), targets.shape[1]))
    # RMs that were asked about the same pairs share one factorisation.
    patterns, index = np.unique(asked, axis=1, return_inverse=True)
    for i, pattern in enumerate(patterns.T):
        seen, arms = similar[pattern], np.flatnonzero(index.ravel() == i)
        weights[:, arms] = np.linalg.solve(seen.T @ seen + RIDGE * inner, seen.T @ departures[np.ix_(pattern, arms)])
    return Kernel(reach.astype(np.float32), near.astype(np.float32), weights.astype(np.float32)), means


def _squares(a: NDArray[np.float64], b: NDArray[np.float64]) -> NDArray[np.float64]:
    """Squared distances of every row of a from every row of b."""
    squares = np.square(a).sum(axis=1)[:, None] + np.square(b).sum(axis=1) - 2.0 * a @ b.T
    return np.asarray(np.maximum(squares, 0.0))

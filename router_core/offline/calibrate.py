"""Make "probability that RM k is right" mean it: temperature, bias and level from held-out logits, and how they fit.

Knows logits, contexts and outcomes; nothing of how they came about. Called by `offline.train` and `offline.finetune`
with held-out predictions, and by whatever reports how well probabilities fit.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from router_core.errors import ShapeMismatchError
from router_core.intervals import mean_spread
from router_core.offline.losses import correctness_bce

Array = NDArray[np.float64]

LEVEL = 2.0
"""Prior deviation of the level's weights. Held-out likelihood is flat from 1 to 3 (docs/experiments.md)."""
HANDICAPS = (0.0, 0.25, 0.5, 1.0, 2.0)
"""In logits."""
_RIDGE = 1e-3
"""Ridge penalty on temperature and biases."""


@dataclass(frozen=True, slots=True, eq=False)
class Calibration:
    """Calibrated logit of arm k = scale_k · logit_k + shift_k + cᵀQc, with c the low-rank context.

    scale (K,), shift (K,), float64, scale > 0; level Q (q, q) symmetric, or None for 0 everywhere. The level is the
    same for all arms, so it changes how much is promised and not which arm is promised most.
    """

    scale: Array
    shift: Array
    level: Array | None = None

    def probabilities(self, logits: NDArray[np.floating], contexts: NDArray[np.floating] | None = None) -> Array:
        """Logits (N, K) with contexts (N, q) to calibrated probabilities; contexts are needed for the level only."""
        z = self.scale * logits + self.shift
        if self.level is not None:
            if contexts is None:
                raise ShapeMismatchError("contexts: this calibration has a level, give the rows' contexts (N, q)")
            z = z + levels(self.level, contexts)[:, None]
        probabilities: Array = 1.0 / (1.0 + np.exp(-np.clip(z, -30.0, 30.0)))
        return probabilities


def levels(level: NDArray[np.floating], contexts: NDArray[np.floating]) -> Array:
    """cᵀQc of every row: (q, q) and (N, q) to (N,)."""
    return np.asarray(((contexts @ level) * contexts).sum(axis=1), dtype=np.float64)


def fit_calibration(
    logits: NDArray[np.floating],
    correctness: Array,
    contexts: NDArray[np.floating] | None = None,
    deviation: float = LEVEL,
) -> Calibration:
    """Temperature and biases, then temperature and level, each by held-out negative log-likelihood.

    1. min_{t, b} BCE(exp(t) · logit_k + b_k, y_k) + ridge · (t² + mean b²). One temperature, because the arms share one
       network and so its over-confidence; the ridge keeps an arm that was always right from an infinite bias.
    2. With z_k that calibrated logit: min_{t, Q} BCE(exp(t) · z_k + cᵀQc, y_k) + ridge · t² + ‖Q‖² / (2 N deviation²).
       One level, because kinds of text are hard or easy for all arms alike. The biases stay in proportion, so the order
       of the arms is that of step 1; c is unit-norm, so on texts unlike these the level stays within ‖Q‖.

    Args:
        logits: (N, K) held-out logits.
        correctness: (N, K) in {0, 0.5, 1}, NaN where the RM was not asked.
        contexts: (N, q) unit-norm; None or no column: no level.
        deviation: prior standard deviation of the entries of Q; 0: no level.

    Raises:
        ShapeMismatchError: the shapes differ or there is no row.
    """
    if logits.shape != correctness.shape or not len(logits):
        raise ShapeMismatchError(
            f"logits {logits.shape} and correctness {correctness.shape} must be equal, with a row at least"
        )
    if contexts is not None and len(contexts) != len(logits):
        raise ShapeMismatchError(f"contexts {contexts.shape}: needs a row for each of the {len(logits)} logits")
    z, y = torch.as_tensor(logits, dtype=torch.float64), torch.as_tensor(correctness, dtype=torch.float64)
    t, bias = torch.zeros((), dtype=torch.float64), torch.zeros(z.shape[1], dtype=torch.float64)
    _minimise([t, bias], lambda: correctness_bce(t.exp() * z + bias, y) + _RIDGE * (t**2 + (bias**2).mean()))
    scale, shift = float(t.detach().exp()), bias.detach().numpy().copy()
    if contexts is None or not contexts.shape[1] or deviation == 0:
        return Calibration(np.full(len(shift), scale), shift)
    z, products = scale * z + bias.detach(), torch.as_tensor(_products(contexts))
    t, weights = torch.zeros((), dtype=torch.float64), torch.zeros(products.shape[1], dtype=torch.float64)
    spring = 1.0 / (2.0 * len(z) * deviation**2)

    def loss() -> Tensor:
        fit = correctness_bce(t.exp() * z + (products @ weights)[:, None], y)
        return fit + _RIDGE * t**2 + spring * (weights**2).sum()

    _minimise([t, weights], loss)
    stretch = float(t.detach().exp())
    return Calibration(np.full(len(shift), stretch * scale), stretch * shift, _matrix(weights.detach().numpy()))


def handicap(probabilities: Array, correctness: Array, groups: Sequence[str]) -> Array:
    """What every RM but the best overall gives up, so that routing never pays less than asking that one: (K,) logits.

    The highest of many uncertain probabilities is too high, the more so the more RMs there are. Where routing by
    held-out probabilities is not better than the best RM by more than a standard error, the handicap of `HANDICAPS`
    under which it earns most is taken, the smallest of equals, if that earns more by more than a standard error. With
    few pairs nothing is sure, and the handicap is 0.

    Args:
        probabilities: (N, K) of fits that had not seen a pair's group.
        correctness: (N, K), NaN where an RM was not asked.
        groups: N names.

    Returns:
        0 for the best RM and −h for the others.
    """
    best = int(np.nanmean(correctness, axis=0).argmax())
    rows = ~np.isnan(correctness[:, best])
    known, names = correctness[rows], [name for name, kept in zip(groups, rows, strict=True) if kept]
    logits = np.where(np.isnan(known), -np.inf, _logit(probabilities[rows]))
    others = np.arange(correctness.shape[1]) != best

    def earned(h: float) -> Array:
        right: Array = known[np.arange(len(known)), (logits - h * others).argmax(axis=1)]
        return right

    routed = earned(0.0)
    if _surely_positive(routed - known[:, best], names):
        return np.zeros(len(others))
    chosen = max(HANDICAPS, key=lambda h: (float(earned(h).mean()), -h))
    return np.where(others & _surely_positive(earned(chosen) - routed, names), -chosen, 0.0)


def surely_worse(probabilities: Array, others: Array, correctness: Array, groups: Sequence[str]) -> bool:
    """Return True if routing by `probabilities` earns less than by `others`, by more than a standard error over groups.

    Args:
        probabilities, others: (N, K) of fits that had not seen a pair's group.
        correctness: (N, K), NaN where an RM was not asked; rows without any RM are left out.
        groups: N names.
    """
    asked = ~np.isnan(correctness)
    rows = np.flatnonzero(asked.any(axis=1))
    earned = [
        correctness[rows, np.where(asked, each, -np.inf)[rows].argmax(axis=1)] for each in (others, probabilities)
    ]
    return _surely_positive(earned[0] - earned[1], [groups[i] for i in rows.tolist()])


def surely_gains(probabilities: Array, correctness: Array, groups: Sequence[str]) -> bool:
    """Return True if routing earns more than the best RM on the same pairs, by more than a standard error over groups.

    Args:
        probabilities: (N, K) of fits that had not seen a pair's group.
        correctness: (N, K), NaN where an RM was not asked; rows that lack the best RM are left out.
        groups: N names.
    """
    best = np.zeros_like(correctness)
    best[:, int(np.nanmean(correctness, axis=0).argmax())] = 1.0
    rows = np.isfinite(correctness[best > 0])
    names = [name for name, kept in zip(groups, rows, strict=True) if kept]
    return surely_worse(best[rows], probabilities[rows], correctness[rows], names)


def _surely_positive(gains: Array, groups: Sequence[str]) -> bool:
    """Return True if the mean gain (N,) is above its standard error over the groups."""
    return bool(gains.mean() > np.sqrt(mean_spread(gains[None], groups)[0]))


def handicapped(probabilities: Array, shift: Array) -> Array:
    """Probabilities (N, K) whose logits are moved by `handicap`'s shift (K,)."""
    moved: Array = 1 / (1 + np.exp(-(_logit(probabilities) + shift)))
    return moved


def _logit(probabilities: Array) -> Array:
    p = np.clip(probabilities, 1e-12, 1 - 1e-12)
    logits: Array = np.log(p) - np.log1p(-p)
    return logits


def _minimise(parameters: Sequence[Tensor], loss: Callable[[], Tensor]) -> None:
    """Move the parameters to the loss's minimum, by L-BFGS."""
    for parameter in parameters:
        parameter.requires_grad_(True)
    optimiser = torch.optim.LBFGS(parameters, max_iter=200, line_search_fn="strong_wolfe")

    def closure() -> float:
        optimiser.zero_grad()
        value = loss()
        value.backward()  # type: ignore[no-untyped-call]
        return float(value.detach())

    optimiser.step(closure)  # type: ignore[no-untyped-call]


def cross_calibrated(
    logits: NDArray[np.floating],
    correctness: Array,
    contexts: NDArray[np.floating] | None,
    folds: Sequence[tuple[NDArray[np.int64], NDArray[np.int64]]],
    deviation: float = LEVEL,
) -> Array:
    """Probabilities (N, K) of rows that the calibration has not seen: each fold's by a fit to the other folds' rows.

    Args:
        logits, correctness, contexts, deviation: as for `fit_calibration`.
        folds: (inside, outside) row indices; the outsides partition the rows.
    """
    probabilities = np.empty(logits.shape)
    for inside, outside in folds:
        seen, unseen = (None, None) if contexts is None else (contexts[inside], contexts[outside])
        calibration = fit_calibration(logits[inside], correctness[inside], seen, deviation)
        probabilities[outside] = calibration.probabilities(logits[outside], unseen)
    return probabilities


def calibration_by_domain(
    probabilities: Array, correctness: Array, chosen: NDArray[np.int64], domains: Sequence[str]
) -> dict[str, dict[str, Any]]:
    """How well probabilities fit, per domain, and under "" for all rows.

    Args:
        probabilities, correctness: (N, K), NaN correctness where an RM was not asked.
        chosen: (N,) the arm that the router asks.
        domains: N names; "" stands as "(none)".

    Returns:
        Per domain `n`, `said` and `right` (means for the chosen arm where it was asked), `bias` (mean over arms of
        |mean probability − mean outcome|), `negative_log_likelihood` and `expected_calibration_error` over all arms.
    """
    names = np.array([name or "(none)" for name in domains], dtype=str)
    parts = {name: names == name for name in sorted(set(names.tolist()))}
    parts[""] = np.ones(len(names), np.bool_)
    return {name: _fit_of(probabilities[rows], correctness[rows], chosen[rows]) for name, rows in parts.items()}


def _fit_of(probabilities: Array, correctness: Array, chosen: NDArray[np.int64]) -> dict[str, Any]:
    rows = np.arange(len(chosen))
    said, right = probabilities[rows, chosen], correctness[rows, chosen]
    known, asked = ~np.isnan(right), ~np.isnan(correctness)
    judged = [k for k in range(correctness.shape[1]) if asked[:, k].any()]
    gaps = [abs(float((probabilities[:, k] - correctness[:, k])[asked[:, k]].mean())) for k in judged]
    return {
        "n": len(chosen),
        "said": float(said[known].mean()) if known.any() else float("nan"),
        "right": float(right[known].mean()) if known.any() else float("nan"),
        "bias": float(np.mean(gaps)) if gaps else float("nan"),
        "negative_log_likelihood": negative_log_likelihood(probabilities, correctness),
        "expected_calibration_error": expected_calibration_error(probabilities, correctness),
    }


def _products(contexts: NDArray[np.floating]) -> Array:
    """Products of two coordinates, (N, q) to (N, q(q + 1)/2), so scaled that their weights' norm is that of Q."""
    i, j = np.triu_indices(contexts.shape[1])
    products: Array = contexts[:, i].astype(np.float64) * contexts[:, j] * np.where(i == j, 1.0, np.sqrt(2.0))
    return products


def _matrix(weights: Array) -> Array:
    """Q (q, q) of the weights of `_products`."""
    q = int((np.sqrt(8 * len(weights) + 1) - 1) / 2)
    i, j = np.triu_indices(q)
    level = np.zeros((q, q))
    level[i, j] = level[j, i] = weights / np.where(i == j, 1.0, np.sqrt(2.0))
    return level


def negative_log_likelihood(probabilities: NDArray[np.float64], correctness: NDArray[np.float64]) -> float:
    """Mean over the asked (pair, RM) of −y log p − (1−y) log(1−p), in nats; NaN correctness is left out."""
    asked = ~np.isnan(correctness)
    p, y = np.clip(probabilities[asked], 1e-12, 1 - 1e-12), correctness[asked]
    return float(-(y * np.log(p) + (1 - y) * np.log1p(-p)).mean())


def expected_calibration_error(
    probabilities: NDArray[np.float64], correctness: NDArray[np.float64], bins: int = 10
) -> float:
    """ECE = Σ_b (n_b / n) |mean outcome in b − mean probability in b|, over bins of equal count.

    Equal counts, because nearly all probabilities here lie between 0.6 and 1. NaN correctness is left out; 0 with no
    outcome at all.
    """
    asked = ~np.isnan(correctness)
    p, y = probabilities[asked], correctness[asked]
    order = np.argsort(p, kind="stable")
    error = 0.0
    for chunk in np.array_split(order, min(bins, max(len(order), 1))):
        if len(chunk):
            error += len(chunk) / len(order) * abs(float(y[chunk].mean() - p[chunk].mean()))
    return error

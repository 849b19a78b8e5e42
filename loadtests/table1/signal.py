"""How much the paper's feedback says: does a low loss mean that the verdict was right? And whom did a router ask?

Pure; numpy only. Called by `report`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from loadtests.table1.tasks import FAMILIES
from router_core.feedback import LOSS_EMA_RATE, LOSS_WARM_UP, Z_CLIP


@dataclass(frozen=True, slots=True)
class SignalQuality:
    """The quality of one row's signal, over all its runs, per third of the training.

    Attributes:
        correlation: between z (higher is better) and whether the verdict was right.
        auc: probability that a right verdict has the higher z than a wrong one.
        gap: mean z of right verdicts minus mean z of wrong ones.
    """

    correlation: tuple[float, ...]
    auc: tuple[float, ...]
    gap: tuple[float, ...]


def z_scores(models: Sequence[str], losses: Sequence[float]) -> list[float | None]:
    """The paper's reward: z = (mean − loss)/sd of the arm's moving averages, clipped; None while they warm up.

    Args:
        models: the asked RM per feedback, in order.
        losses: its loss.
    """
    count: dict[str, int] = {}
    mean: dict[str, float] = {}
    square: dict[str, float] = {}
    out: list[float | None] = []
    for model, loss in zip(models, losses, strict=True):
        n = count[model] = count.get(model, 0) + 1
        m, s = mean.get(model, 0.0), square.get(model, 0.0)
        sd = max(s - m * m, 0.0) ** 0.5
        z = 0.0 if sd == 0.0 else min(max((m - loss) / sd, -Z_CLIP), Z_CLIP)
        out.append(None if n <= LOSS_WARM_UP else z)
        rate = max(LOSS_EMA_RATE, 1.0 / n)
        mean[model], square[model] = (1 - rate) * m + rate * loss, (1 - rate) * s + rate * loss * loss
    return out


def signal_quality(runs: Sequence[Mapping[str, Any]], parts: int = 3) -> SignalQuality:
    """Quality of the loss signal in the runs of one row.

    Args:
        runs: of one row that asks one RM a pair.
        parts: the training is cut into so many.
    """
    collected: list[list[tuple[float, bool]]] = [[] for _ in range(parts)]
    for run in runs:
        told = [pair for pair in run["pairs"] if pair[4] is not None]
        steps = 1 + max((pair[0] for pair in told), default=0)
        scores = z_scores([pair[2] for pair in told], [pair[4] for pair in told])
        for pair, z in zip(told, scores, strict=True):
            if z is not None and pair[3] is not None:
                collected[pair[0] * parts // steps].append((z, pair[3]))
    measured = [_separation(rows) for rows in collected]
    return SignalQuality(*(tuple(part[i] for part in measured) for i in range(3)))


def _separation(rows: Sequence[tuple[float, bool]]) -> tuple[float, float, float]:
    """Correlation, AUC and gap; NaN where all verdicts are alike."""
    z = np.array([row[0] for row in rows], dtype=np.float64)
    right = np.array([row[1] for row in rows], dtype=bool)
    if not right.any() or right.all():
        return float("nan"), float("nan"), float("nan")
    good, bad = z[right], z[~right]
    auc = float(np.mean((good[:, None] > bad) + 0.5 * (good[:, None] == bad)))
    return float(np.corrcoef(z, right)[0, 1]), auc, float(good.mean() - bad.mean())


def asked_shares(runs: Sequence[Mapping[str, Any]], pool: Sequence[str], last: float = 1 / 3) -> dict[str, list[float]]:
    """Per family, the share of each RM among those asked in the last part of the training."""
    out = {}
    for family in FAMILIES:
        asked = [
            pair[2]
            for run in runs
            for pair in run["pairs"]
            if pair[1] == family and pair[0] >= (1 - last) * max(p[0] for p in run["pairs"])
        ]
        out[family] = [asked.count(model) / max(len(asked), 1) for model in pool]
    return out

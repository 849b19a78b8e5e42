"""The figures of Table 2: accuracies with intervals, paired differences, per subset and in all.

Knows judged rows (`offline.table.Judged`); fits nothing and reads no file. Called by the `evaluate` command. The keys
are those of `replay`'s JSON (`router_core.replay.figures`), whose paired differences these are, too.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from router_core.offline.calibrate import calibration_by_domain
from router_core.offline.table import Judged
from router_core.replay.figures import accuracy_of, best_per_subset, paired, regret_of, subset_rows
from router_core.replay.table import Table

Array = NDArray[np.float64]


def figures(judged: Judged) -> dict[str, Any]:
    """The JSON document, without what only the caller knows (digests, scenario).

    `calibration` holds per domain, and under "" for all pairs, how well the probabilities of the row `offline` fit
    (`calibrate.calibration_by_domain`); no calibration saw these pairs. `policies` holds per row accuracy, ci95,
    calls_per_instance, price_per_instance and regret (oracle − accuracy); `paired` the differences to the best single
    RM, to random and to majority; `asked` the share of each RM per router; `per_seed` the accuracy of each fit.
    """
    table = judged.table
    oracle = _oracle(table)
    return {
        "n": len(table),
        "policies": {
            name: {
                **accuracy_of(values, table.groups),
                "calls_per_instance": judged.calls[name],
                "price_per_instance": judged.price.get(name, judged.calls[name]),
                "regret": regret_of(values, table),
            }
            for name, values in judged.rows.items()
        },
        "oracle": oracle,
        "best_single": _best_single(table),
        "best_per_subset": best_per_subset(table),
        "subsets": {name: _subset(judged, rows) for name, rows in sorted(subset_rows(table).items())},
        "paired": paired(judged.rows, table),
        "per_seed": {name: np.nanmean(values, axis=1).tolist() for name, values in judged.rows.items()},
        "calibration": _calibration(judged),
        "asked": {name: dict(zip(table.pool, shares.tolist(), strict=True)) for name, shares in judged.asked.items()},
        "pool": list(table.pool),
        "left_out": judged.left_out,
    }


def _calibration(judged: Judged) -> dict[str, Any]:
    """Per domain over all seeds' fits; empty where no row `offline` was judged."""
    if judged.said is None or judged.chosen is None or np.isnan(judged.said).any():
        return {}
    table, (seeds, n, arms) = judged.table, judged.said.shape
    correctness = np.broadcast_to(table.correctness, judged.said.shape).reshape(seeds * n, arms)
    said, chosen = judged.said.reshape(seeds * n, arms), judged.chosen.reshape(-1)
    found = calibration_by_domain(said, correctness, chosen, list(table.domains) * seeds)
    return {name: {**part, "n": part["n"] // seeds} for name, part in found.items()}


def _subset(judged: Judged, rows: NDArray[np.int64]) -> dict[str, Any]:
    part = judged.table.rows(rows)
    return {
        "n": len(part),
        "policies": {name: accuracy_of(values[:, rows], part.groups) for name, values in judged.rows.items()},
        "oracle": _oracle(part),
        "best_single": _best_single(part),
    }


def _oracle(table: Table) -> float:
    return float(table.oracle.mean())


def _best_single(table: Table) -> dict[str, Any]:
    best = int(table.singles.argmax())
    return {"model": table.pool[best], "accuracy": float(table.singles[best])}

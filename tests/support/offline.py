"""Synthetic labelled pairs on which the offline stage can be seen to learn."""

from __future__ import annotations

import numpy as np

from router_core.records import Instance, LabelledPair

POOL = ("coder", "talker")
"""Each is right on 95 % of its own domain's pairs and no better than chance on the other's."""


def two_domains(n: int, seed: int = 0, *, n_responses: int = 2, missing: float = 0.0) -> list[LabelledPair]:
    """Code (odd positions, subset `code`) and prose (even ones, subset `prose`), judged by `POOL`.

    Args:
        n_responses: per pair; one is right, a wrong verdict names any other.
        missing: share of the pairs about which one of the RMs, either, was not asked.
    """
    rng = np.random.default_rng(seed)
    pairs = []
    for i in range(n):
        code = bool(i % 2)
        text = "x = {}; y[{}] = (x);\n" if code else "The weather of day {} was rather like day {}. "
        responses = tuple(text.format(*rng.integers(0, 99, 2)) * int(rng.integers(3, 9)) for _ in range(n_responses))
        label = int(rng.integers(n_responses))
        verdicts = {}
        for name, good in zip(POOL, (code, not code), strict=True):
            right = rng.random() < (0.95 if good else 1 / n_responses)
            verdicts[name] = label if right else (label + int(rng.integers(1, n_responses))) % n_responses
        if rng.random() < missing:
            del verdicts[POOL[int(rng.integers(2))]]
        scores = {name: tuple(float(k == verdict) for k in range(n_responses)) for name, verdict in verdicts.items()}
        subset = "code" if code else "prose"
        pairs.append(
            LabelledPair(
                f"{seed}/{i}",
                Instance(f"question {seed}/{i}", responses),
                label,
                scores,
                verdicts,
                subset,
                subset,
                f"{seed}/{i}",
            )
        )
    return pairs

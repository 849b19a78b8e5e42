"""Makers of contexts and events for the tests of the online half."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from router_core.records import Event, Feedback, Shadow, Signal


def unit_contexts(rng: np.random.Generator, n: int, d: int) -> NDArray[np.float32]:
    """(n, d) float32 rows of norm 1."""
    x = rng.standard_normal((n, d)).astype(np.float32)
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def make_events(
    rng: np.random.Generator, n: int, d: int, k: int, *, signal: Signal = Signal.PREFERENCE, offset: float = 0.0
) -> list[Event]:
    """n events with random contexts, arms, credits and feedback."""
    x = unit_contexts(rng, n, d)
    events = []
    for i in range(n):
        value = float(rng.integers(2)) if signal is Signal.PREFERENCE else float(rng.random())
        credit = float(rng.integers(2)) if signal is Signal.PREFERENCE else None
        events.append(Event(int(rng.integers(k)), x[i].tobytes(), offset, credit, Feedback(signal, value), f"d{i}"))
    return events


def with_shadows(rng: np.random.Generator, events: Sequence[Event], k: int, rate: float = 0.5) -> list[Event]:
    """The events, a fraction of them with credits of some of the arms that were not asked, in no order."""
    out = []
    for event in events:
        others = [int(arm) for arm in rng.permutation(k) if arm != event.arm and rng.random() < 0.7]
        shadows = tuple(Shadow(arm, float(rng.random()), float(rng.integers(3)) / 2) for arm in others)
        out.append(replace(event, shadows=shadows) if rng.random() < rate else event)
    return out


def context_of(event: Event) -> NDArray[np.float64]:
    """The event's x in float64."""
    return np.frombuffer(event.x, dtype="<f4").astype(np.float64)

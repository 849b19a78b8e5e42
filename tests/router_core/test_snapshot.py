"""Snapshots: exact round trip, and refusal of what belongs elsewhere."""

from __future__ import annotations

import json

import numpy as np
import pytest
from safetensors.numpy import load, save

from router_core.errors import ShapeMismatchError, SnapshotError
from router_core.posterior import FoldSettings, fold, start
from router_core.prior import Hyperparameters, Prior, linucb_prior, no_prior
from router_core.records import Signal
from router_core.snapshot import Snapshot, dump, parse
from tests.router_core.events import make_events, with_shadows

SETTINGS = FoldSettings(block_size=4, refresh_events=16)


def prior(gamma: float = 1.0, d: int = 6) -> Prior:
    return no_prior(2, d, Hyperparameters(3.0, 0.2, 1.0, gamma))


@pytest.mark.parametrize("gamma", [1.0, 0.95])
@pytest.mark.parametrize("signal", [Signal.PREFERENCE, Signal.LOSS])
def test_round_trip_and_what_follows_are_exact(gamma: float, signal: Signal) -> None:
    events = make_events(np.random.default_rng(0), 53, 6, 2, signal=signal)
    at = fold(start(prior(gamma), SETTINGS), events[:32])
    data = dump(Snapshot(at, "77-3"), "run")
    back = parse(data, "run", prior(gamma), SETTINGS)
    assert back.last_event_id == "77-3"
    assert back.posterior.digest() == at.digest()
    assert back.posterior.drift == at.drift
    assert fold(back.posterior, events[32:]).digest() == fold(start(prior(gamma), SETTINGS), events).digest()


@pytest.mark.parametrize("number", [16, 272, 320])
def test_round_trip_keeps_the_history_of_losses(number: int) -> None:
    events = make_events(np.random.default_rng(1), number + 40, 6, 2, signal=Signal.LOSS)
    at = fold(start(linucb_prior(2, 6), SETTINGS), events[:number])
    assert len(at.statistics.loss_history) == min(number, 256)
    back = parse(dump(Snapshot(at, "1-1"), "run"), "run", linucb_prior(2, 6), SETTINGS).posterior
    assert back.digest() == at.digest()
    assert fold(back, events[number:]).digest() == fold(start(linucb_prior(2, 6), SETTINGS), events).digest()


def test_round_trip_after_shadows_is_exact() -> None:
    rng = np.random.default_rng(2)
    events = with_shadows(rng, make_events(rng, 50, 6, 2), 2)
    at = fold(start(prior(), SETTINGS), events[:32])
    back = parse(dump(Snapshot(at, "1-1"), "run"), "run", prior(), SETTINGS).posterior
    assert back.digest() == at.digest()
    assert fold(back, events[32:]).digest() == fold(start(prior(), SETTINGS), events).digest()


def as_format(data: bytes, name: str, drop: str | None = None) -> bytes:
    """The same snapshot under another format's name, without one of its tensors."""
    tensors = {key: value for key, value in load(data).items() if key != drop}
    length = int.from_bytes(data[:8], "little")
    header = json.loads(json.loads(data[8 : 8 + length])["__metadata__"]["reward_router"])
    return save(tensors, metadata={"reward_router": json.dumps({**header, "format": name})})


@pytest.mark.parametrize("version", [1, 9])
def test_a_snapshot_of_another_format_is_refused_by_name(version: int) -> None:
    with pytest.raises(SnapshotError, match=rf"snapshot/{version}.*new run name"):
        parse(as_format(snapshot_bytes(), f"reward-router-snapshot/{version}"), "run", prior(), SETTINGS)


def test_only_refresh_positions_can_be_kept() -> None:
    events = make_events(np.random.default_rng(0), 17, 6, 2)
    with pytest.raises(SnapshotError, match="multiples of 16"):
        dump(Snapshot(fold(start(prior(), SETTINGS), events), "1-1"), "run")


def snapshot_bytes() -> bytes:
    return dump(Snapshot(fold(start(prior(), SETTINGS), make_events(np.random.default_rng(0), 16, 6, 2)), "1-1"), "run")


def test_another_runs_snapshot_is_refused() -> None:
    with pytest.raises(SnapshotError, match="another pool"):
        parse(snapshot_bytes(), "other", prior(), SETTINGS)


@pytest.mark.parametrize("data", [b"", b"\x80\x04K\x01.", b"{}" * 40])
def test_bytes_that_are_no_snapshot_are_refused(data: bytes) -> None:
    with pytest.raises(SnapshotError, match="cannot be read"):
        parse(data, "run", prior(), SETTINGS)


def test_truncated_bytes_are_refused() -> None:
    with pytest.raises(SnapshotError, match="cannot be read"):
        parse(snapshot_bytes()[:-9], "run", prior(), SETTINGS)


def test_another_dimension_or_other_cuts_are_refused() -> None:
    with pytest.raises(ShapeMismatchError, match="7 weights"):
        parse(snapshot_bytes(), "run", prior(d=7), SETTINGS)
    with pytest.raises(ShapeMismatchError, match="other fold settings"):
        parse(snapshot_bytes(), "run", prior(), FoldSettings(4, 32))

"""A posterior at a refresh position as safetensors bytes with a JSON header, and back, bit for bit. Never pickle.

A snapshot is a cache of the log's first `count` events; it holds Λ, b and the statistics (Σ is derived). It names the
run's fingerprint, so that a snapshot of another pool, prior or checkpoint is refused.
Called by `service.usecases.learn`.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load, save

from router_core.audits.referee import Standing
from router_core.changes import Watch
from router_core.errors import SnapshotError
from router_core.feedback import SignalStatistics
from router_core.novelty import Tally
from router_core.pools import PoolState
from router_core.posterior import FoldSettings, Posterior, restore
from router_core.prior import Prior

FORMAT = "reward-router-snapshot/6"
"""A run of another version has another fingerprint, too."""


@dataclass(frozen=True, slots=True)
class Snapshot:
    """A posterior and the id of the last event in it."""

    posterior: Posterior
    last_event_id: str


def dump(snapshot: Snapshot, fingerprint: str) -> bytes:
    """Serialise.

    Raises:
        SnapshotError: the posterior is not at a refresh position (`Posterior.at_refresh`).
    """
    posterior = snapshot.posterior
    if not posterior.at_refresh:
        raise SnapshotError(
            f"posterior at event {posterior.count}: snapshots are taken at multiples of "
            f"{posterior.settings.refresh_events}"
        )
    stats, tally = posterior.statistics, posterior.tally
    tensors = {
        "precision": np.stack([arm.precision for arm in posterior.arms]),
        "information": np.stack([arm.information for arm in posterior.arms]),
        "count": stats.count,
        "reward_sum": stats.reward_sum,
        "reward_count": stats.reward_count,
        "loss_mean": stats.loss_mean,
        "loss_square": stats.loss_square,
        "loss_history": stats.loss_history,
        "pooled": stats.pooled,
        "precisions": posterior.precisions,
        "watches": np.array(posterior.watches),
    }
    header = {
        "format": FORMAT,
        "fingerprint": fingerprint,
        "last_event_id": snapshot.last_event_id,
        "position": posterior.count,
        "drift": posterior.drift.hex(),
        # Only where it is kept, so that snapshots of other runs are what they always were.
        **({"tally": [tally.met.hex(), tally.novel.hex()]} if posterior.prior.watches_novelty else {}),
        **({"pool": _pool_header(posterior.pool)} if posterior.pool.specification else {}),
        "spoken": [posterior.spoken.met.hex(), posterior.spoken.novel.hex()],
        "referees": {
            name: [number.hex() for number in posterior.referees[name]] for name in sorted(posterior.referees)
        },
    }
    return save(
        {name: np.ascontiguousarray(t) for name, t in tensors.items()}, metadata={"reward_router": json.dumps(header)}
    )


def _pool_header(pool: PoolState) -> dict[str, Any]:
    return {
        "retired": list(pool.retired),
        "probation": [events.hex() for events in pool.probation],
        "specification": base64.b64encode(pool.specification).decode(),
    }


def _pool_of(header: Mapping[str, Any] | None) -> PoolState:
    if header is None:
        return PoolState()
    return PoolState(
        tuple(header["retired"]),
        tuple(map(float.fromhex, header["probation"])),
        base64.b64decode(header["specification"]),
    )


def parse(
    data: bytes,
    fingerprint: str,
    prior: Prior,
    settings: FoldSettings,
    prior_of: Callable[[bytes], Prior] | None = None,
) -> Snapshot:
    """Read what `dump` wrote, for the same run.

    Args:
        data: the bytes.
        fingerprint: the run's.
        prior: the one that the run started from.
        settings: where the log is cut.
        prior_of: the prior of a changed pool, by its specification; None where no pool changes.

    Raises:
        SnapshotError: not a snapshot, of another format, or of another run.
        ShapeMismatchError: its arrays do not fit the prior.
    """
    try:
        tensors = load(data)
        length = int.from_bytes(data[:8], "little")
        header = json.loads(json.loads(data[8 : 8 + length])["__metadata__"]["reward_router"])
    except (SafetensorError, ValueError, KeyError) as error:
        raise SnapshotError(
            f"snapshot of {len(data)} bytes cannot be read ({error}): delete it and the whole log is replayed"
        ) from error
    if header.get("format") != FORMAT:
        raise SnapshotError(
            f"snapshot format is {header.get('format')!r}, this version reads {FORMAT!r}: start the "
            "version that wrote it, or use a new run name"
        )
    if header["fingerprint"] != fingerprint:
        raise SnapshotError("snapshot is of another pool, prior or checkpoint: use a new run name, or delete the run")
    statistics = SignalStatistics(
        tensors["count"],
        tensors["reward_sum"],
        tensors["reward_count"],
        tensors["loss_mean"],
        tensors["loss_square"],
        tensors["loss_history"],
        tensors["pooled"],
    )
    pool = _pool_of(header.get("pool"))
    if pool.specification and prior_of is not None:
        prior = prior_of(pool.specification)
    posterior = restore(
        prior,
        settings,
        count=header["position"],
        precision=[matrix.copy() for matrix in tensors["precision"]],
        information=tensors["information"],
        statistics=statistics,
        precisions=tensors["precisions"],
        drift=float.fromhex(header["drift"]),
        tally=Tally(*map(float.fromhex, header.get("tally", ()))),
        watches=[Watch(*row) for row in tensors["watches"].tolist()],
        spoken=Tally(*map(float.fromhex, header["spoken"])),
        referees={name: Standing(*map(float.fromhex, row)) for name, row in header["referees"].items()},
        pool=pool,
    )
    return Snapshot(posterior, header["last_event_id"])

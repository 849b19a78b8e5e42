"""What the workers of a reward model are asked by the health monitor: a tiny conversation, and first the whole probe.

An RM that was never used and has a fallback rendering takes it where its workers pass with that one only.
`service.scorers.health` does the rest. Knows arms and replicas; nothing of runs or posteriors.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

import numpy as np

from service.scorers.health import LOAD_VALID_INTERVALS, HealthPolicy, ReplicaMonitor
from service.scorers.rm.client import VllmArm
from service.scorers.rm.probe import ReplicaProbe, probe_replica, readiness
from service.scorers.transport.replica import Replica

__all__ = ["LOAD_VALID_INTERVALS", "HealthMonitor", "HealthPolicy", "RewardModelChecks"]

_log = logging.getLogger(__name__)


class HealthMonitor(ReplicaMonitor):
    """Checks every replica of the arms until stopped; see `ReplicaMonitor`.

    Args:
        arms: the reward models.
        policy: how often.
        rng: for the jitter.
    """

    def __init__(self, arms: Sequence[VllmArm], policy: HealthPolicy, rng: np.random.Generator) -> None:
        super().__init__([RewardModelChecks(arm) for arm in arms], policy, rng)


class RewardModelChecks:
    """Implements `service.scorers.health.Checks`."""

    def __init__(self, arm: VllmArm) -> None:
        self._arm = arm
        self.name = arm.name
        self.replicas = arm.replicas

    async def ready(self, replica: Replica, deadline: float) -> None:
        await readiness(self._arm, replica, deadline=deadline)

    async def probe(self, replica: Replica, deadline: float) -> None:
        arm, report = self._arm, await self._probed(replica, deadline)
        if report.unavailable is None:
            replica.max_model_len = report.max_model_len
        if report.problems:
            replica.reject("; ".join(report.problems))
        elif report.unavailable is None:
            replica.admit()
            for warning in report.warnings:
                _log.warning(
                    "worker probe", extra={"fields": {"model": arm.name, "url": replica.url, "reason": warning}}
                )
        else:
            # A replica that is in use and answers, only too slowly for a whole probe, stays in use.
            ready = report.raw is not None and not replica.breaker.held
            replica.report_check(None if ready else report.unavailable)

    async def _probed(self, replica: Replica, deadline: float) -> ReplicaProbe:
        """The report, by the fallback rendering where the replica fails with the arm's own and passes with that."""
        arm = self._arm
        rendering, fallback = arm.rendering, arm.config.fallback
        report = await probe_replica(arm, replica, deadline=deadline, rendering=rendering)
        if not report.problems or fallback is None or rendering is fallback:
            return report
        if arm.rendering is rendering and not arm.may_fall_back:
            return report
        other = await probe_replica(arm, replica, deadline=deadline, rendering=fallback)
        if arm.rendering is fallback:
            # An equal of this one has found the same in the meantime, and said so.
            return other
        if not other.ok or not arm.fall_back():
            return report
        fields = {"model": arm.name, "url": replica.url, "rendering": arm.rendering.name}
        _log.warning(
            "reward model reads another text than is rendered here",
            extra={"fields": fields | {"reason": "; ".join(report.problems)}},
        )
        return other

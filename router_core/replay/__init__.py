"""Replay of recorded pairs through the policies: streams, scenarios, passes, figures, curves (docs/replay.md).

| module | what |
|---|---|
| `table` | pairs as arrays |
| `shift` | which pairs are learned from and which are streamed |
| `stream` | order, drift, delays, missing feedback: a scenario, and its plan under a seed |
| `loss` | the simulated DPO loss |
| `audits` | a simulated referee, for streams without feedback |
| `passes`, `combining`, `run` | one policy once through a stream, with further calls; all policies and seeds |
| `trace`, `figures`, `curves`, `plot` | what was done, its figures, its curves, their picture |

No files (but the picture), no networks, no torch. Called by `service.cli.replay`, the offline stage and `loadtests`.
"""

from __future__ import annotations

from router_core.combine import Combination
from router_core.replay.audits import Audits
from router_core.replay.curves import Curve, curve
from router_core.replay.figures import PolicySummary, best_per_subset, report, summarise
from router_core.replay.loss import SimulatedLoss
from router_core.replay.run import Selected, replay, select
from router_core.replay.shift import Shift, domain_split, matching, share_split, with_share, without_groups
from router_core.replay.stream import Delay, Plan, Scenario, make_plan
from router_core.replay.table import Table, complete_pairs, score_scale, tabulate
from router_core.replay.trace import ALL_ARMS, Pass, Trace, merge

__all__ = [
    "ALL_ARMS",
    "Audits",
    "Combination",
    "Curve",
    "Delay",
    "Pass",
    "Plan",
    "PolicySummary",
    "Scenario",
    "Selected",
    "Shift",
    "SimulatedLoss",
    "Table",
    "Trace",
    "best_per_subset",
    "complete_pairs",
    "curve",
    "domain_split",
    "make_plan",
    "matching",
    "merge",
    "replay",
    "report",
    "score_scale",
    "select",
    "share_split",
    "summarise",
    "tabulate",
    "with_share",
    "without_groups",
]

"""The rows of the table, by the policy that one asks the service for. Called by `campaign` and `report`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

SFT = "sft"
"""No training at all: the starting policy."""

CHECKER = "checker"
"""The true checker as judge."""

OURS = "bayesian"
"""The row that the others are compared with."""


@dataclass(frozen=True, slots=True)
class Row:
    """One row.

    Attributes:
        title: as in the paper, or plain words for what is not in it.
        policy: of the service; `sft` and `checker` ask no reward model.
        extra: not in the paper's table.
        audited: True: learns from audits, and the trainer sends nothing; False: from the losses, if at all.
    """

    title: str
    policy: str
    extra: bool = False
    audited: bool = False

    @property
    def key(self) -> str:
        """Fit for names of files and runs."""
        return self.policy.replace(":", "-")


def table_rows(pool: Sequence[str]) -> tuple[Row, ...]:
    """All rows in the order of the table.

    Args:
        pool: names of the reward models.
    """
    return (
        Row("SFT", SFT),
        *(Row(f"RM{k}", f"single:{name}") for k, name in enumerate(pool)),
        Row("Majority", "majority"),
        Row("Random", "random"),
        Row("UWO", "uwo"),
        Row("LASER", "laser"),
        Row("w/o offline", "bayesian:none"),
        Row("w/o online", "offline"),
        Row("BayesianRouter", OURS),
        Row("… with the paper's prior", "bayesian:paper", extra=True),
        Row("true checker (upper bound)", CHECKER, extra=True),
    )


def unseen_rows() -> tuple[Row, ...]:
    """All rows of the second table, in its order. Chosen before it was first run."""
    return (
        Row("SFT", SFT),
        Row("Random", "random"),
        Row("UWO", "uwo"),
        Row("LASER", "laser"),
        Row("w/o offline, audits", "bayesian:none", audited=True),
        Row("w/o online", "offline"),
        Row("BayesianRouter, audits", OURS, audited=True),
        Row("… with the paper's prior, audits", "bayesian:paper", extra=True, audited=True),
        Row("stacked, audits", "stacked", extra=True, audited=True),
        Row("cascade:1.5, audits", "cascade:1.5", extra=True, audited=True),
        Row("true checker (upper bound)", CHECKER, extra=True),
    )

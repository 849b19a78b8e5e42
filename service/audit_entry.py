"""The field `audit` of the pool file: who looks at a share of the decisions after the reply, and at how many.

    audit:
      referee: [sums, judge]                 # scorers of `referees` or `models`, or `stacked`; the first that does not
                                             # abstain is heard
      rate: 0.05                             # share of the decisions
      schedule: front                        # front (default): most of them early; even
      horizon: 2000                          # decisions over which `front` spends most; the run's length, if known
      ask: all                               # all (default): every other RM is asked too; drawn: nobody else
      budget: 500                            # price that the audits of an hour may have; by default no limit
      trust: 0.9                             # how often the referee is expected to be right, before gold says more
      keep: 500                              # newest audits whose texts are kept for people

The setting `REWARD_ROUTER_AUDIT` has the same fields as JSON; each stands in the place of the file's. Called by
`service.pool`, and by `service.gateway` for the setting; knows no scorer.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from router_core.audits.schedule import HORIZON, Schedule
from service.errors import ConfigurationError

STACKED = "stacked"
"""Name of the referee that is the learned vote of all RMs."""


def _several(value: object) -> object:
    return (value,) if isinstance(value, str) else value


class AuditEntry(BaseModel):
    """How decisions are audited."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    referee: Annotated[tuple[str, ...], BeforeValidator(_several)] = Field(min_length=1)
    rate: float = Field(default=0.05, ge=0, le=1, allow_inf_nan=False)
    schedule: Literal["front", "even"] = "front"
    horizon: int = Field(default=HORIZON, ge=1)
    ask: Literal["all", "drawn"] = "all"
    budget: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    trust: float = Field(default=0.9, ge=0.5, le=1, allow_inf_nan=False)
    keep: int = Field(default=500, ge=0, le=100_000)

    @property
    def plan(self) -> Schedule:
        """How probable it is that a decision is audited."""
        return Schedule(self.rate, self.schedule, self.horizon)

    def check(self, models: Collection[str], referees: Collection[str]) -> None:
        """Return if every referee can be asked.

        Args:
            models: names of the pool's scorers.
            referees: names of the other scorers.

        Raises:
            ValueError: a name is unknown, is there twice, or is the vote's where all RMs are not asked.
        """
        if len(set(self.referee)) < len(self.referee):
            raise ValueError(f"audit: referee is {list(self.referee)}: name each once")
        for name in self.referee:
            if name == STACKED and self.ask != "all":
                raise ValueError(
                    "audit: referee is 'stacked', the vote of all RMs, and ask is 'drawn': set ask to 'all'"
                )
            if name != STACKED and name not in models and name not in referees:
                known = ", ".join([*referees, *models, STACKED])
                raise ValueError(f"audit: referee {name!r} is unknown: add it to `referees`, or name one of {known}")


def with_fields(audit: AuditEntry | None, fields: Mapping[str, Any]) -> AuditEntry:
    """Return the entry with these fields in the place of its own.

    Args:
        audit: of the pool file; None where it has none.
        fields: by name.

    Raises:
        ConfigurationError: a field does not fit; the message names it.
    """
    standing = {} if audit is None else audit.model_dump()
    try:
        return AuditEntry.model_validate({**standing, **fields})
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(["audit", *map(str, first["loc"])])
        raise ConfigurationError(f"setting {where}: {first['msg']} (fields: docs/audits.md)") from error

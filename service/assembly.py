"""From a specification to what a run works with: prior, scorers, plans, audits. One per gateway.

The gateway's own pool file gives the specification that new runs begin with; the log of a run gives later ones
(docs/pools-live.md). Built by `service.gateway`; the use cases know it as `runs.Templates`.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from router_core.checkpoint import Checkpoint
from router_core.encoder.fuse import PairEncoder
from router_core.errors import RouterCoreError
from router_core.policies import ScoreScale
from router_core.posterior import FoldSettings
from router_core.prior import Prior
from router_core.records import Signal
from service.audit_entry import STACKED, AuditEntry
from service.encoders.protocol import AwaitedEncoder
from service.errors import ConfigurationError
from service.pool import PoolFile
from service.priors import build_prior, check_known, form_of
from service.scorers.absent import AbsentScorer
from service.scorers.protocol import Scorer
from service.scorers.roster import Roster
from service.settings import Settings
from service.specification import Arm, Change, Routing, Specification, Start, changed, digest_of, founded
from service.usecases.audit import AuditPlan, Audits, Referee
from service.usecases.pools import routing_of
from service.usecases.runs import RunTemplate, Terms

logger = logging.getLogger(__name__)

CHECKPOINT, KINDS, NOTHING = "checkpoint", "kinds", "nothing"
"""What an arm starts from: what the checkpoint has under its name; what an average arm of the checkpoint is worth on
this kind of text; an even chance."""


def routing_given(settings: Settings, pool: PoolFile) -> dict[str, Any]:
    """Return the fields of `Routing` that the settings or the pool file say something of; settings come first."""
    given = routing_of(pool)
    if "policy" in settings.model_fields_set:
        given["policy"] = settings.policy
    said = {"v": settings.v, "gamma": settings.gamma, "max_calls": settings.max_calls_per_instance}
    return {**given, **{name: value for name, value in said.items() if value is not None}}


class Assembly:
    """Makes run templates.

    Args:
        settings: the operator's choices.
        pool: the gateway's own pool file.
        checkpoint: the whole one, whatever arms it knows; None for none.
        encoder: of all runs.
        roster: connections.
        score_scale: of the pool's raw rewards, instead of the checkpoint's; for tests.

    Raises:
        ConfigurationError: the checkpoint knows no scorer of the pool.
    """

    def __init__(
        self,
        settings: Settings,
        pool: PoolFile,
        checkpoint: Checkpoint | None,
        encoder: PairEncoder | AwaitedEncoder,
        roster: Roster,
        *,
        score_scale: ScoreScale | None = None,
    ) -> None:
        self.pool = pool
        self.roster = roster
        self._settings = settings
        self._checkpoint = checkpoint
        self._encoder = encoder
        self._score_scale = score_scale
        self._templates: dict[str, RunTemplate] = {}
        strange = [] if checkpoint is None else check_known(checkpoint, [model.name for model in pool.models])
        if strange:
            logger.warning(
                "the checkpoint knows nothing of some scorers: they start as average ones",
                extra={"fields": {"scorers": strange}},
            )
        routing = Routing(**{"policy": settings.policy, **routing_given(settings, pool)})
        self.own = founded(pool, routing, self._start_of)

    def _start_of(self, name: str, replaced: bool = False) -> Start:
        """Return what an arm of that name starts from."""
        if self._checkpoint is None:
            return Start(NOTHING)
        if name in self._checkpoint.pool and not replaced:
            return Start(CHECKPOINT, self._checkpoint.column(name).astype("<f4").tobytes())
        return Start(KINDS, self._checkpoint.column(None).astype("<f4").tobytes())

    def changed(
        self, standing: Specification, pool: PoolFile, given: dict[str, Any], now_ms: int, *, servers: bool = True
    ) -> tuple[Specification, list[Change]]:
        """Return a run's specification after a pool file was applied, and what differs; see `specification.changed`."""
        return changed(standing, pool, given, self._start_of, now_ms, servers=servers)

    def propose(self, standing: Specification) -> Sequence[Change]:
        """Return the differences of the gateway's own pool from a run's."""
        return self.changed(standing, self.pool, self.own_routing(), 0, servers=False)[1]

    def own_routing(self) -> dict[str, Any]:
        """Return what the gateway's settings and pool file say of `Routing`."""
        return routing_given(self._settings, self.pool)

    def check(self, specification: Specification, standing: RunTemplate) -> None:
        """Return if this gateway could ask by a specification.

        Raises:
            ConfigurationError: a scorer cannot be built, or a policy does not fit.
        """
        template = self._build(specification)
        if template.form is not standing.form and template.default_policy.prior is not None:
            raise ConfigurationError(
                f"policy {template.default_policy.name!r} insists on the prior {template.form.value!r}, and the run "
                f"has {standing.form.value!r}: choose another policy"
            )
        for scorer in scorers_of(template):
            if isinstance(scorer, AbsentScorer):
                raise ConfigurationError(scorer.problem)

    async def begin(self, template: RunTemplate) -> None:
        """Probe and watch the scorers of a template that are new here."""
        await self.roster.begin(scorers_of(template))

    def prior(self, specification: Specification, terms: Terms) -> Prior:
        """Return the prior of a pool.

        Raises:
            ConfigurationError: the checkpoint does not know an arm that the run began with.
        """
        routing = specification.routing
        settings = self._settings.model_copy(update={"v": routing.v, "gamma": routing.gamma})
        checkpoint = self._checkpoint_of(specification)
        return build_prior(settings, checkpoint, len(specification.arms), self._encoder.d, *terms)

    def template(self, specification: Specification) -> RunTemplate:
        """Return the template of a pool, the same one for equal specifications.

        Raises:
            ConfigurationError: it does not fit the gateway's checkpoint, or its policy does not fit the pool.
        """
        key = digest_of(specification)
        found = self._templates.get(key)
        # Connections of a pool that no run has asked by for a while are closed.
        if found is None or not self.roster.holds(scorers_of(found)):
            found = self._templates[key] = self._build(specification)
        return found

    def keep(self, used: Iterable[RunTemplate]) -> None:
        """Drop the templates that nobody works with any more; a pool that comes back is built again."""
        kept = {id(template) for template in used}
        self._templates = {key: found for key, found in self._templates.items() if id(found) in kept}

    def _build(self, specification: Specification) -> RunTemplate:
        settings, routing = self._settings, specification.routing
        checkpoint = self._checkpoint_of(specification)
        arms = [self.roster.scorer(arm.entry, specification.pool, arm.changed_ms) for arm in specification.arms]
        began = self._began(specification)
        origin = f"untrained:{self._encoder.spec}:{self._encoder.d}" if began is None else began.digest
        unchanged = not specification.version and (began is None or self._knows_all(specification))
        scale = self._scale_of(specification)
        first = self._score_scale or (None if began is None else began.scores)
        combination = None if checkpoint is None else checkpoint.combination
        rows: list[int | None] | None = None
        if not unchanged and self._checkpoint is not None:
            combination = self._checkpoint.combination
            known = self._checkpoint.pool
            rows = [
                None if arm.retired or not _is_of(arm, known) else known.index(arm.name) for arm in specification.arms
            ]
            if not any(row is not None for row in rows):
                combination = None
        return RunTemplate(
            arms=arms,
            encoder=self._encoder,
            priors=lambda terms: self.prior(specification, terms),
            form=form_of(settings, checkpoint),
            fold_settings=FoldSettings(settings.block_size, settings.refresh_events),
            signal=settings.signal,
            policy=routing.policy,
            origin=origin,
            score_scale=scale,
            first_scale=first,
            combination=combination,
            rows=rows,
            prices=[float(arm.entry.get("price", 1.0)) for arm in specification.arms],
            max_calls=routing.max_calls,
            parallel_calls=settings.parallel_calls,
            max_rounds=settings.max_rounds_per_instance,
            blas_threads=settings.blas_threads,
            seed=settings.seed,
            specification=specification,
            audits=self._audits(specification, arms),
        )

    def _knows_all(self, specification: Specification) -> bool:
        assert self._checkpoint is not None
        return all(_is_of(arm, self._checkpoint.pool) for arm in specification.arms)

    def _scale_of(self, specification: Specification) -> ScoreScale | None:
        """The scale of every arm's raw rewards; None where one is not known, so that the score log must tell."""
        if not specification.version and self._score_scale is not None:
            return self._score_scale
        if self._checkpoint is None or self._checkpoint.scores is None or not self._knows_all(specification):
            return None
        return self._checkpoint.scores.rows([self._checkpoint.pool.index(arm.name) for arm in specification.arms])

    def _began(self, specification: Specification) -> Checkpoint | None:
        """The checkpoint of the arms that the run began with."""
        return self._checkpoint_of(specification, [arm for arm in specification.arms if not arm.since])

    def _checkpoint_of(self, specification: Specification, arms: Sequence[Arm] | None = None) -> Checkpoint | None:
        """The checkpoint of a pool's arms, in arm order: what it knows, and the columns that came with changes."""
        if self._checkpoint is None:
            return None
        arms = specification.arms if arms is None else arms
        # Not the checkpoint's own name: a retired arm and the one that took its name are two.
        names = [f"{k}:{arm.name}" if arm.column else arm.name for k, arm in enumerate(arms)]
        columns = {
            name: np.frombuffer(arm.column, "<f4") for name, arm in zip(names, arms, strict=True) if name != arm.name
        }
        try:
            known = [name for name in names if name not in columns]
            if not columns:
                return checkpoint_of(self._checkpoint, known)
            base = self._checkpoint.select_pool(known) if known else self._checkpoint
            return base.extended(columns).select_pool(names)
        except RouterCoreError as error:
            raise ConfigurationError(str(error)) from error

    def _audits(self, specification: Specification, arms: Sequence[Scorer]) -> Audits | None:
        """How decisions are audited.

        Raises:
            ConfigurationError: the runs' signal says nothing of a referee's verdicts.
        """
        fields = specification.pool.get("audit")
        if fields is None:
            return None
        if self._settings.signal is Signal.LOSS:
            raise ConfigurationError(
                "decisions are audited (`audit`) and signal is 'loss': a loss compares RMs with each other, a referee "
                "says how often each is right, and one posterior cannot hold both; set the signal to 'preference' and "
                "send no losses, or leave `audit` out"
            )
        audit = AuditEntry.model_validate(fields)
        apart = {
            str(entry["name"]): self.roster.scorer(entry, specification.pool, specification.time_ms)
            for entry in specification.referees
        }
        places = {arm.name: k for k, arm in enumerate(specification.arms) if not arm.retired}
        priced = [*[arm.entry for arm in specification.asked], *specification.referees]
        prices = {str(entry["name"]): float(entry.get("price", 1.0)) for entry in priced}
        cheapest = min(prices[arm.name] for arm in specification.asked)
        referees = tuple(
            Referee(name, None, None, 0.0)
            if name == STACKED and name not in prices
            else Referee(
                name,
                apart.get(name) or arms[places[name]],
                places.get(name),
                prices[name] / cheapest,
            )
            for name in audit.referee
        )
        plan = AuditPlan(referees, audit.ask == "all", audit.budget, audit.trust, audit.keep)
        return Audits(plan, audit.plan, tuple(apart.values()))


def checkpoint_of(checkpoint: Checkpoint, names: Sequence[str]) -> Checkpoint:
    """Return the checkpoint of these arms.

    Raises:
        ConfigurationError: it does not know one.
    """
    try:
        return checkpoint.select_pool(names)
    except RouterCoreError as error:
        raise ConfigurationError(str(error)) from error


def _is_of(arm: Arm, pool: Sequence[str]) -> bool:
    """Return True if an arm is the one that a checkpoint has under its name."""
    return arm.source == CHECKPOINT and arm.name in pool


def scorers_of(template: RunTemplate) -> Iterable[Scorer]:
    """Return everybody whom a run of that template asks."""
    yield from [template.arms[k] for k in template.asked]
    if template.audits is not None:
        yield from template.audits.apart

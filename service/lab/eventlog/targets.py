"""Target policies at the contexts of an exported log: what each would have asked there.

Knows the log, its run's checkpoint and policies. Called by the command `ope`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from router_core.attempts import ASKED
from router_core.checkpoint import Checkpoint
from router_core.combine import STACKED, Combination, budget_of, relative_prices, surcharges
from router_core.errors import UnknownPolicyError
from router_core.ope import (
    LoggedData,
    SequenceLog,
    Sequencer,
    available_propensities,
    fixed_policy,
    softmax_policy,
)
from router_core.policies import BayesianPolicy, CombinedPolicy, OfflinePolicy, make_policy
from router_core.posterior import FoldSettings, Posterior, fold, start
from router_core.prior import Prior, PriorForm, no_prior
from router_core.records import Signal
from service.errors import ConfigurationError
from service.lab.eventlog.load import EventLog, fold_events, sequence_log
from service.lab.eventlog.record import Header
from service.priors import build_prior, check_known
from service.settings import Settings
from service.usecases.decisions import StoredDecision

Array = NDArray[np.float64]

SOFTMAX = "softmax:"
"""`softmax:0.1` asks in proportion to exp(what the offline stage expects / 0.1)."""

_OFFLINE_FORMS = (PriorForm.PAPER, PriorForm.CALIBRATED)


class Targets:
    """Probabilities of target policies at the logged contexts; what several need is made once."""

    def __init__(self, log: EventLog, checkpoint: Checkpoint | None, learn_share: float) -> None:
        self._log = log
        self._checkpoint = checkpoint
        self._learned_events = int(len(log.events) * learn_share)

    def probabilities(self, name: str, whole: LoggedData) -> tuple[int, Array]:
        """First row of the data that the policy may be evaluated on, and (N − first, K) from there."""
        if name.startswith(SOFTMAX):
            means = self._offline_means(name, whole)
            return 0, softmax_policy(means, temperature_of(name), whole.available)
        policy = make_policy(name, self._log.header.pool)
        first = 0
        if isinstance(policy, BayesianPolicy):
            first = int(self._log.usable[: self._learned_events].sum())
            posterior = fold(self._start(name, policy.prior), fold_events(self._log, slice(self._learned_events)))
        elif isinstance(policy, OfflinePolicy):
            posterior = self._offline(name, policy.prior)
        else:
            # The others look at neither context nor posterior, or are refused.
            posterior = start(no_prior(len(whole.pool), whole.x.shape[1]))
        part = slice(first, None)
        return first, fixed_policy(policy, whole.x[part], whole.available[part], posterior)

    def sequences(self, name: str) -> tuple[SequenceLog, Sequencer]:
        """The log as sequences of arms, and what `stacked` or `cascade:B` would ask there.

        A cascade is judged as it is at the start of a run: its posterior is the offline stage's, its multiplier the one
        that training pairs set for the budget, at the prices in the log.

        Raises:
            ConfigurationError: no checkpoint, one without learned votes, or feedback that says nothing of verdicts.
        """
        if self._log.header.signal is not Signal.PREFERENCE:
            raise ConfigurationError(
                f"policy {name!r} with signal {self._log.header.signal.value!r}: only a preference says whether a "
                "verdict is right that nobody gave; evaluate policies of one call, or log preferences"
            )
        posterior = self._offline(name, PriorForm.CALIBRATED)
        assert self._checkpoint is not None
        if self._checkpoint.combination is None:
            raise ConfigurationError(f"policy {name!r}: the checkpoint holds no learned votes; train with more pairs")
        combination = self._checkpoint.combination.priced(logged_prices(self._log))
        log, kept = sequence_log(self._log)
        if not len(log):
            raise ConfigurationError(f"policy {name!r}: no decision of the log tells what a sequence of calls earns")
        decisions = [self._log.events[index].decision for index in kept]
        log = replace(log, logger=_logger(decisions, log, combination))
        x = np.frombuffer(b"".join([decision.x for decision in decisions]), "<f4").reshape(len(log), -1)
        offsets = posterior.prior.offsets(x)
        if name == STACKED:
            return log, Sequencer(combination, offsets, np.zeros_like(offsets), np.zeros(len(log)), everyone=True)
        multiplier = combination.multiplier(budget_of(name))
        policy = CombinedPolicy(name, combination).at(multiplier)
        first = fixed_policy(policy, x, log.there, posterior)
        return log, Sequencer(combination, offsets, first, np.full(len(log), multiplier))

    def _start(self, name: str, form: PriorForm | None) -> Posterior:
        """The posterior at the beginning of a run with that prior form, or with the run's own."""
        settings = FoldSettings(*self._log.header.fingerprint["fold"])
        return start(self._prior(name, form or self._log.header.form), settings)

    def _offline(self, name: str, form: PriorForm | None) -> Posterior:
        """What the offline stage knew. A run that started from nothing may still have had a checkpoint's encoder."""
        if self._checkpoint is None:
            raise ConfigurationError(
                f"policy {name!r} needs what the offline stage knew: give --checkpoint, the one that run "
                f"{self._log.header.run!r} was served with"
            )
        own = self._log.header.form
        return start(self._prior(name, form or (own if own in _OFFLINE_FORMS else self._checkpoint.prior_form)))

    def _offline_means(self, name: str, whole: LoggedData) -> Array:
        posterior = self._offline(name, None)
        return OfflinePolicy().beliefs(whole.x, posterior.prior.offsets(whole.x), posterior).means

    def _prior(self, name: str, form: PriorForm) -> Prior:
        header = self._log.header
        given: dict[str, object] = {"signal": header.signal}
        if form is header.form and form is not PriorForm.LINUCB:
            given |= dict(zip(("lambda0", "sigma2", "gamma", "adapt"), header.fingerprint["hyper"], strict=False))
            given |= {name: header.fingerprint.get(name, 0.0) for name in ("lambda_novel", "alarm_rate")}
        if form in _OFFLINE_FORMS and self._checkpoint is None:
            raise ConfigurationError(
                f"policy {name!r} starts from the prior {form.value!r}, which a checkpoint holds: give --checkpoint"
            )
        return build_prior(Settings.model_validate(given), self._checkpoint, len(header.pool), header.d, form)


def logged_prices(log: EventLog) -> Array:
    """(K,) prices in units of the cheapest, as the attempts say; 1 for an arm that was never asked."""
    prices = dict.fromkeys(range(len(log.header.pool)), 1.0)
    for event in log.events:
        for attempt in (*event.decision.attempts, *(event.decision.shadows or ())):
            if attempt.price > 0.0:
                prices[attempt.arm] = attempt.price
    return relative_prices(list(prices.values()))


def _logger(decisions: Sequence[StoredDecision], log: SequenceLog, combination: Combination) -> Sequencer | None:
    """The logging policies as they believed at each decision; None where two arms were asked at once."""
    if any(_at_once(decision) for decision in decisions):
        return None
    K = combination.votes.n_arms
    means, sds, propensities = (
        np.array([getattr(decision, field) for decision in decisions], dtype=np.float64).reshape(len(log), K)
        for field in ("means", "sds", "propensities")
    )
    floors = np.array([decision.floors or [0.0] * K for decision in decisions]).reshape(len(log), K)
    multipliers = np.array([decision.multiplier or np.inf for decision in decisions])
    paid = np.where(np.isfinite(multipliers), multipliers, 0.0)[:, None]
    return Sequencer(
        combination,
        means + paid * surcharges(combination.costs, 1.0),
        available_propensities(propensities, means, sds, floors, log.there),
        multipliers,
        max_calls=max(len(decision.attempts) for decision in decisions),
    )


def _at_once(decision: StoredDecision) -> bool:
    turns = [attempt.turn for attempt in decision.attempts if attempt.outcome in ASKED]
    return bool(decision.multiplier) and len(set(turns)) < len(turns)


def load_checkpoint(directory: Path | None, header: Header) -> Checkpoint | None:
    """The run's checkpoint with the arms of its pool; one that it does not know is an average one, as in a gateway.

    Raises:
        ConfigurationError: it is not the one that made the log's contexts.
    """
    if directory is None:
        return None
    loaded = Checkpoint.load(directory)
    unknown = check_known(loaded, header.pool)
    # Names and numbers as `Assembly` has them, so that the digest is the gateway's.
    names = [f"{k}:{name}" if name in unknown else name for k, name in enumerate(header.pool)]
    average = {name: loaded.column(None) for name in names if name not in header.pool}
    known = [name for name in header.pool if name not in unknown]
    checkpoint = loaded.select_pool(known).extended(average).select_pool(names)
    if str(header.fingerprint["origin"]).startswith("untrained:"):
        raise ConfigurationError(
            f"run {header.run!r} was served without a checkpoint, so that {directory} cannot read its contexts: leave "
            "--checkpoint out; `offline`, `softmax`, `stacked` and cascades have nothing to start from there"
        )
    if checkpoint.digest != header.fingerprint["origin"]:
        strangers = f" (it knows nothing of {', '.join(unknown)})" if unknown else ""
        raise ConfigurationError(
            f"checkpoint {directory} is not the one that run {header.run!r} was served with"
            f"{strangers}: the log's contexts come "
            "from another encoder, and it holds no texts to encode again. Give that checkpoint, or replay recorded "
            "pairs"
        )
    return checkpoint


def temperature_of(name: str) -> float:
    try:
        return float(name.removeprefix(SOFTMAX))
    except ValueError as error:
        raise UnknownPolicyError(f"policy {name!r}: give a temperature, like {SOFTMAX}0.1") from error

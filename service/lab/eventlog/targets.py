"""Target policies at the contexts of an exported log: what each would have asked there.

Knows the log, its run's checkpoint and policies. Called by the command `ope`.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from router_core.checkpoint import Checkpoint
from router_core.errors import UnknownPolicyError
from router_core.ope import LoggedData, fixed_policy, softmax_policy
from router_core.policies import BayesianPolicy, OfflinePolicy, make_policy
from router_core.posterior import FoldSettings, Posterior, fold, start
from router_core.prior import Prior, PriorForm, no_prior
from service.errors import ConfigurationError
from service.lab.eventlog.load import EventLog, fold_events
from service.lab.eventlog.record import Header
from service.priors import build_prior
from service.settings import Settings

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

    def _start(self, name: str, form: PriorForm | None) -> Posterior:
        """The posterior at the beginning of a run with that prior form, or with the run's own."""
        fingerprint = self._log.header.fingerprint
        block, refresh, tolerance = fingerprint["fold"]
        return start(self._prior(name, form or self._log.header.form), FoldSettings(block, refresh, tolerance))

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
            given["lambda_novel"] = header.fingerprint.get("lambda_novel", 0.0)
        if form in _OFFLINE_FORMS and self._checkpoint is None:
            raise ConfigurationError(
                f"policy {name!r} starts from the prior {form.value!r}, which a checkpoint holds: give --checkpoint"
            )
        return build_prior(Settings.model_validate(given), self._checkpoint, len(header.pool), header.dim, form)


def load_checkpoint(directory: Path | None, header: Header) -> Checkpoint | None:
    """The run's checkpoint, restricted to its pool.

    Raises:
        ConfigurationError: it is not the one that made the log's contexts.
    """
    if directory is None:
        return None
    checkpoint = Checkpoint.load(directory).select_pool(header.pool)
    if checkpoint.digest != header.fingerprint["origin"]:
        raise ConfigurationError(
            f"checkpoint {directory} is not the one that run {header.run!r} was served with: the log's contexts come "
            "from another encoder, and it holds no texts to encode again. Give that checkpoint, or replay recorded "
            "pairs"
        )
    return checkpoint


def temperature_of(name: str) -> float:
    try:
        return float(name.removeprefix(SOFTMAX))
    except ValueError as error:
        raise UnknownPolicyError(f"policy {name!r}: give a temperature, like {SOFTMAX}0.1") from error

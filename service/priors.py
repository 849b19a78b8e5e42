"""From settings and a checkpoint to the prior of a run. Called by `service.gateway` and by the offline tools."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from router_core.checkpoint import Checkpoint
from router_core.errors import RouterCoreError
from router_core.prior import (
    CALIBRATED_LOSS_HYPERPARAMETERS,
    NONE_HYPERPARAMETERS,
    PAPER_HYPERPARAMETERS,
    Hyperparameters,
    Prior,
    PriorForm,
    calibrated_prior,
    linucb_prior,
    no_prior,
    paper_prior,
)
from router_core.records import Signal
from service.errors import ConfigurationError
from service.settings import Settings


def load_checkpoint(settings: Settings) -> Checkpoint | None:
    """Return the settings' checkpoint, with every arm that it knows; None where none is named.

    Raises:
        ConfigurationError: it cannot be read.
    """
    if settings.checkpoint is None:
        return None
    try:
        return Checkpoint.load(settings.checkpoint)
    except RouterCoreError as error:
        raise ConfigurationError(str(error)) from error


def check_known(checkpoint: Checkpoint, names: Sequence[str]) -> list[str]:
    """Return the scorers that a checkpoint knows nothing of: they start as an average one.

    Raises:
        ConfigurationError: it knows none of them, so that it is another pool's.
    """
    strange = [name for name in names if name not in checkpoint.pool]
    if len(strange) == len(names):
        try:
            checkpoint.require_known(strange)
        except RouterCoreError as error:
            raise ConfigurationError(str(error)) from error
    return strange


def build_prior(
    settings: Settings,
    checkpoint: Checkpoint | None,
    n_arms: int,
    d: int,
    form: PriorForm | None = None,
    signal: Signal | None = None,
) -> Prior:
    """The prior of that form for that signal; by default those that the settings and the checkpoint name.

    The settings' lambda0, sigma2, v, gamma, adapt, lambda_novel, floor and alarm_rate override those of every form but
    `linucb`, which is LASER's as published.

    Raises:
        ConfigurationError: a prior form that needs a checkpoint, without one.
    """
    form = form or form_of(settings, checkpoint)
    first, n_weights = (0, d) if checkpoint is None else checkpoint.columns(form)
    return _prior_of_form(settings, checkpoint, n_arms, n_weights, form, signal or settings.signal).reading(first, d)


def _prior_of_form(
    settings: Settings, checkpoint: Checkpoint | None, n_arms: int, n_weights: int, form: PriorForm, signal: Signal
) -> Prior:
    """Return the prior over the columns of a context that a posterior of this form reads."""
    if form is PriorForm.LINUCB:
        return linucb_prior(n_arms, n_weights)
    if form is PriorForm.NONE:
        return no_prior(n_arms, n_weights, _overridden(NONE_HYPERPARAMETERS, settings))
    if checkpoint is None:
        raise ConfigurationError(
            f"prior is {form.value!r}, which a checkpoint holds, and none is given: train one (`reward-router train`) "
            "and pass --checkpoint, or choose the prior or policy that needs none (`none`, `bayesian:none`)"
        )
    if form is PriorForm.PAPER:
        return paper_prior(checkpoint.bt_embeddings, _overridden(PAPER_HYPERPARAMETERS, settings))
    learned = CALIBRATED_LOSS_HYPERPARAMETERS if signal is Signal.LOSS else checkpoint.hyperparameters
    hyper = _overridden(learned, settings)
    return calibrated_prior(n_arms, n_weights, checkpoint.class_probabilities, hyper, checkpoint.landmarks)


def form_of(settings: Settings, checkpoint: Checkpoint | None) -> PriorForm:
    """The form of runs whose policy insists on none."""
    if settings.prior != "auto":
        return PriorForm(settings.prior)
    return PriorForm.NONE if checkpoint is None else checkpoint.prior_form


def _overridden(hyper: Hyperparameters, settings: Settings) -> Hyperparameters:
    names = ("lambda0", "sigma2", "v", "gamma", "adapt", "lambda_novel", "floor", "alarm_rate")
    given = {name: getattr(settings, name) for name in names}
    if settings.lambda0 is not None and settings.adapt is None:
        given["adapt"] = False
    return replace(hyper, **{name: value for name, value in given.items() if value is not None})

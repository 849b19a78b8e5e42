"""From an entry of the pool file to the client of a reward model. Called by `service.scorers.registry`."""

from __future__ import annotations

import logging

from service.errors import ConfigurationError
from service.pool import ModelEntry
from service.scorers.building import checking, require_urls
from service.scorers.protocol import OverLong
from service.scorers.rm.answers import Heads
from service.scorers.rm.client import TOKENS_PER_REQUEST, ArmConfig, VllmArm
from service.scorers.rm.health import HealthMonitor
from service.scorers.rm.render import Rendering, load_rendering
from service.settings import Settings

logger = logging.getLogger(__name__)


def build_reward_model(
    model: ModelEntry, settings: Settings, over_long: OverLong = OverLong.SKIP, *, watched: bool = True
) -> VllmArm:
    """Return the client of one RM's workers. The caller closes it.

    Args:
        model: its entry in the pool file.
        settings: limits and times.
        over_long: the pool's.
        watched: it has a health monitor.

    Raises:
        ConfigurationError: no `urls`, or a chat template, tokenizer or URL that cannot be used.
    """
    require_urls("model", model.name, model.urls)
    try:
        rendering, fallback = _load_rendering(model)
    except (ValueError, OSError) as error:
        what = "rendering: tokens" if model.rendering == "tokens" else f"chat template {model.chat_template}"
        raise ConfigurationError(f"model {model.name!r}: {what}: {error}") from error
    return VllmArm(
        ArmConfig(
            name=model.name,
            urls=model.urls,
            model=model.served_name,
            rendering=rendering,
            fallback=fallback,
            max_in_flight=model.max_in_flight or settings.worker_max_in_flight,
            tokens_per_request=model.tokens_per_request or TOKENS_PER_REQUEST,
            max_model_len=model.max_model_len,
            over_long=over_long,
            attempt_timeout_seconds=model.timeout_seconds or settings.worker_timeout_seconds,
            api_key=model.key(),
            requests_per_minute=model.requests_per_minute,
            tokens_per_minute=model.tokens_per_minute,
            timeout_seconds=model.timeout_seconds,
            reward_scale=model.reward_scale,
            reward_shift=model.reward_shift,
            reward_limit=model.reward_limit,
            heads=None if model.head is None and model.heads is None else Heads(model.head, model.heads),
            applies=model.admits if model.choosy else None,
        ),
        monitor=(lambda arm: _monitor(arm, settings)) if watched else None,
    )


def _monitor(arm: VllmArm, settings: Settings) -> HealthMonitor:
    return HealthMonitor([arm], *checking(arm.name, settings, settings.worker_timeout_seconds))


def _load_rendering(model: ModelEntry) -> tuple[Rendering, Rendering | None]:
    """The model's rendering, and the one for workers that read another text than that; `tokenizers` is imported only
    where token ids are to be sent.
    """
    if model.rendering in ("messages", "template"):
        return load_rendering(model.rendering, model.chat_template), None
    from service.scorers.rm.tokens import load_token_rendering

    # The template `plain` is the default of the field; a model that is given ids has one of its own.
    template = None if model.chat_template == "plain" else model.chat_template
    # A tokenizer of its own name has revisions of its own.
    revision = None if model.tokenizer else model.revision
    try:
        rendering = load_token_rendering(model.tokenizer or str(model.source), template, revision=revision)
    except (ValueError, OSError) as error:
        if model.rendering == "tokens":
            raise
        fields = {"model": model.name, "rendering": "messages", "reason": str(error)}
        logger.warning("the reward model's tokenizer cannot be had", extra={"fields": fields})
        return load_rendering("messages"), None
    return rendering, load_rendering("messages") if model.rendering == "auto" else None

"""How trainers' texts come apart, from settings. Called by `service.gateway`."""

from __future__ import annotations

from service.errors import ConfigurationError
from service.handlers.trainers import TrainerTexts
from service.settings import OnUnknownTemplate, Settings
from service.telemetry import Telemetry
from service.trainers.chat_families import FAMILIES
from service.trainers.chat_format import ChatFormat
from service.trainers.learned import load_chat_format
from service.trainers.templated import Templates


def build_trainer_texts(settings: Settings, telemetry: Telemetry) -> TrainerTexts:
    """How trainers' texts come apart: the operator's chat templates, and behind them the built-in ones.

    Raises:
        ConfigurationError: a file that holds no chat template, or one that cannot be learned from.
    """
    learned: list[ChatFormat] = []
    for path in settings.chat_templates:
        try:
            learned.append(load_chat_format(path))
        except (ValueError, OSError) as error:
            raise ConfigurationError(
                f"setting chat_templates: {path}: {error}: name a tokenizer's directory or a chat template's file"
            ) from error
    refuse = settings.on_unknown_template is OnUnknownTemplate.REFUSE
    return TrainerTexts(Templates([*learned, *FAMILIES]), refuse_unknown=refuse, telemetry=telemetry)

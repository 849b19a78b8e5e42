"""The encoder that settings and a checkpoint name: computed here, or over a network. Called by `service.gateway`."""

from __future__ import annotations

from router_core.checkpoint import Checkpoint
from router_core.encoder.fuse import Fuse, PairEncoder
from router_core.encoder.registry import load_backbone, load_checkpoint_backbone
from router_core.errors import RouterCoreError
from service.encoders.load import RemoteOptions, is_remote, load_remote_encoder
from service.encoders.protocol import AwaitedEncoder
from service.errors import ConfigurationError
from service.settings import Settings
from service.telemetry import Telemetry


def load_pair_encoder(
    settings: Settings, checkpoint: Checkpoint | None, telemetry: Telemetry
) -> PairEncoder | AwaitedEncoder:
    """The checkpoint's encoder, or the settings' one with an untrained fuse; computed here, or over vLLM.

    Raises:
        ConfigurationError: it cannot be loaded.
    """
    if is_remote(settings.encoder):
        options = RemoteOptions(
            timeout_seconds=settings.encoder_timeout_seconds,
            parallel_requests=settings.encoder_parallel_requests,
            health_interval_seconds=settings.health_interval_seconds,
            api_key=settings.encoder_api_key,
            seed=settings.seed,
        )
        return load_remote_encoder(
            settings.encoder, checkpoint, settings.encoder_reading, options, telemetry.encoder_texts.observe
        )
    try:
        if checkpoint is not None:
            return PairEncoder(load_checkpoint_backbone(checkpoint), checkpoint.fuse)
        backbone = load_backbone(settings.encoder)
        return PairEncoder(backbone, Fuse.identity(backbone.dim))
    except RouterCoreError as error:
        raise ConfigurationError(str(error)) from error

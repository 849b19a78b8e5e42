"""What `up` checks before it starts anything: settings, checkpoint and pool, in words.

Called by `service.cli.up`, for a dry run too. What only running workers can tell is the gateway's to find.
"""

from __future__ import annotations

from pathlib import Path

from service.errors import ConfigurationError
from service.pool import PoolFile
from service.priors import check_known, load_checkpoint
from service.settings import Settings, read_settings


def check_start(pool: PoolFile, checkpoint: Path | None, run: str | None, signal: str | None) -> Settings:
    """Return the gateway's settings if pool, checkpoint and settings fit each other.

    Raises:
        ConfigurationError: they do not; says what to change.
    """
    settings = read_settings(checkpoint=checkpoint, run=run, signal=signal)
    names = [model.name for model in pool.models]
    try:
        found = load_checkpoint(settings)
        if found is not None:
            check_known(found, names)
    except ConfigurationError as error:
        raise ConfigurationError(
            f"--checkpoint {settings.checkpoint} does not fit the pool ({', '.join(names)}): {error.message}. Give the "
            "checkpoint that was trained for these scorers, or leave it out and start from nothing"
        ) from error
    return settings

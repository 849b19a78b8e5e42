"""The store that settings name, started where it is embedded. Called by `service.gateway`."""

from __future__ import annotations

from service.errors import ConfigurationError
from service.settings import EMBEDDED, Settings, store_directory
from service.stores.embedded import EmbeddedStore
from service.stores.protocol import Store
from service.stores.redis import RedisStore


def open_store(settings: Settings) -> tuple[Store, EmbeddedStore | None]:
    """Return the client, and the server where it runs in this process's care. The caller closes both.

    Raises:
        ConfigurationError: the address cannot be used, or the embedded server does not start.
    """
    embedded = None
    url = settings.store_url
    if url == EMBEDDED:
        embedded = EmbeddedStore(store_directory(settings.data_dir), fsync=settings.store_fsync)
        embedded.start()
        url = embedded.url
    try:
        store = RedisStore(
            url,
            window_seconds=settings.decision_ttl_seconds,
            timeout_seconds=settings.store_timeout_seconds,
            replicas=settings.store_replicas,
        )
    except ConfigurationError:
        if embedded is not None:
            embedded.stop()
        raise
    return store, embedded

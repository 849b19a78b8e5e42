"""The log of acts: who changed what of a gateway, and when. One JSON line before an act, one with what came of it.

`service.handlers.keys` writes every request that may change something of the gateway (not rewards and feedback, which
have the runs' logs), and `service.gateway` what was taken of a changed keys file. Bodies are not written: a pool file
may hold keys. The pool's changes stand with their values in the log of their run.
"""

from __future__ import annotations

import json
import logging
import os
from datetime import UTC, datetime
from pathlib import Path

from service.errors import ActsUnavailableError

logger = logging.getLogger(__name__)


class ActLog:
    """Writes to the process's log, and to a file where there is one.

    Args:
        path: the file, which only grows; None for none.
    """

    def __init__(self, path: Path | None = None) -> None:
        self._path = path

    def write(self, act: str, **fields: object) -> None:
        """Write one line; when this returns, it is on the disk.

        Args:
            act: what was done, in one stable word or two.
            fields: JSON values. No key, body or text.

        Raises:
            ActsUnavailableError: the file cannot be written.
        """
        record = {"time": datetime.now(UTC).isoformat(timespec="milliseconds"), "act": act, **fields}
        logger.info("act", extra={"fields": record})
        if self._path is None:
            return
        line = json.dumps(record, ensure_ascii=True).encode() + b"\n"
        try:
            descriptor = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
            try:
                os.write(descriptor, line)
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
        except OSError as error:
            raise ActsUnavailableError(
                f"the log of acts cannot be written ({error.strerror}): nothing is changed until it can; see acts_file"
            ) from error

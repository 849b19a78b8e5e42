"""A few faults of every storm; `make chaos` draws more than a hundred."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.chaos.storm import Storm

if TYPE_CHECKING:
    from tests.conftest import ValkeyProcess

log = logging.getLogger(__name__)

pytestmark = pytest.mark.slow

ROUNDS = int(os.environ.get("CHAOS_ROUNDS", "12"))
SEED = int(os.environ.get("CHAOS_SEED", "0"))


async def test_nothing_acknowledged_is_lost_or_repeated(tmp_path: Path, own_valkey_server: ValkeyProcess) -> None:
    pytest.importorskip("wordllama", reason="needs reward-router[embedded]")
    own_valkey_server.kill()
    own_valkey_server.start(appendfsync="always")
    storm = Storm(tmp_path, own_valkey_server, SEED)
    await storm.run(ROUNDS)
    log.info("seed %d, %d rounds: %s", SEED, ROUNDS, dict(storm.happened))
    log.info("%s", storm.seen)
    assert storm.seen.acknowledged

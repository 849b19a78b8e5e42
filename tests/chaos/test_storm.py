"""Every fault once; `make chaos` draws more than a hundred of each."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.chaos.storm import Calm, ClusterStorm, Storm
from tests.support.cluster import ValkeyCluster

if TYPE_CHECKING:
    from tests.conftest import ValkeyProcess

log = logging.getLogger(__name__)

pytestmark = pytest.mark.slow

ROUNDS = int(os.environ.get("CHAOS_ROUNDS", "0"))
SEED = int(os.environ.get("CHAOS_SEED", "0"))


async def survive(storm: Calm) -> None:
    """Let it happen, and say what happened."""
    rounds = ROUNDS or len(storm.faults())
    await storm.run(rounds)
    log.info("seed %d, %d rounds: %s", SEED, rounds, dict(storm.happened))
    log.info("%s", storm.seen)
    assert storm.seen.acknowledged


async def test_nothing_acknowledged_is_lost_or_repeated(tmp_path: Path, own_valkey_server: ValkeyProcess) -> None:
    pytest.importorskip("wordllama", reason="needs reward-router[embedded]")
    own_valkey_server.kill()
    own_valkey_server.start(appendfsync="always")
    await survive(Storm(tmp_path, own_valkey_server, SEED))


async def test_nor_where_primaries_of_a_cluster_fail_over(tmp_path: Path, valkey_binary: Path) -> None:
    pytest.importorskip("wordllama", reason="needs reward-router[embedded]")
    with ValkeyCluster(valkey_binary, tmp_path, replicas=1) as cluster:
        await survive(ClusterStorm(tmp_path, cluster, SEED))

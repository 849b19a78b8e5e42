"""Child processes of the gateway benchmark: a stub worker, a pass-through proxy, the real gateway, and idlers.

    python -m loadtests.stub awake --core C
    python -m loadtests.stub stub --port P [--pairs-per-second R]
    python -m loadtests.stub proxy --port P --upstream http://127.0.0.1:Q
    python -m loadtests.stub gateway --port P --pool FILE --store URL --run NAME --encoder hash:64|served:9:64|static

Started by `loadtests.gateway` and `loadtests.pipeline`. With `--pairs-per-second` every model of the stub is one
device: first come, first served, so many pairs a second. The gateway is `service.app.create_app`, served as
`reward-router serve` does; only its encoder may be another: `hash:D` looks a unit vector up, so that what remains is
everything but encoding; `served:R:D` does so too, and takes the time that a server of R pairs a second would.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import signal
import sys
import time
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import msgspec
import numpy as np
import uvicorn
import uvloop
from numpy.typing import NDArray

from loadtests.report import use_one_blas_thread
from router_core.encoder.fuse import PairEncoder
from router_core.records import Instance
from service.cli.serve import serve_app
from service.encoders.protocol import AwaitedEncoder, Encoded, ServerStatus
from service.pool import load_pool
from service.scorers.wire import (
    CLASSIFY_PATH,
    MODELS_PATH,
    ClassifiedReply,
    ClassifyReply,
    ModelList,
    ServedModel,
    Usage,
)
from service.settings import Settings, read_settings
from service.telemetry import configure_logging

MODELS = ("rm-a", "rm-b", "rm-c", "rm-d")
"""The stub serves all of them on one port."""

AWAKE_SECONDS = 600.0
"""No idler outlives this, whatever becomes of the benchmark."""

PATIENCE_SECONDS = 120.0
"""Deadlines of the gateway: a benchmark of slow devices waits for them."""

HASH_ROWS = 4096
"""Unit vectors of the `hash:D` encoder."""


class HashEncoder(PairEncoder):
    """A unit vector per text of the pair, looked up by crc32: an encoder that costs next to nothing."""

    def __init__(self, d: int) -> None:
        rows = np.random.default_rng(0).standard_normal((HASH_ROWS, d), dtype=np.float32)
        self._rows: NDArray[np.float32] = rows / np.linalg.norm(rows, axis=1, keepdims=True)
        self._name = f"hash:{d}"

    @property
    def spec(self) -> str:
        """`hash:D`."""
        return self._name

    @property
    def d(self) -> int:
        """Columns of x."""
        return int(self._rows.shape[1])

    def encode(self, instances: Sequence[Instance]) -> NDArray[np.float32]:
        """(B, d) float32."""
        return self._rows[[zlib.crc32(instance.responses[0].encode()) % HASH_ROWS for instance in instances]]


class Device:
    """Takes what it is asked in turn, at a steady rate.

    Args:
        items_per_second: its speed.
    """

    def __init__(self, items_per_second: float) -> None:
        self._rate = items_per_second
        self._free_at = 0.0

    def done_at(self, items: int) -> float:
        """When it will have done these too, by the event loop's clock."""
        now = asyncio.get_running_loop().time()
        self._free_at = max(now, self._free_at) + items / self._rate
        return self._free_at


class ServedEncoder(AwaitedEncoder):
    """`HashEncoder` as if it were a server's: each call waits for its turn and its time.

    Args:
        pairs_per_second: the server's speed.
        d: columns of x.
    """

    def __init__(self, pairs_per_second: float, d: int) -> None:
        self._table = HashEncoder(d)
        self._device = Device(pairs_per_second)

    @property
    def spec(self) -> str:
        """`hash:D`."""
        return self._table.spec

    @property
    def d(self) -> int:
        """Columns of x."""
        return self._table.d

    @property
    def available(self) -> bool:
        """Always."""
        return True

    def servers(self) -> list[ServerStatus]:
        """None that could be named."""
        return []

    async def start(self) -> None:
        """Nothing to probe."""

    async def close(self) -> None:
        """Nothing to close."""

    async def encode(self, instances: Sequence[Instance]) -> Encoded:
        """(B, d), when their turn has come."""
        loop = asyncio.get_running_loop()
        began = loop.time()
        await asyncio.sleep(self._device.done_at(len(instances)) - began)
        return Encoded(self._table.encode(instances), loop.time() - began)


class _Question(msgspec.Struct):
    """What the stub reads of a request."""

    model: str = MODELS[0]
    input: str | list[str] | None = None
    use_activation: bool | None = None


class StubProtocol(asyncio.Protocol):
    """Answers `/classify` with constant rewards as fast as Python can; no framework, no parser of headers.

    Args:
        devices: by model; empty to answer at once.
    """

    def __init__(self, devices: Mapping[str, Device]) -> None:
        self._devices = devices
        self._buffer = b""
        self._transport: asyncio.Transport | None = None
        self._decoder = msgspec.json.Decoder(_Question)
        self._answers: dict[tuple[int, bool], bytes] = {}

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Remember where to answer."""
        # uvloop's transports do not inherit from asyncio's.
        self._transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        """Answer every whole request in the buffer."""
        self._buffer = self._buffer + data if self._buffer else data
        while True:
            head = self._buffer.find(b"\r\n\r\n")
            if head < 0:
                return
            body = head + 4
            mark = self._buffer.find(b"ontent-Length: ", 0, head)
            mark = mark if mark >= 0 else self._buffer.find(b"ontent-length: ", 0, head)
            length = int(self._buffer[mark + 15 : self._buffer.find(b"\r\n", mark)]) if mark >= 0 else 0
            if len(self._buffer) < body + length:
                return
            question, document = self._buffer[:body], self._buffer[body : body + length]
            self._buffer = self._buffer[body + length :]
            self._reply(question, document)

    def _reply(self, head: bytes, body: bytes) -> None:
        if head.startswith(b"GET " + MODELS_PATH.encode()):
            self._write(_http(msgspec.json.encode(ModelList([ServedModel(name) for name in MODELS]))))
            return
        if not head.startswith(b"POST " + CLASSIFY_PATH.encode()):
            self._write(_http(b"{}"))
            return
        question = self._decoder.decode(body)
        key = (len(question.input) if isinstance(question.input, list) else 1, question.use_activation is False)
        if key not in self._answers:
            self._answers[key] = _classified(*key)
        device = self._devices.get(question.model)
        if device is None:
            self._write(self._answers[key])
        else:
            asyncio.get_running_loop().call_at(device.done_at(key[0]), self._write, self._answers[key])

    def _write(self, reply: bytes) -> None:
        if self._transport is not None:
            self._transport.write(reply)


def _classified(count: int, raw: bool) -> bytes:
    """Rewards 0.25, 1.25, 0.25, …, so that the second response of a pair wins; sigmoids of them unless `raw`."""
    rewards = [0.25 + index % 2 for index in range(count)]
    if not raw:
        rewards = [1 / (1 + np.exp(-reward)) for reward in rewards]
    rows = [ClassifiedReply(index, "LABEL_0", [float(reward)]) for index, reward in enumerate(rewards)]
    reply = ClassifyReply("classify-0", "list", 0, MODELS[0], rows, Usage(100 * count, 100 * count))
    return _http(msgspec.json.encode(reply))


def _http(body: bytes) -> bytes:
    return b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body)


async def serve_stub(port: int, pairs_per_second: float | None) -> None:
    """Serve until the process is ended."""
    devices = {} if pairs_per_second is None else {name: Device(2 * pairs_per_second) for name in MODELS}
    server = await asyncio.get_running_loop().create_server(lambda: StubProtocol(devices), "127.0.0.1", port)
    await server.serve_forever()


def keep_awake() -> None:
    """Spin at idle priority: the core never sleeps, and everything else comes first. Ends with its parent."""
    os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))
    parent, until = os.getppid(), time.monotonic() + AWAKE_SECONDS
    while os.getppid() == parent and time.monotonic() < until:
        for _ in range(10_000):
            pass


def proxy_app(upstream: str) -> Any:
    """FastAPI + aiohttp: read the body, post it to the stub, return what comes back."""
    from contextlib import asynccontextmanager

    import aiohttp
    from fastapi import FastAPI, Request, Response

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> Any:
        async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=256)) as session:
            app.state.session = session
            yield

    app = FastAPI(lifespan=lifespan)

    # Annotated by hand: with postponed annotations FastAPI cannot resolve names that are local to this function.
    async def forward(request):  # type: ignore[no-untyped-def]
        body = await request.body()
        headers = {"Content-Type": "application/json"}
        async with request.app.state.session.post(upstream + CLASSIFY_PATH, data=body, headers=headers) as answer:
            return Response(await answer.read(), status_code=answer.status, media_type="application/json")

    forward.__annotations__ = {"request": Request, "return": Response}
    app.post(CLASSIFY_PATH)(forward)
    return app


def gateway_app(settings: Settings) -> Any:
    """The real application; see the module. An encoder `hash:D` or `served:R:D` is ours."""
    from service.app import create_app

    kind, *numbers = settings.encoder.split(":")
    encoder: PairEncoder | AwaitedEncoder | None = None
    if kind == "hash":
        encoder = HashEncoder(int(numbers[0]))
    elif kind == "served":
        encoder = ServedEncoder(float(numbers[0]), int(numbers[1]))
    if settings.pool is None:
        raise SystemExit("give --pool")
    return create_app(settings, load_pool(settings.pool), encoder=encoder)


def serve_proxy(app: Any, port: int) -> None:
    """uvicorn with the same event loop and parser as the gateway's."""
    uvicorn.run(
        app,
        host="127.0.0.1",
        port=port,
        loop="uvloop",
        http="httptools",
        access_log=False,
        log_config=None,
        server_header=False,
        proxy_headers=False,
        timeout_keep_alive=65,
    )


def main() -> None:
    """Be one of the children."""
    parser = argparse.ArgumentParser(prog="python -m loadtests.stub")
    parser.add_argument("kind", choices=("awake", "stub", "proxy", "gateway"))
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--core", type=int, help="run on this core alone")
    parser.add_argument("--upstream", help="proxy: where to pass on to")
    parser.add_argument("--pool", type=Path, help="gateway: pool file")
    parser.add_argument("--store", help="gateway: URL of the store")
    parser.add_argument("--run", help="gateway: name of the run")
    parser.add_argument("--encoder", default="static", help="gateway: hash:D, served:R:D or an encoder's name")
    parser.add_argument("--piece", type=int, default=128, help="gateway: batch_piece_responses [default: 128]")
    parser.add_argument("--tracing", help="gateway: make spans, and send them to this URL")
    parser.add_argument("--pairs-per-second", type=float, help="stub: of each model; at once by default")
    parser.add_argument("--profile", type=Path, help="gateway: write a cProfile of the serving thread to this file")
    options = parser.parse_args()
    if options.core is not None:
        os.sched_setaffinity(0, {options.core})
    if options.kind == "awake":
        keep_awake()
        return
    use_one_blas_thread()
    configure_logging("warning")
    if options.kind == "stub":
        uvloop.run(serve_stub(options.port, options.pairs_per_second))
        return
    if options.kind == "proxy":
        serve_proxy(proxy_app(options.upstream), options.port)
        return
    if options.tracing is not None:
        os.environ["OTEL_EXPORTER_OTLP_ENDPOINT"] = options.tracing
    settings = read_settings(
        tracing=True if options.tracing is not None else None,
        pool=options.pool,
        port=options.port,
        store_url=options.store,
        run=options.run,
        encoder=options.encoder,
        batch_piece_responses=options.piece,
        request_timeout_seconds=PATIENCE_SECONDS,
        worker_timeout_seconds=PATIENCE_SECONDS,
        seed=1,
    )
    app = gateway_app(settings)
    if options.profile is None:
        serve_app(app, settings)
        return
    import cProfile

    # uvicorn raises its signal again when it has drained; the default action would end us before the file is written.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    profile = cProfile.Profile()
    try:
        profile.runcall(serve_app, app, settings)
    finally:
        profile.dump_stats(options.profile)


if __name__ == "__main__":
    main()

"""`reward-router serve`: one gateway process, or several at one port (`service.cli.serve_many`)."""

from __future__ import annotations

import contextlib
import os
import socket
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Annotated, Any

import typer
import uvicorn
from starlette.types import ASGIApp
from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]
from uvicorn.config import STARTUP_FAILURE

from service.cli.dry_run import REMOTE_ENCODER, encoder_check, fit_check, port_check, scorer_checks, tell
from service.cli.preflight import Preflight
from service.cli.serve_many import serve_many
from service.cli.store_option import store_option
from service.errors import ConfigurationError
from service.memory import keep_freed_memory, leave_loaded_objects_alone
from service.pool import PoolFile, load_pool
from service.priors import load_checkpoint
from service.settings import Settings, read_settings
from service.telemetry import configure_logging


def serve(
    pool: Annotated[Path, typer.Option(help="Pool file (YAML): the reward models and where they are served.")],
    checkpoint: Annotated[Path | None, typer.Option(help="Directory of a trained checkpoint.")] = None,
    encoder: Annotated[
        str | None,
        typer.Option(
            help="static, minilm, torch:DIR …, or vllm:URL of a server (default: the checkpoint's, or static)."
        ),
    ] = None,
    host: Annotated[str | None, typer.Option(help="Address to listen on (default: 127.0.0.1).")] = None,
    port: Annotated[int | None, typer.Option(help="Port to listen on (default: 8080).")] = None,
    workers: Annotated[int | None, typer.Option(help="Gateway processes that share the port (default: 1).")] = None,
    store: Annotated[str | None, store_option()] = None,
    data_dir: Annotated[Path | None, typer.Option(help="Where everything that is kept lies. (default: .data)")] = None,
    run: Annotated[str | None, typer.Option(help="Name of the default run.")] = None,
    policy: Annotated[
        str | None, typer.Option(help="bayesian, offline, laser, uwo, random, majority, single:MODEL.")
    ] = None,
    signal: Annotated[str | None, typer.Option(help="Kind of feedback: preference, loss or reward.")] = None,
    prior: Annotated[str | None, typer.Option(help="auto, paper, calibrated or none.")] = None,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run",
            help="Print a line a check (port, servers, checkpoint, run) and serve nothing. Exit status 1 if one fails.",
        ),
    ] = False,
) -> None:
    """Serve POST /reward and POST /feedback for a pool whose workers already run.

    Every other setting is an environment variable REWARD_ROUTER_…; docs/settings.md lists them.
    """
    settings = read_settings(
        pool=pool,
        checkpoint=checkpoint,
        encoder=encoder,
        host=host,
        port=port,
        workers=workers,
        store_url=store,
        data_dir=data_dir,
        run=run,
        policy=policy,
        signal=signal,
        prior=prior,
    )
    if dry_run:
        _check_dry(settings, _pool_of(settings))
        return
    if settings.workers == 1:
        run_gateway(settings)
        return
    configure_logging(settings.log_level)
    # Told here once, not by each process.
    _pool_of(settings)
    if status := serve_many(settings):
        raise typer.Exit(status)


def _check_dry(settings: Settings, pool: PoolFile) -> None:
    """Print what a start would find.

    Raises:
        typer.Exit: with status 1 where a check fails.
    """
    encoder = settings.encoder or ""
    tell(
        [
            fit_check(lambda: Preflight(settings, pool, load_checkpoint(settings))),
            port_check(settings.port, settings.host, moves=False),
            *([encoder_check(encoder)] if encoder.startswith(REMOTE_ENCODER) else []),
            *scorer_checks(pool, settings, starts=False),
        ]
    )


def _pool_of(settings: Settings) -> PoolFile:
    if settings.pool is None:
        raise ConfigurationError("no pool file: give --pool, or set REWARD_ROUTER_POOL")
    return load_pool(settings.pool)


def run_gateway(
    settings: Settings,
    sockets: list[socket.socket] | None = None,
    *,
    alive: Callable[[], Awaitable[None]] | None = None,
) -> None:
    """Serve until a signal, with `blas_threads` threads of linear algebra.

    Args:
        settings: of the gateway.
        sockets: where to listen, instead of the settings' address.
        alive: called in the event loop every second while it serves.

    The number decides how BLAS groups its sums, and so the last bits of a fold: replicas of a run must have the same.
    """
    # For what is loaded later (torch); numpy is loaded already, so its BLAS is told by threadpoolctl.
    os.environ.setdefault("OMP_NUM_THREADS", str(settings.blas_threads))
    from service.app import create_app

    threadpool_limits(settings.blas_threads, user_api="blas")
    configure_logging(settings.log_level)
    app = create_app(settings, _pool_of(settings))
    serve_app(app, settings, refused=app.count_refusal, sockets=sockets, alive=alive)


def serve_app(
    app: ASGIApp,
    settings: Settings,
    *,
    refused: Callable[[str], None] = lambda _: None,
    sockets: list[socket.socket] | None = None,
    alive: Callable[[], Awaitable[None]] | None = None,
) -> None:
    """uvicorn, as the gateway is served; returns when a signal has ended it and requests are drained.

    Args:
        app: the application.
        settings: of the gateway.
        refused: told the error's code of each connection that was closed before its request was whole.
        sockets: where to listen, instead of the settings' address.
        alive: see `run_gateway`.
    """
    keep_freed_memory()
    leave_loaded_objects_alone()
    beat: dict[str, Any] = {} if alive is None else {"callback_notify": alive, "timeout_notify": 1}
    server = uvicorn.Server(uvicorn.Config(app, **server_options(settings, refused), **beat))
    # uvicorn raises Ctrl-C again when all is drained.
    with contextlib.suppress(KeyboardInterrupt):
        server.run(sockets)
    if not server.started:
        sys.exit(STARTUP_FAILURE)


def server_options(settings: Settings, refused: Callable[[str], None]) -> dict[str, Any]:
    """How the gateway is served, as arguments of `uvicorn.Config`; `refused` as for `serve_app`."""
    # Loaded only here: it loads uvicorn's parser, which the other commands do not need.
    from service.handlers.connection import ConnectionLimits, gateway_protocol

    limits = ConnectionLimits(settings.read_timeout_seconds, settings.max_connections_per_address)
    return {
        "host": settings.host,
        "port": settings.port,
        "loop": "uvloop",
        "http": gateway_protocol(limits, refused),
        "ws": "none",
        "access_log": False,
        "log_config": None,
        "server_header": False,
        # Nothing here asks who the caller is behind a proxy.
        "proxy_headers": False,
        "timeout_keep_alive": 65,
        "timeout_graceful_shutdown": int(settings.request_timeout_seconds) + 1,
    }

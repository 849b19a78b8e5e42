"""`reward-router worker`: a small worker that answers in the words of vLLM's `/classify`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from service.errors import ConfigurationError


def worker(
    model: Annotated[
        list[str],
        typer.Option(
            help="A Hugging Face directory to serve; with --recorded, the name of a recorded RM. May be repeated."
        ),
    ],
    recorded: Annotated[
        Path | None,
        typer.Option(help="Answer from the scores recorded in this JSONL file, by content; 404 for the rest."),
    ] = None,
    name: Annotated[
        list[str] | None, typer.Option(help="Served name of each directory (default: its last part).")
    ] = None,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen on.")] = 8101,
    threads: Annotated[int, typer.Option(help="Threads of one forward pass.")] = 1,
    delay_ms: Annotated[float, typer.Option(help="Recorded worker: pretend that scoring takes this long.")] = 0.0,
) -> None:
    """Serve reward models without a GPU: real ones on the CPU (transformers), or recorded ones from a table.

    A recorded worker needs no weights: the whole service can be run against the recorded behaviour of real RMs.
    """
    from service.workers.server import run_worker

    if recorded is not None:
        from router_core.dataset import load_rows
        from service.workers.recorded import recorded_app

        app = recorded_app(load_rows(recorded), model, delay_seconds=delay_ms / 1e3)
    else:
        try:
            from service.workers.cpu import cpu_app
        except ImportError as error:
            raise ConfigurationError(
                f"the CPU worker needs torch and transformers ({error}): pip install 'reward-router[train]'"
            ) from error
        names = name or [Path(directory).name for directory in model]
        if len(names) != len(model):
            raise ConfigurationError(
                f"--name is given {len(names)} times and --model {len(model)} times: give one each"
            )
        app = cpu_app({n: Path(m) for n, m in zip(names, model, strict=True)}, threads=threads)
    run_worker(app, host=host, port=port)

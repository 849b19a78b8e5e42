"""`reward-router encoder`: an encoder's transformer as a directory that vLLM serves, and a small server for it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from service.errors import ConfigurationError

if TYPE_CHECKING:
    from router_core.checkpoint import Checkpoint
    from router_core.encoder.torch import TorchBackbone

app = typer.Typer(
    no_args_is_help=True,
    help="Serve an encoder's transformer apart from the gateway: export it, serve it with vLLM (docs/encoders.md).",
)

_NEEDS_TORCH = "the encoder's weights need {name!r}: pip install 'reward-router[train]'"


@app.command("export")
def export(
    out: Annotated[Path, typer.Option(help="Directory for `vllm serve`; made if absent.")],
    checkpoint: Annotated[
        Path | None, typer.Option(help="The checkpoint whose encoder it is. Gets a folder `reading`, for the gateway.")
    ] = None,
    encoder: Annotated[
        str | None, typer.Option(help="Without checkpoint: smollm2-135m, minilm or torch:DIR, with @bf16 if so wanted.")
    ] = None,
) -> None:
    """Write a transformer with weights, tokenizer, pooling and reference states, and say how to serve it."""
    from router_core.checkpoint import Checkpoint
    from router_core.encoder.registry import split_spec

    if (checkpoint is None) == (encoder is None):
        raise ConfigurationError("give either --checkpoint DIR or --encoder NAME")
    loaded = Checkpoint.load(checkpoint) if checkpoint is not None else None
    spec = loaded.encoder_spec if loaded is not None else str(encoder)
    transformer = split_spec(spec)[1]
    backbone = _load(transformer, loaded)
    _write(backbone, out, loaded)
    from router_core.encoder.export import serve_command

    command = serve_command(out, backbone.precision, backbone.max_tokens)
    console = Console(soft_wrap=True)
    console.print(
        f"exported {transformer} ({backbone.dim} columns, {backbone.max_tokens} tokens) to {out}", highlight=False
    )
    console.print("\nserve it:            " + " ".join(command), highlight=False)
    console.print(f"or without vLLM:     reward-router encoder serve {out} --port 8000", highlight=False)
    reading = "--checkpoint DIR" if loaded is not None else f"(REWARD_ROUTER_ENCODER_READING={out})"
    console.print(
        f"then the gateway:    reward-router serve … {reading} --encoder vllm:http://127.0.0.1:8000", highlight=False
    )


@app.command("serve")
def serve(
    directory: Annotated[Path, typer.Argument(help="An exported directory.")],
    name: Annotated[str, typer.Option(help="Served name.")] = "encoder",
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen on.")] = 8100,
    threads: Annotated[int, typer.Option(help="Threads of one forward pass.")] = 1,
) -> None:
    """Serve an exported encoder on the CPU with transformers, in the words of vLLM's /v1/embeddings."""
    from service.workers.server import run_worker

    try:
        from service.workers.embedding import embedding_app
    except ImportError as error:
        raise ConfigurationError(_NEEDS_TORCH.format(name=error.name)) from error
    run_worker(embedding_app(directory, name=name, threads=threads), host=host, port=port)


def _load(transformer: str, checkpoint: Checkpoint | None) -> TorchBackbone:
    from router_core.encoder.registry import load_backbone

    try:
        from router_core.encoder.torch import TorchBackbone
    except ImportError as error:
        raise ConfigurationError(_NEEDS_TORCH.format(name=error.name)) from error
    backbone = load_backbone(transformer, root=checkpoint.directory if checkpoint is not None else None)
    if not isinstance(backbone, TorchBackbone):
        raise ConfigurationError(f"encoder {transformer!r} is no transformer; it runs in the gateway")
    return backbone


def _write(backbone: TorchBackbone, out: Path, checkpoint: Checkpoint | None) -> None:
    from router_core.encoder.export import export, write_reading
    from service.encoders.load import READING_FOLDER
    from service.encoders.reading import files_digest

    files = files_digest(checkpoint.encoder_files) if checkpoint is not None else ""
    try:
        export(backbone, out, files)
        if checkpoint is not None and checkpoint.directory is not None:
            write_reading(backbone, checkpoint.directory / READING_FOLDER, files)
    except OSError as error:
        raise ConfigurationError(f"{error.filename}: cannot be written ({error.strerror})") from error

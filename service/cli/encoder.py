"""`reward-router encoder`: an encoder's transformer as a directory that vLLM serves, and a small server for it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from service.errors import ConfigurationError

if TYPE_CHECKING:
    from router_core.checkpoint import Checkpoint
    from router_core.encoder.torch import TorchBackbone

app = typer.Typer(
    no_args_is_help=True,
    help="Serve an encoder's transformer apart from the gateway: export it, serve it with vLLM (docs/encoders.md).",
)

_PORT = 8100
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

    if (checkpoint is None) == (encoder is None):
        raise ConfigurationError("give either --checkpoint DIR or --encoder NAME")
    backbone = write_export(Checkpoint.load(checkpoint) if checkpoint is not None else None, encoder, out)
    from router_core.encoder.export import serve_command

    command = serve_command(out, backbone.precision, backbone.max_tokens)
    gateway = f"reward-router serve … --encoder vllm:http://127.0.0.1:{_PORT}"
    gateway = (
        gateway + f" --checkpoint {checkpoint}" if checkpoint else f"REWARD_ROUTER_ENCODER_READING={out} {gateway}"
    )
    # Not through rich, which would wrap and colour what is meant for a shell.
    typer.echo(f"exported {backbone.spec} ({backbone.dim} columns, {backbone.max_tokens} tokens) to {out}\n")
    typer.echo(f"serve it:          {' '.join(command)} --port {_PORT}")
    typer.echo(f"or without vLLM:   reward-router encoder serve {out} --port {_PORT}")
    typer.echo(f"then the gateway:  {gateway}")


@app.command("serve")
def serve(
    directory: Annotated[Path, typer.Argument(help="An exported directory.")],
    name: Annotated[str, typer.Option(help="Served name.")] = "encoder",
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen on.")] = _PORT,
    threads: Annotated[int, typer.Option(help="Threads of one forward pass.")] = 1,
) -> None:
    """Serve an exported encoder on the CPU with transformers, in the words of vLLM's /v1/embeddings."""
    from service.workers.server import run_worker

    try:
        from service.workers.embedding import embedding_app
    except ImportError as error:
        raise ConfigurationError(_NEEDS_TORCH.format(name=error.name)) from error
    run_worker(embedding_app(directory, name=name, threads=threads), host=host, port=port)


def write_export(checkpoint: Checkpoint | None, encoder: str | None, out: Path) -> TorchBackbone:
    """Export the transformer of a checkpoint, which then gets its folder `reading`, or of an encoder's name.

    Raises:
        ConfigurationError: it cannot be written, or torch is missing.
        EncoderError: it cannot be loaded, or there is no transformer.
    """
    from router_core.encoder.registry import load_backbone, split_spec
    from service.encoders.load import READING_FOLDER
    from service.encoders.reading import files_digest

    try:
        from router_core.encoder.export import export, write_reading
        from router_core.encoder.torch import TorchBackbone
    except ImportError as error:
        raise ConfigurationError(_NEEDS_TORCH.format(name=error.name)) from error
    transformer = split_spec(checkpoint.encoder_spec if checkpoint is not None else str(encoder))[1]
    backbone = load_backbone(transformer, root=checkpoint.directory if checkpoint is not None else None)
    assert isinstance(backbone, TorchBackbone)
    files = files_digest(checkpoint.encoder_files) if checkpoint is not None else ""
    try:
        export(backbone, out, files)
        if checkpoint is not None and checkpoint.directory is not None:
            write_reading(backbone, checkpoint.directory / READING_FOLDER, files)
    except OSError as error:
        raise ConfigurationError(f"{error.filename}: cannot be written ({error.strerror})") from error
    return backbone

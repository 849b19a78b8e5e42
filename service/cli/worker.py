"""`reward-router worker`: our small servers of scorers: reward models in the words of vLLM's `/classify`, and rules."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from service.errors import ConfigurationError

if TYPE_CHECKING:
    from service.workers.server import App


def worker(
    model: Annotated[
        list[str] | None,
        typer.Option(
            help="A Hugging Face directory to serve; with --recorded, the name of a recorded RM. May be repeated."
        ),
    ] = None,
    recorded: Annotated[
        Path | None,
        typer.Option(help="Answer from the scores recorded in this JSONL file, by content; 404 for the rest."),
    ] = None,
    rule: Annotated[
        str | None,
        typer.Option(help="Score by a Python function, FILE.py:NAME, or a built-in rule (docs/scorers.md)."),
    ] = None,
    judge: Annotated[
        Path | None,
        typer.Option(help="A Hugging Face directory of a generative model, served for judges (docs/judges.md)."),
    ] = None,
    options: Annotated[str | None, typer.Option(help="With --rule: options of a built-in rule, as JSON.")] = None,
    processes: Annotated[int, typer.Option(min=1, help="With --rule: responses that are scored at once.")] = 1,
    rule_seconds: Annotated[
        float, typer.Option(min=0.001, help="With --rule: longest time for one response; then its process is killed.")
    ] = 5.0,
    memory_mb: Annotated[int, typer.Option(min=64, help="With --rule: memory of one process, in MiB.")] = 1024,
    name: Annotated[
        list[str] | None, typer.Option(help="Served name of each directory (default: its last part), or of the rule.")
    ] = None,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen on.")] = 8101,
    threads: Annotated[int, typer.Option(help="Threads of one forward pass.")] = 1,
    delay_ms: Annotated[float, typer.Option(help="Recorded worker: pretend that scoring takes this long.")] = 0.0,
) -> None:
    """Serve scorers without a GPU: reward models or a judge on the CPU (transformers), recorded scores, or a rule.

    A recorded worker needs no weights: the whole service can be run against the recorded behaviour of real RMs.
    """
    from service.workers.server import run_worker

    app: App
    if rule is not None:
        if model or recorded is not None:
            raise ConfigurationError("--rule stands alone: leave --model and --recorded out, or start two workers")
        from service.workers.rules.processes import RuleConfig
        from service.workers.rules.server import RuleApp

        config = RuleConfig(
            rule=rule,
            options=_options(options),
            processes=processes,
            rule_seconds=rule_seconds,
            memory_mb=memory_mb,
        )
        app = RuleApp(config, name=(name or [rule.rpartition(":")[2]])[0])
    elif judge is not None:
        if model or recorded is not None:
            raise ConfigurationError("--judge stands alone: leave --model and --recorded out, or start two workers")
        app = _judge(judge, (name or [judge.name])[0], threads)
    elif not model:
        raise ConfigurationError("nothing to serve: give --model, --judge, or --rule")
    elif recorded is not None:
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


def _judge(directory: Path, name: str, threads: int) -> App:
    try:
        from service.workers.generating import GeneratingApp, load_generating_model
    except ImportError as error:
        raise ConfigurationError(
            f"a judge on the CPU needs torch and transformers ({error}): pip install 'reward-router[train]'"
        ) from error
    return GeneratingApp(load_generating_model(name, directory), threads=threads)


def _options(text: str | None) -> dict[str, object]:
    try:
        found = {} if text is None else json.loads(text)
    except ValueError as error:
        raise ConfigurationError(f"--options is no JSON: {error}") from error
    if not isinstance(found, dict):
        raise ConfigurationError(f"--options is {text}; give a JSON object")
    return found

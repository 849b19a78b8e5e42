"""`reward-router pin`: the commits that a pool file's branches and tags of the model hub stand for, written into it.

Knows pool files as text and asks the hub for names only; downloads nothing. Also says, for `up` and `manifests`, which
models follow a branch: their authors may change the weights, and a run could not be repeated.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Final

import httpx2
import typer
import yaml
from rich.console import Console

from service.errors import ConfigurationError
from service.pool import ModelEntry, PoolFile, load_pool
from service.scorers.vllm_entry import VllmEntry

COMMIT: Final = re.compile(r"[0-9a-f]{40}")
"""A commit's whole name; whatever else a `revision` says may come to mean another one."""

HUB_SECONDS: Final = 30.0
"""Longest wait for an answer of the hub about one model."""

NULL: Final = "tag:yaml.org,2002:null"
"""What YAML takes an empty value, `~` and `null` for."""

DEFAULT_BRANCH: Final = "main"
"""What the hub gives where no revision is named."""


def pin(
    pool: Annotated[Path, typer.Option(help="Pool file; its `revision`s are changed in place, comments stay.")],
) -> None:
    """Write the commits of today into a pool file, in the place of branches and tags of the Hugging Face hub.

    Asks the hub (HF_ENDPOINT, HF_TOKEN) for names only. Nothing is written unless every model is found.
    """
    console = Console()
    unpinned = moving(load_pool(pool))
    found = {(model.model, model.revision): look_up(model) for model in unpinned}
    # As it stands: line ends are no business of ours.
    with pool.open(encoding="utf-8", newline="") as file:
        text = file.read()
    pinned = with_revisions(text, lambda name, revision: found.get((name, revision)))
    if unpinned:
        _replace(pool, pinned)
    for model in unpinned:
        was, commit = model.revision or DEFAULT_BRANCH, found[model.model, model.revision]
        console.print(f"{model.name}: {model.model} {was} is {commit}", highlight=False, markup=False, soft_wrap=True)
    if not unpinned:
        console.print(f"{pool}: every model of the hub names a commit", highlight=False, markup=False, soft_wrap=True)


def moving(pool: PoolFile) -> list[VllmEntry]:
    """Models of the hub whose `revision` is no commit. Judges with `urls` name a model of their servers'."""
    judged = [entry for entry in pool.to_serve if not isinstance(entry, ModelEntry)]
    models = [*pool.reward_models, *judged]
    return [model for model in models if model.model is not None and not COMMIT.fullmatch(model.revision or "")]


def warn_moving(pool: PoolFile, file: Path | None) -> None:
    """One line on standard error where a model that is to be served follows a branch or tag of the hub.

    Args:
        pool: whose models without `urls` are to be served.
        file: that it was read from; None where nobody wrote one.
    """
    names = [model.name for model in moving(pool) if not model.urls]
    if names and file is not None:
        Console(stderr=True).print(
            f"warning: {', '.join(names)}: `revision` is a branch or tag of the hub, so their authors may change the "
            f"weights and with them the rewards; `reward-router pin --pool {file}` writes today's commits into it",
            highlight=False,
            markup=False,
            soft_wrap=True,
        )


def look_up(model: VllmEntry) -> str:
    """The commit that the model's `revision` stands for now.

    Raises:
        ConfigurationError: the hub does not say; names the model and the reason.
    """
    from huggingface_hub import HfApi

    revision = model.revision or DEFAULT_BRANCH
    try:
        hub = HfApi(endpoint=os.environ.get("HF_ENDPOINT"))
        commit = hub.model_info(str(model.model), revision=revision, timeout=HUB_SECONDS).sha
    # The hub's errors are OSErrors (network, 404, gated) and ValueErrors (no such name); the client's are its own.
    except (OSError, ValueError, httpx2.HTTPError) as error:
        raise ConfigurationError(
            f"model {model.name!r}: {model.model} at {revision!r} cannot be looked up (set HF_TOKEN for one that the "
            f"hub gives to some only): {error}"
        ) from error
    if commit is None or not COMMIT.fullmatch(commit):
        raise ConfigurationError(f"model {model.name!r}: the hub names no commit of {model.model} at {revision!r}")
    return commit


def with_revisions(text: str, commit_of: Callable[[str, str | None], str | None]) -> str:
    """The pool file's text with commits in it; every other character stays as it is.

    Args:
        text: YAML of a pool file.
        commit_of: (`model`, `revision`) of an entry -> its commit; None leaves the entry as it is.
    """
    edits: list[tuple[int, int, str]] = []
    root = yaml.compose(text, Loader=yaml.SafeLoader)
    models = _fields(root).get("models") if isinstance(root, yaml.MappingNode) else None
    for entry in models[1].value if models is not None else ():
        fields = _fields(entry)
        if "model" not in fields:
            continue
        key, model = fields["model"]
        revision = fields["revision"][1] if "revision" in fields else None
        # An empty value is none, and so is YAML's null.
        named = None if revision is None or revision.tag == NULL else revision.value or None
        commit = commit_of(model.value, named)
        if commit is None:
            continue
        # Quoted: a commit of digits alone would be a number.
        if revision is not None:
            start, end = revision.start_mark.index, revision.end_mark.index
            edits.append((start, end, f'"{commit}"' if end > start else f' "{commit}"'))
        else:
            line = "\r\n" if "\r\n" in text else "\n"
            between = ", " if entry.flow_style else line + " " * key.start_mark.column
            edits.append((model.end_mark.index, model.end_mark.index, f'{between}revision: "{commit}"'))
    for start, end, words in sorted(edits, reverse=True):
        text = text[:start] + words + text[end:]
    return text


def _fields(node: yaml.MappingNode) -> dict[str, tuple[yaml.ScalarNode, yaml.Node]]:
    """Key -> (its node, its value's)."""
    return {key.value: (key, value) for key, value in node.value}


def _replace(file: Path, text: str) -> None:
    """The file with another text, whole or not at all; links to it stay, and its permissions, for it may hold keys."""
    file = file.resolve()
    new = file.with_name(f".{file.name}.pinned")
    try:
        new.touch(mode=file.stat().st_mode & 0o777)
        new.write_text(text, "utf-8", newline="")
        try:
            left = [model.name for model in moving(load_pool(new))]
        except ConfigurationError:
            left = [model.name for model in moving(load_pool(file))]
        if left:
            # The entry is written with an alias, a merge or a block of YAML's, say.
            names = " or ".join(map(repr, left))
            raise ConfigurationError(
                f"pool file {file}: where the `revision` of {names} stands is not clear; write it by hand"
            )
        new.replace(file)
    except OSError as error:
        raise ConfigurationError(f"pool file {file} cannot be written: {error.strerror}") from error
    finally:
        new.unlink(missing_ok=True)

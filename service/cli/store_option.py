"""The option `--store` of every command that takes one: also an environment variable, where a password belongs."""

from __future__ import annotations

from typing import Any
from urllib.parse import parse_qs, urlsplit

import typer

STORE_VARIABLE = "REWARD_ROUTER_STORE_URL"
"""Environment variable that names the store where `--store` does not."""


def holds_password(url: str) -> bool:
    """Return True if a store's URL holds a secret: the account's password, or that of a certificate's key."""
    parts = urlsplit(url)
    account = parts.netloc.rpartition("@")[0]
    return ":" in account or not {"password", "ssl_password"}.isdisjoint(parse_qs(parts.query))


def _warn(context: typer.Context, parameter: typer.CallbackParam, url: str | None) -> str | None:
    """Warn of a password in the command line; return the URL as it is."""
    # By name: some versions of typer bring their own click, with an enumeration of its own.
    source = context.get_parameter_source(parameter.name or "")
    typed = source is not None and source.name == "COMMANDLINE"
    if url is not None and typed and holds_password(url):
        typer.echo(
            "warning: --store holds a password, which every user of this machine can read in the list of processes: "
            f"set {STORE_VARIABLE} instead",
            err=True,
        )
    return url


def store_option(*, variable: bool = True) -> Any:
    """The option, for `typing.Annotated`; `variable` if the environment may name the store too."""
    return typer.Option(
        help="URL of redis://, rediss://, unix:// or redis+cluster://, or `embedded` (default). With a password, "
        "give it in the environment variable.",
        envvar=STORE_VARIABLE if variable else None,
        callback=_warn,
    )

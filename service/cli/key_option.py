"""The option `--api-key` of every command that calls a gateway: an environment variable too, where keys belong."""

from __future__ import annotations

from typing import Any, Final

import typer

KEY_VARIABLE: Final = "REWARD_ROUTER_API_KEY"
"""Environment variable from which the commands read their key."""

CLIENT_KEY_VARIABLE: Final = "REWARD_ROUTER_CLIENT_API_KEY"
"""The one that trainers' helpers read; the commands do too where the other is not set."""


def key_option(words: str = "Key of the gateway.") -> Any:
    """The option, for `typing.Annotated`."""
    return typer.Option(help=words, envvar=[KEY_VARIABLE, CLIENT_KEY_VARIABLE], show_default=False)

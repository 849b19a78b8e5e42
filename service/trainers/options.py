"""What a trainer says once: where the gateway is, which run, how long to wait.

Knows the names of the environment variables, for trainers that can be told a file's path and nothing else; reads the
environment only when asked. `client` and every helper take a `ClientOptions`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

PREFIX = "REWARD_ROUTER_CLIENT_"

VARIABLES = ("url", "run", "policy", "signal", "api_key", "deadline_seconds", "attempt_seconds", "normalize")
"""Options that `from_environment` reads, each from `REWARD_ROUTER_CLIENT_` and its name in capitals."""


@dataclass(frozen=True, slots=True)
class ClientOptions:
    """Options of one client.

    Args:
        url: of the gateway, or of what stands in front of several.
        run: name of the training run; None for the gateway's default. Runs never share what they learn.
        policy: overrides the gateway's policy; see `docs/api.md`.
        signal: kind of feedback that will be sent: preference, reward or loss. A new run gets it; a run that has
            another one refuses. None: the run's, or the gateway's.
        api_key: sent as `Authorization: Bearer`.
        deadline_seconds: longest time of one call of the client, all tries together.
        attempt_seconds: longest wait for one answer; above the gateway's own `request_timeout_seconds`.
        normalize: ask for rewards on a common scale; None leaves the field out.
        max_items: instances per request.
        max_bytes: of text per request; the gateway takes 8 MiB.
        connections: requests in flight at once.
        trust_env: obey HTTP_PROXY and the like. Off, because reward servers are seldom behind a proxy and the hosts of
            trainers often have one.

    Raises:
        ValueError: a number that is not positive, or a URL without a scheme.
    """

    url: str = "http://127.0.0.1:8080"
    run: str | None = None
    policy: str | None = None
    signal: str | None = None
    api_key: str | None = None
    deadline_seconds: float = 120.0
    attempt_seconds: float = 30.0
    normalize: bool | None = None
    max_items: int = 128
    max_bytes: int = 4 << 20
    connections: int = 32
    trust_env: bool = False

    def __post_init__(self) -> None:
        if not self.url.startswith(("http://", "https://")):
            raise ValueError(f"url is {self.url!r}: give one that begins with http:// or https://")
        for name in ("deadline_seconds", "attempt_seconds", "max_items", "max_bytes", "connections"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} is {getattr(self, name)}: give a positive number")

    def __repr__(self) -> str:
        """Without the key: options end up in logs."""
        shown = ", ".join(f"{f.name}={getattr(self, f.name)!r}" for f in fields(self) if f.name != "api_key")
        return f"ClientOptions({shown}, api_key={'None' if self.api_key is None else '...'})"


def from_environment(environment: Mapping[str, str], **overrides: Any) -> ClientOptions:
    """Options from `REWARD_ROUTER_CLIENT_URL` and so on (`VARIABLES`), and whatever the caller adds.

    Args:
        environment: usually `os.environ`.
        overrides: options that win over the environment; None is as if not given.

    Raises:
        ValueError: an unknown option, or a variable that is no number or no truth value; names it.

    >>> from_environment({"REWARD_ROUTER_CLIENT_URL": "http://router:8080"}, run="r1").url
    'http://router:8080'
    """
    unknown = sorted(set(overrides) - {f.name for f in fields(ClientOptions)})
    if unknown:
        raise ValueError(f"{', '.join(unknown)}: no such option; there are {', '.join(ClientOptions.__slots__)}")
    found: dict[str, Any] = {}
    for name in VARIABLES:
        text = environment.get(PREFIX + name.upper())
        if text:
            found[name] = _parse(name, text)
    return ClientOptions(**{**found, **{name: value for name, value in overrides.items() if value is not None}})


def _parse(name: str, text: str) -> object:
    if name.endswith("_seconds"):
        try:
            return float(text)
        except ValueError as error:
            raise ValueError(f"{PREFIX}{name.upper()} is {text!r}: give seconds, such as 60") from error
    if name == "normalize":
        words = {"1": True, "true": True, "0": False, "false": False}
        if text.lower() not in words:
            raise ValueError(f"{PREFIX}NORMALIZE is {text!r}: give true or false")
        return words[text.lower()]
    return text

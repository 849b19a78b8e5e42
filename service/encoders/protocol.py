"""What the use cases know of an encoder that must be awaited: instances in, contexts and the time they took out.

`service.encoders.remote` implements it; an encoder that computes in this process is a
`router_core.encoder.fuse.PairEncoder` instead, and runs in the chooser's thread.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from router_core.records import Instance
from service.errors import ServiceError, ValidationError
from service.scorers.transport.replica import Request


class EncoderUnavailableError(ServiceError):
    """The encoder's server gave no usable answer: away, late, or not the model that was asked for."""

    status = 503
    code = "encoder_unavailable"


class EncoderInputError(ValidationError):
    """The encoder fails on some instances, and answers others.

    Attributes:
        places: those instances, by their place in what was to be encoded.
    """

    places: frozenset[int] = frozenset()


@dataclass(frozen=True, slots=True, eq=False)
class Encoded:
    """Contexts of some instances.

    Attributes:
        x: (B, d) float32.
        seconds: from the call to the contexts, waiting included.
    """

    x: NDArray[np.float32]
    seconds: float


@dataclass(frozen=True, slots=True)
class ServerStatus:
    """One server of the encoder, as operators see it.

    Attributes:
        url: its origin.
        up: it is asked.
        problem: why its answers rule it out; None while they do not.
    """

    url: str
    up: bool
    problem: str | None


class AwaitedEncoder(ABC):
    """An encoder whose contexts come over a network. Many calls may be under way; none waits for another's stage."""

    @property
    @abstractmethod
    def spec(self) -> str:
        """The backbone's spec: the same as of the encoder that computes here."""

    @property
    @abstractmethod
    def d(self) -> int:
        """Columns of x."""

    @abstractmethod
    async def encode(self, instances: Sequence[Instance]) -> Encoded:
        """Contexts of the instances, in order.

        Raises:
            EncoderUnavailableError: no server gave a usable answer in time.
            EncoderInputError: some instances cannot be encoded; the others can.
        """

    @property
    @abstractmethod
    def available(self) -> bool:
        """Return True if a server can be asked now."""

    def intercept(self, wrap: Callable[[str, Request], Request]) -> None:  # noqa: B027 - nothing to do is an answer
        """Send requests through what `wrap` makes of a server's URL and its way of sending; nothing where none are."""

    @abstractmethod
    def servers(self) -> list[ServerStatus]:
        """Each server's state."""

    @abstractmethod
    async def start(self) -> None:
        """Probe the servers, and go on checking them in the background."""

    @abstractmethod
    async def close(self) -> None:
        """Stop checking and close connections; what is in flight fails."""

"""An encoder in two halves, so that its transformer may run elsewhere: everything before its states, everything after.

Knows texts, token ids, local backbones and the fuse; nothing of where states come from or how long that takes.
`service.encoders` reads token ids off `prepare`, asks a server for the states, and hands them to `finish`;
`encoder.fuse.PairEncoder` is the same mathematics in one call, with the transformer at hand.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from router_core.encoder.base import Backbone, Block
from router_core.encoder.fuse import Fuse, two_branch
from router_core.errors import EncoderError
from router_core.records import Instance


class TransformerReader(Protocol):
    """What is left of a transformer backbone when its weights are elsewhere: how it reads a text."""

    @property
    def spec(self) -> str:
        """As the whole backbone's."""

    @property
    def dim(self) -> int:
        """Columns of a state."""

    @property
    def blocks(self) -> tuple[Block, ...]:
        """As the whole backbone's."""

    def token_ids(self, conversations: Sequence[tuple[str, str]]) -> list[list[int]]:
        """What the transformer reads of each (prompt, response); no list is empty.

        Raises:
            EncoderError: a text cannot be read.
        """


@dataclass(frozen=True, slots=True, eq=False)
class Prepared:
    """Some instances on their way: what is known before the transformer was asked. N responses in all.

    Attributes:
        sizes: responses of each instance; they sum to N.
        before: (N, columns left of the transformer's) float32.
        after: (N, columns right of the transformer's) float32.
        ids: token ids of the N conversations.
    """

    sizes: tuple[int, ...]
    before: NDArray[np.float32]
    after: NDArray[np.float32]
    ids: list[list[int]]


class SplitEncoder:
    """The contexts of `PairEncoder`, with the states of its one transformer handed in. Holds nothing that changes.

    Args:
        before: backbones whose columns stand left of the transformer's.
        reader: the transformer's.
        after: backbones whose columns stand right of the transformer's.
        fuse: what makes one vector of a group.
        spec: the whole backbone's; by default the parts' specs joined by `+`.

    Raises:
        EncoderError: the fuse was made for another width.
    """

    def __init__(
        self,
        before: Sequence[Backbone],
        reader: TransformerReader,
        after: Sequence[Backbone],
        fuse: Fuse,
        spec: str | None = None,
    ) -> None:
        self._before, self._after = tuple(before), tuple(after)
        self._reader = reader
        self._fuse = fuse
        parts: list[Backbone | TransformerReader] = [*self._before, reader, *self._after]
        self.spec = spec or "+".join(part.spec for part in parts)
        self.input_dim = sum(part.dim for part in parts)
        if fuse.input_dim != self.input_dim:
            raise EncoderError(
                f"the fuse takes {fuse.input_dim} columns, encoder {self.spec!r} gives {self.input_dim}; "
                "use the encoder that the checkpoint was trained with, or train again"
            )

    @property
    def d(self) -> int:
        """Columns of x."""
        return self._fuse.d

    @property
    def state_dim(self) -> int:
        """Columns of the transformer's states."""
        return self._reader.dim

    def prepare(self, instances: Sequence[Instance]) -> Prepared:
        """Token ids for the transformer, and the columns of every other backbone.

        Raises:
            EncoderError: an instance has no response.
        """
        for position, instance in enumerate(instances):
            if not instance.responses:
                raise EncoderError(f"instances[{position}].responses is empty; give at least one response")
        conversations = [(instance.prompt, response) for instance in instances for response in instance.responses]
        return Prepared(
            tuple(len(instance.responses) for instance in instances),
            _columns(self._before, conversations),
            _columns(self._after, conversations),
            self._reader.token_ids(conversations),
        )

    def finish(self, prepared: Prepared, states: NDArray[np.float32]) -> NDArray[np.float32]:
        """Contexts of the prepared instances: (B, d) float32, rows as `PairEncoder.encode` gives them.

        Args:
            prepared: of these instances.
            states: (N, state_dim) float32, the transformer's states of `prepared.ids`, in order.

        Raises:
            EncoderError: another shape, NaN or infinity.
        """
        expected = (len(prepared.ids), self.state_dim)
        if states.shape != expected:
            raise EncoderError(f"encoder {self.spec!r}: states have shape {states.shape}, expected {expected}")
        if not np.isfinite(states).all():
            raise EncoderError(f"encoder {self.spec!r} gave NaN or infinity; check its weights and its precision")
        h = np.concatenate([prepared.before, states, prepared.after], axis=1)
        return self._fuse.apply(two_branch(h, prepared.sizes))


def _columns(parts: Sequence[Backbone], conversations: Sequence[tuple[str, str]]) -> NDArray[np.float32]:
    """(N, sum of dims) float32."""
    if not parts:
        return np.zeros((len(conversations), 0), dtype=np.float32)
    return np.concatenate([part.embed(conversations) for part in parts], axis=1)

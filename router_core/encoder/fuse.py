"""From the vectors of a group's responses to the group's context x: unit-norm, the same in any order of responses.

Knows two small dense layers in numpy; knows no backbone, no torch, no posterior. The offline stage learns the weights,
`router_core.checkpoint` stores them, the service calls `PairEncoder`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from router_core.encoder.base import Backbone
from router_core.errors import EncoderError, ShapeMismatchError
from router_core.records import Instance

CONTEXT_LIMIT = 3.0
"""Largest coordinate of a context, in standard deviations of the training pairs."""

IDENTITY_DIM = 128
"""Default d of `Fuse.identity`: a random projection to 128 keeps distances within about 15 % for thousands of texts."""


def two_branch(h: NDArray[np.floating], group_sizes: Sequence[int]) -> NDArray[np.float32]:
    """The responses' mean, and twice their mean absolute deviation from it, side by side.

    z_g = [m_g ; (2/n_g) Σ_i |h_i − m_g|] with m_g = (1/n_g) Σ_i h_i. For n = 2 the second half is |h_a − h_b|, the
    paper's comparative branch (arXiv 2510.02850, section 3). For n = 1 it is NaN: how far other responses would lie is
    not known, and 0 would be nearer than those of any pair.

    Args:
        h: (N, dim) float, rows of one group adjacent.
        group_sizes: (B,) sizes >= 1 that sum to N.

    Returns:
        (B, 2 * dim) float32.

    Raises:
        ShapeMismatchError: a size is below 1, or the sizes do not sum to N.

    >>> two_branch(np.array([[1.0, 4.0], [3.0, 0.0]]), [2])
    array([[2., 2., 2., 4.]], dtype=float32)
    """
    sizes = np.asarray(group_sizes, dtype=np.int64)
    if h.ndim != 2 or sizes.ndim != 1 or (sizes < 1).any() or sizes.sum() != len(h):
        raise ShapeMismatchError(
            f"group_sizes {list(group_sizes)[:8]} do not cut h of shape {h.shape} into groups of at least one row"
        )
    if not len(sizes):
        return np.zeros((0, 2 * h.shape[1]), dtype=np.float32)
    h = h.astype(np.float32, copy=False)
    if (sizes == 2).all():
        a, b = h[0::2], h[1::2]
        return np.concatenate([(a + b) / 2, np.abs(a - b)], axis=1)
    starts = np.cumsum(sizes) - sizes
    count = sizes[:, None].astype(np.float32)
    mean = np.add.reduceat(h, starts, axis=0) / count
    deviation = np.add.reduceat(np.abs(h - np.repeat(mean, sizes, axis=0)), starts, axis=0)
    deviation[sizes == 1] = np.nan
    return np.concatenate([mean, 2 * deviation / count], axis=1)


@dataclass(frozen=True, slots=True, eq=False)
class Kernel:
    """e = Σ_a exp(−‖s∘u − a‖) w_a: what was seen of each RM on the training pairs most like this one, above its mean.

    Fields: reach (p,) s, anchors (L, p) training pairs' s∘u, weights (L, K), all float32. Fitted by `offline.kernel`.
    """

    reach: NDArray[np.float32]
    anchors: NDArray[np.float32]
    weights: NDArray[np.float32]
    _squares: NDArray[np.float32] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        """Raises ShapeMismatchError if the arrays do not fit each other."""
        if self.anchors.shape != (len(self.weights), len(self.reach)) or not self.weights.size:
            raise ShapeMismatchError(
                f"fuse.kernel: reach {self.reach.shape}, anchors {self.anchors.shape} and weights "
                f"{self.weights.shape} must be (p,), (L, p) and (L, K)"
            )
        object.__setattr__(self, "_squares", np.square(self.anchors).sum(axis=1))

    def apply(self, u: NDArray[np.float32]) -> NDArray[np.float32]:
        """(B, p) to (B, K) float32. O(L p) for a row."""
        rows = u * self.reach
        squares = np.square(rows).sum(axis=1, keepdims=True) + self._squares - 2.0 * (rows @ self.anchors.T)
        seen: NDArray[np.float32] = np.exp(-np.sqrt(np.maximum(squares, 0.0))) @ self.weights
        return seen


@dataclass(frozen=True, slots=True, eq=False)
class Fuse:
    """x = [f ; e ; c]: learned features f, what a kernel says e, and a low-rank context c for the online residual.

    u = clip((z − shift) P, ±limit), z from `two_branch`, its second half the shift's where it is unknown
    f = normalise([g_1 ; … ; g_M] R),  g_m = normalise(W₂ₘᵀ tanh(W₁ₘᵀ u + c₁ₘ) + c₂ₘ)
    e = kernel(u)
    c = normalise([1 ; clip(uᵀV, ±3) / √q])

    P (2·dim, p) standardises measured features and projects dense ones on their leading directions; the limit keeps a
    text unlike any that P was fitted on from saturating everything else. The M members are independent fits of the same
    small network; R keeps the leading directions of all of them. V whitens u on its q leading directions. Without R, f
    is the members side by side; without V, x is f alone, as in the paper (arXiv 2510.02850).

    Fields: shift (2·dim,), projection (2·dim, p), w1 (p, M·h), b1 (M·h,), w2 (M·h, m), b2 (M·m,), rotation (M·m, r),
    context (p, q), all float32. M is len(b2)/m.
    """

    shift: NDArray[np.float32]
    projection: NDArray[np.float32]
    w1: NDArray[np.float32]
    b1: NDArray[np.float32]
    w2: NDArray[np.float32]
    b2: NDArray[np.float32]
    rotation: NDArray[np.float32] | None = None
    context: NDArray[np.float32] | None = None
    kernel: Kernel | None = None
    limit: float = 5.0

    def __post_init__(self) -> None:
        """Raises ShapeMismatchError if the layers do not fit each other."""
        p, hidden, m, out = self.projection.shape[1], self.w1.shape[1], self.w2.shape[1], self.b2.shape[0]
        expected: dict[str, tuple[int, ...]] = {
            "shift": (self.projection.shape[0],),
            "w1": (p, hidden),
            "b1": (hidden,),
            "w2": (hidden, m),
            "b2": (max(out // max(m, 1), 1) * m,),
        }
        if self.rotation is not None:
            expected["rotation"] = (out, self.rotation.shape[1])
        if self.context is not None:
            expected["context"] = (p, self.context.shape[1])
        if self.kernel is not None and len(self.kernel.reach) != p:
            raise ShapeMismatchError(f"fuse.kernel reads {len(self.kernel.reach)} inputs, the projection makes {p}")
        for name, shape in expected.items():
            if getattr(self, name).shape != shape:
                raise ShapeMismatchError(f"fuse.{name} has shape {getattr(self, name).shape}, expected {shape}")
        if hidden % self.members:
            raise ShapeMismatchError(f"fuse.w1 has {hidden} columns, which {self.members} members cannot share")

    @property
    def members(self) -> int:
        """M, networks side by side."""
        return int(self.b2.shape[0] // self.w2.shape[1])

    @property
    def input_dim(self) -> int:
        """Columns of the backbone that it fits."""
        return int(self.projection.shape[0]) // 2

    @property
    def learned(self) -> int:
        """r, columns of f, the leading ones of x: what the Bradley-Terry head reads, and the paper's posterior."""
        return int(self.b2.shape[0] if self.rotation is None else self.rotation.shape[1])

    @property
    def features(self) -> int:
        """Columns of [f ; e], the leading ones of x: what the correctness head reads."""
        return self.learned + (0 if self.kernel is None else self.kernel.weights.shape[1])

    @property
    def d(self) -> int:
        """Columns of x."""
        return self.features + (0 if self.context is None else 1 + self.context.shape[1])

    @classmethod
    def identity(cls, input_dim: int, d: int = IDENTITY_DIM, seed: int = 0) -> Fuse:
        """An untrained fuse: a seeded random projection, for runs that start with no checkpoint.

        tanh works near zero, where it is the identity, so distances between groups survive up to scale.
        """
        rng = np.random.default_rng(seed)
        projection = rng.standard_normal((2 * input_dim, d), dtype=np.float32) / np.sqrt(2 * input_dim)
        return cls(
            shift=np.zeros(2 * input_dim, dtype=np.float32),
            projection=projection.astype(np.float32),
            w1=0.1 * np.eye(d, dtype=np.float32),
            b1=np.zeros(d, dtype=np.float32),
            w2=np.eye(d, dtype=np.float32),
            b2=np.zeros(d, dtype=np.float32),
        )

    def standardise(self, z: NDArray[np.float32]) -> NDArray[np.float32]:
        """u = clip((z − shift) P, ±limit): (B, 2·dim) to (B, p) float32; an unknown deviation is the shift's."""
        centred = z - self.shift
        alone = np.isnan(centred[:, -1])
        if alone.any():
            centred[alone, self.input_dim :] = 0.0
        u: NDArray[np.float32] = np.clip(centred @ self.projection, -self.limit, self.limit)
        return u

    def apply(self, z: NDArray[np.float32]) -> NDArray[np.float32]:
        """x for every row of z; a zero feature vector becomes the first unit vector.

        Args:
            z: (B, 2 * input_dim) float32, finite but for unknown deviations.

        Returns:
            (B, d) float32; f and c of a row have norm 1 each.

        Raises:
            ShapeMismatchError: z has another width.
        """
        if z.ndim != 2 or z.shape[1] != 2 * self.input_dim:
            raise ShapeMismatchError(f"z has shape {z.shape}, expected (B, {2 * self.input_dim})")
        u = self.standardise(z)
        features = self._learned(u)
        if self.kernel is not None:
            features = np.concatenate([features, self.kernel.apply(u)], axis=1)
        if self.context is None:
            return features
        position = np.clip(u @ self.context, -CONTEXT_LIMIT, CONTEXT_LIMIT) / np.float32(self.context.shape[1] ** 0.5)
        constant = np.ones((len(u), 1), dtype=np.float32)
        return np.concatenate([features, _unit(np.concatenate([constant, position], axis=1))], axis=1)

    def members_of(self, u: NDArray[np.float32]) -> NDArray[np.float32]:
        """(B, p) to (B, M·m): the members' unit vectors side by side, over √M so that the whole has norm 1."""
        M, (hidden, m) = self.members, self.w2.shape
        h = np.tanh(u @ self.w1 + self.b1)
        if M == 1:
            return _unit(h @ self.w2 + self.b2)
        out = h.reshape(len(u), M, hidden // M).transpose(1, 0, 2) @ self.w2.reshape(M, hidden // M, m)
        out += self.b2.reshape(M, 1, m)
        unit = _unit(out.transpose(1, 0, 2).reshape(-1, m)).reshape(len(u), M * m)
        scaled: NDArray[np.float32] = unit / np.float32(M**0.5)
        return scaled

    def _learned(self, u: NDArray[np.float32]) -> NDArray[np.float32]:
        members = self.members_of(u)
        return members if self.rotation is None else _unit(members @ self.rotation)


def _unit(rows: NDArray[np.float32]) -> NDArray[np.float32]:
    """Rows of norm 1; a row of zeros becomes the first unit vector."""
    norm = np.linalg.norm(rows, axis=1, keepdims=True)
    zero = norm[:, 0] == 0.0
    if zero.any():
        rows = rows.copy()
        rows[zero] = np.eye(1, rows.shape[1], dtype=np.float32)
        norm[zero] = 1.0
    unit: NDArray[np.float32] = (rows / norm).astype(np.float32, copy=False)
    return unit


class PairEncoder:
    """Instances to contexts: one backbone call for all responses of all groups, then the fuse.

    Holds nothing that changes, so it is as safe for threads as its backbone.
    """

    def __init__(self, backbone: Backbone, fuse: Fuse) -> None:
        """Raises EncoderError if the fuse was made for a backbone of another width."""
        if fuse.input_dim != backbone.dim:
            raise EncoderError(
                f"the fuse takes {fuse.input_dim} columns, encoder {backbone.spec!r} gives {backbone.dim}; "
                "use the encoder that the checkpoint was trained with, or train again"
            )
        self._backbone = backbone
        self._fuse = fuse

    @property
    def spec(self) -> str:
        """The backbone's spec."""
        return self._backbone.spec

    @property
    def d(self) -> int:
        """Columns of x."""
        return self._fuse.d

    def encode(self, instances: Sequence[Instance]) -> NDArray[np.float32]:
        """Contexts of the instances.

        Returns:
            (B, d) float32, rows as `Fuse.apply` makes them; (0, d) for no instances.

        Raises:
            EncoderError: an instance has no response, or the backbone gave NaN or infinity.
        """
        for position, instance in enumerate(instances):
            if not instance.responses:
                raise EncoderError(f"instances[{position}].responses is empty; give at least one response")
        conversations = [(instance.prompt, response) for instance in instances for response in instance.responses]
        h = self._backbone.embed(conversations)
        if not np.isfinite(h).all():
            raise EncoderError(f"encoder {self.spec!r} gave NaN or infinity; check its weights")
        return self._fuse.apply(two_branch(h, [len(instance.responses) for instance in instances]))

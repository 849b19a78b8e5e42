"""What the offline stage hands to the online stage: fuse, prior means, correctness heads, on disk as two checked files.

Knows numpy, safetensors and JSON; no torch, no backbone, no network. Written by `router_core.offline`, read once at
start-up by `service.gateway`, and by replay.

A checkpoint is a directory:

    weights.safetensors   float32 tensors: fuse.*, bt_embeddings, cls_*, calibration_*, score_*, landmark_positions,
                          votes_*, practice_*
    metadata.json         pool, encoder, prior form, hyper-parameters, metrics, provenance, and the digest of all that
    backbone/             the fine-tuned transformer, where there is one; its files' digests stand in the metadata

Other files there (a model card, a figure) are nobody's business here.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
from numpy.typing import NDArray
from safetensors.numpy import load as load_tensors
from safetensors.numpy import save as save_tensors

from router_core.combine import Combination, Multipliers, Practice, Votes
from router_core.encoder.fuse import Fuse, Kernel
from router_core.errors import CheckpointError, HyperparameterError, NotFiniteError, ShapeMismatchError
from router_core.novelty import Landmarks
from router_core.policies.scale import ScoreScale
from router_core.prior import CALIBRATED_HYPERPARAMETERS, Hyperparameters, PriorForm

FORMAT_VERSION = 3
"""Raised when an older reader could misread a newer file."""
WEIGHTS_FILE = "weights.safetensors"
METADATA_FILE = "metadata.json"

_ARM_TENSORS = ("bt_embeddings", "cls_weight", "cls_bias", "calibration_scale", "calibration_shift")
_FUSE_TENSORS = ("shift", "projection", "w1", "b1", "w2", "b2")
_OPTIONAL_FUSE_TENSORS = ("rotation", "context")
_KERNEL = ("reach", "anchors", "weights")
_SCORE_TENSORS = ("score_shift", "score_scale")
_LANDMARKS = "landmark_positions"
_LEVEL = "calibration_level"
_VOTES = ("votes_weights", "votes_deviations", "votes_margins", "votes_level")
_MULTIPLIERS = ("votes_budgets", "votes_multipliers")
_PRACTICE = ("practice_offsets", "practice_verdicts", "practice_margins", "practice_responses")


@dataclass(frozen=True, slots=True, eq=False)
class Checkpoint:
    """A trained offline stage for one pool and one encoder; K arms, l learned features, r with what the kernel says.

    Fields:
        pool: K names, in the order of every per-arm array.
        encoder_spec: what `encoder.registry.load_backbone` takes.
        fuse: backbone vectors to x, whose first l columns are learned, and first r the features f.
        bt_embeddings: (K, l), unit-norm; their product with the first l of f is the Bradley-Terry score of arm k.
        cls_weight, cls_bias: (K, r), (K,); the logit of "arm k is right" before calibration is w_kᵀf + b_k.
        calibration_scale, calibration_shift: (K,), (K,), from held-out pairs; the calibrated logit is
            scale_k (w_kᵀf + b_k) + shift_k + cᵀQc.
        calibration_level: Q (q, q) symmetric, with q the columns of the low-rank context c; None for 0.
        prior_form: which prior the run should use unless told otherwise.
        hyperparameters: of the online posterior.
        metrics: held-out figures of the training, by name.
        data_digest: `dataset.pairs_digest` of the training pairs; "" if there were none.
        created_by: name and version of the program that wrote it.
        encoder_files: SHA-256 (hex) of each file of a fine-tuned backbone, by path inside the checkpoint; empty where
            the encoder is one that every installation has.
        directory: where those files lie; set by `load`, and no part of what the checkpoint is.
        score_shift, score_scale: (K,), (K,), mean and standard deviation of each RM's raw rewards on the training
            pairs, for what combines several RMs' rewards; None where the pairs held no scores.
        landmarks: where the training pairs lie, from which texts unlike them are told; None where it is not known.
        votes: what the answers of several arms say together; None where there were too few pairs to learn it.
        multipliers: what a budget makes of a call's price at the start; None without votes, and for a part of the pool.
        practice: pairs that multipliers of a part of the pool, or of other prices, are found on; None without votes.
    """

    pool: tuple[str, ...]
    encoder_spec: str
    fuse: Fuse
    bt_embeddings: NDArray[np.float32]
    cls_weight: NDArray[np.float32]
    cls_bias: NDArray[np.float32]
    calibration_scale: NDArray[np.float32]
    calibration_shift: NDArray[np.float32]
    calibration_level: NDArray[np.float32] | None = None
    prior_form: PriorForm = PriorForm.CALIBRATED
    hyperparameters: Hyperparameters = CALIBRATED_HYPERPARAMETERS
    metrics: Mapping[str, float] = field(default_factory=dict)
    data_digest: str = ""
    created_by: str = field(default_factory=lambda: f"reward-router {_version()}")
    encoder_files: Mapping[str, str] = field(default_factory=dict)
    directory: Path | None = None
    score_shift: NDArray[np.float32] | None = None
    score_scale: NDArray[np.float32] | None = None
    landmarks: Landmarks | None = None
    votes: Votes | None = None
    multipliers: Multipliers | None = None
    practice: Practice | None = None

    def __post_init__(self) -> None:
        """Raises CheckpointError if a shape, a number or the pool cannot be."""
        K, r = len(self.pool), self.fuse.features
        widths = {"bt_embeddings": (K, self.fuse.learned), "cls_weight": (K, r)}
        if not K or len(set(self.pool)) != K:
            raise CheckpointError(f"pool = {list(self.pool)}: needs at least one name, each once")
        if self.prior_form not in (PriorForm.PAPER, PriorForm.CALIBRATED):
            raise CheckpointError(
                f"prior_form = {self.prior_form.value!r}: a checkpoint holds a prior; choose 'paper' or 'calibrated'"
            )
        for name in _ARM_TENSORS:
            array = getattr(self, name)
            expected = widths.get(name, (K,))
            if array.shape != expected:
                raise CheckpointError(
                    f"{name} has shape {array.shape}, expected {expected} for {K} arms and {expected[-1]} features"
                )
        width = self.d - r
        if self.calibration_level is not None and self.calibration_level.shape != (width, width):
            raise CheckpointError(
                f"calibration_level has shape {self.calibration_level.shape}, expected {(width, width)} for the "
                f"{width} columns of the fuse's context; train again"
            )
        if (self.score_shift is None) != (self.score_scale is None):
            raise CheckpointError("score_shift and score_scale: give both, or none")
        for name in _SCORE_TENSORS:
            array = getattr(self, name)
            if array is not None and (array.shape != (K,) or (name == "score_scale" and not (array > 0).all())):
                raise CheckpointError(f"{name}: must be ({K},), and a scale positive; train again")
        if self.landmarks is not None and self.landmarks.positions.shape[1] != self.d - self.fuse.features - 1:
            raise CheckpointError(
                f"landmarks have {self.landmarks.positions.shape[1]} columns and the fuse's context "
                f"{self.d - self.fuse.features - 1} besides its constant; train again"
            )
        if self.votes is not None and self.votes.n_arms != K:
            raise CheckpointError(f"votes are of {self.votes.n_arms} arms, the pool has {K}; train again")
        if self.practice is not None and self.practice.offsets.shape[1] != K:
            raise CheckpointError(
                f"practice pairs are of {self.practice.offsets.shape[1]} arms, the pool has {K}; train again"
            )
        for name, array in self._tensors().items():
            if array.dtype != np.float32 or not np.isfinite(array).all():
                raise CheckpointError(f"{name}: must be finite float32 (is {array.dtype}); train again")

    @property
    def d(self) -> int:
        """Columns of x."""
        return self.fuse.d

    def columns(self, form: PriorForm) -> tuple[int, int]:
        """First column of x and number of columns that the posterior of that prior form reads.

        The paper's form reads the learned features; the others the low-rank context, where the fuse makes one.
        """
        features = self.fuse.features
        if form is PriorForm.PAPER or features == self.d:
            return 0, self.fuse.learned
        return features, self.d - features

    @property
    def scores(self) -> ScoreScale | None:
        """How each RM's raw rewards come on one scale."""
        if self.score_shift is None or self.score_scale is None:
            return None
        return ScoreScale(self.score_shift.astype(np.float64), self.score_scale.astype(np.float64))

    @property
    def digest(self) -> str:
        """SHA-256 (hex) over tensors and metadata: equal digests, equal behaviour."""
        return _digest(save_tensors(self._tensors()), self._metadata())

    def class_probabilities(self, x: NDArray[np.floating]) -> NDArray[np.float64]:
        """o_k(x) = 1 / (1 + exp(−scale_k (w_kᵀf + b_k) − shift_k − cᵀQc)): probability that arm k is right.

        Args:
            x: (B, d) contexts; f is their first r columns, c the others.

        Returns:
            (B, K) float64 inside (0, 1).

        Raises:
            ShapeMismatchError: x has another width.
        """
        logits = (
            self.calibration_scale * (self._features(x) @ self.cls_weight.T + self.cls_bias) + self.calibration_shift
        )
        if self.calibration_level is not None:
            c = x[:, self.fuse.features :]
            logits = logits + ((c @ self.calibration_level) * c).sum(axis=1, keepdims=True)
        # exp(30) is far inside float64 and sigmoid(30) differs from 1 by 1e-13: the bound only prevents overflow.
        probabilities: NDArray[np.float64] = 1.0 / (1.0 + np.exp(-np.clip(logits.astype(np.float64), -30.0, 30.0)))
        return probabilities

    def bt_scores(self, x: NDArray[np.floating]) -> NDArray[np.float64]:
        """fᵀe_k for each context and arm: (B, d) to (B, K) float64; only differences between arms mean anything."""
        return np.asarray(self._features(x)[:, : self.fuse.learned] @ self.bt_embeddings.T, dtype=np.float64)

    def require_pool(self, names: Sequence[str]) -> None:
        """Raises CheckpointError unless `names` is this pool, in this order."""
        if tuple(names) != self.pool:
            raise CheckpointError(
                f"the checkpoint was trained for pool {list(self.pool)}, the run asks for {list(names)}; "
                "list the same names in the same order, use select_pool for a subset, or train for this pool"
            )

    def require_encoder(self, spec: str, dim: int) -> None:
        """Raises CheckpointError unless a backbone of this spec and dim is the one trained with."""
        if spec != self.encoder_spec or dim != self.fuse.input_dim:
            raise CheckpointError(
                f"the checkpoint was trained with encoder {self.encoder_spec!r} ({self.fuse.input_dim} columns), "
                f"the run has {spec!r} ({dim}); set the encoder to {self.encoder_spec!r} or train with {spec!r}"
            )

    @property
    def combination(self) -> Combination | None:
        """What the checkpoint knows about votes, at equal prices; None where there were too few pairs to learn it."""
        return None if self.votes is None else Combination(self.votes, self.multipliers, self.practice).priced()

    def select_pool(self, names: Sequence[str]) -> Checkpoint:
        """The checkpoint restricted to these arms, in this order. Metrics are dropped: they held for the whole pool.

        Raises:
            CheckpointError: a name is unknown or repeated.
        """
        if tuple(names) == self.pool:
            return self
        self.require_known(names)
        rows = [self.pool.index(name) for name in names]
        per_arm = [*_ARM_TENSORS, *(_SCORE_TENSORS if self.score_shift is not None else ())]
        arrays = {name: getattr(self, name)[rows] for name in per_arm}
        votes = None if self.votes is None else self.votes.select(rows)
        practice = None if self.practice is None else self.practice.select(rows)
        return replace(self, pool=tuple(names), metrics={}, votes=votes, multipliers=None, practice=practice, **arrays)

    def column(self, name: str | None) -> NDArray[np.float32]:
        """What the checkpoint knows of one arm, as numbers that `extended` reads: (l + r + 3,).

        Args:
            name: the arm; None for what an average arm of the checkpoint would be, which says how hard a text is for
                such scorers, and of no kind of text that this arm is better at it than the others.

        Raises:
            CheckpointError: the arm is unknown.
        """
        if name is not None:
            self.require_known([name])
            k = self.pool.index(name)
            numbers = (self.calibration_scale[k], self.calibration_shift[k], self.cls_bias[k])
            return np.concatenate([self.bt_embeddings[k], self.cls_weight[k], numbers]).astype(np.float32)
        weight = (self.calibration_scale[:, None] * self.cls_weight).mean(axis=0)
        shift = (self.calibration_scale * self.cls_bias + self.calibration_shift).mean()
        return np.concatenate([self.bt_embeddings.mean(axis=0), weight, [1.0, shift, 0.0]]).astype(np.float32)

    def extended(self, columns: Mapping[str, NDArray[np.float32]]) -> Checkpoint:
        """The checkpoint with more arms behind its own, each as `column` told it. Votes and scales are dropped.

        Raises:
            CheckpointError: a column has another length, or its name is there.
        """
        if not columns:
            return self
        learned, end = self.fuse.learned, self.fuse.learned + self.fuse.features
        for name, column in columns.items():
            if column.shape != (end + 3,):
                raise CheckpointError(
                    f"what scorer {name!r} starts from holds {column.size} numbers, this checkpoint's arms have "
                    f"{end + 3}: serve the run with the checkpoint that it was started with"
                )
        rows = np.stack([*columns.values()])
        added = {
            "bt_embeddings": rows[:, :learned],
            "cls_weight": rows[:, learned:end],
            "calibration_scale": rows[:, end],
            "calibration_shift": rows[:, end + 1],
            "cls_bias": rows[:, end + 2],
        }
        arrays: dict[str, Any] = {name: np.concatenate([getattr(self, name), more]) for name, more in added.items()}
        dropped: dict[str, Any] = dict.fromkeys(("votes", "multipliers", "practice", *_SCORE_TENSORS))
        return replace(self, pool=(*self.pool, *columns), metrics={}, **arrays, **dropped)

    def require_known(self, names: Sequence[str]) -> None:
        """Raises CheckpointError if a name is no arm of the checkpoint."""
        unknown = [name for name in names if name not in self.pool]
        if unknown:
            raise CheckpointError(
                f"the checkpoint knows no RM {unknown}; it was trained for {list(self.pool)}; "
                "correct the names, or train with pairs that these RMs have judged"
            )

    def save(self, directory: str | os.PathLike[str]) -> str:
        """Write the checkpoint and return its digest.

        A reader sees the old checkpoint, the new one, or for an instant none, but never a mixture: both files are
        written beside the target and the directory is renamed. An older checkpoint there is replaced.

        Raises:
            CheckpointError: the target exists and is something else, or cannot be written.
        """
        target = Path(directory)
        if target.exists() and not (target / METADATA_FILE).is_file() and (target.is_file() or any(target.iterdir())):
            raise CheckpointError(f"{target}: exists and is not a checkpoint; give another directory")
        weights, metadata = save_tensors(self._tensors()), self._metadata()
        metadata["digest"] = _digest(weights, metadata)
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(prefix=f".{target.name}.", dir=target.parent) as scratch:
                fresh = Path(scratch) / "new"
                fresh.mkdir()
                self._copy_encoder(fresh)
                _write(fresh / WEIGHTS_FILE, weights)
                _write(fresh / METADATA_FILE, (json.dumps(metadata, indent=2) + "\n").encode())
                if target.exists():
                    target.rename(Path(scratch) / "old")
                fresh.rename(target)
        except OSError as error:
            raise CheckpointError(f"{target}: cannot be written ({error.strerror}); check path and space") from error
        return str(metadata["digest"])

    @classmethod
    def load(cls, directory: str | os.PathLike[str]) -> Checkpoint:
        """Read a checkpoint and verify format, digest and shapes.

        Raises:
            CheckpointError: something is missing, altered, of another format, or does not fit; the message says what
                to do.
        """
        source = Path(directory)
        weights, metadata = _read(source)
        if metadata.get("format_version") != FORMAT_VERSION:
            raise CheckpointError(
                f"{source}: format version {metadata.get('format_version')!r}, this program reads {FORMAT_VERSION}; "
                "write it again with this version's training command, or install the version that wrote it"
            )
        stated = metadata.pop("digest", None)
        if stated != _digest(weights, metadata):
            raise CheckpointError(f"{source}: the digest does not match; a file was altered or cut off: copy it again")
        try:
            tensors = load_tensors(weights)
            return cls(
                pool=tuple(metadata["pool"]),
                encoder_spec=str(metadata["encoder_spec"]),
                fuse=Fuse(
                    **{name: tensors[f"fuse.{name}"] for name in _FUSE_TENSORS},
                    rotation=tensors.get("fuse.rotation"),
                    context=tensors.get("fuse.context"),
                    kernel=_kernel(tensors),
                    limit=metadata["fuse_limit"],
                ),
                **{name: tensors[name] for name in _ARM_TENSORS},
                calibration_level=tensors.get(_LEVEL),
                score_shift=tensors.get("score_shift"),
                score_scale=tensors.get("score_scale"),
                landmarks=_landmarks(tensors, metadata),
                votes=_votes(tensors),
                multipliers=Multipliers(*_float64(tensors, _MULTIPLIERS)) if _MULTIPLIERS[0] in tensors else None,
                practice=Practice.of_arrays(*_float64(tensors, _PRACTICE)) if _PRACTICE[0] in tensors else None,
                prior_form=PriorForm(metadata["prior_form"]),
                hyperparameters=Hyperparameters(**metadata["hyperparameters"]),
                metrics=metadata["metrics"],
                data_digest=metadata["data_digest"],
                created_by=metadata["created_by"],
                encoder_files=_verified_files(source, metadata.get("encoder_files", {})),
                directory=source,
            )
        except (
            KeyError,
            TypeError,
            ValueError,
            HyperparameterError,
            NotFiniteError,
            ShapeMismatchError,
            safetensors.SafetensorError,
        ) as error:
            raise CheckpointError(f"{source}: lacks what its format promises ({error!r}); train again") from error

    def _features(self, x: NDArray[np.floating]) -> NDArray[np.floating]:
        if x.ndim != 2 or x.shape[1] != self.d:
            raise ShapeMismatchError(f"contexts have shape {x.shape}, expected (B, {self.d})")
        return x[:, : self.fuse.features]

    def _tensors(self) -> dict[str, NDArray[np.float32]]:
        named = {f"fuse.{name}": getattr(self.fuse, name) for name in (*_FUSE_TENSORS, *_OPTIONAL_FUSE_TENSORS)}
        if self.fuse.kernel is not None:
            named.update({f"fuse.kernel_{name}": getattr(self.fuse.kernel, name) for name in _KERNEL})
        named.update({name: getattr(self, name) for name in (*_ARM_TENSORS, *_SCORE_TENSORS)})
        named[_LEVEL] = self.calibration_level
        named[_LANDMARKS] = None if self.landmarks is None else self.landmarks.positions
        if self.votes is not None:
            arrays = self.votes.arrays
            named.update(zip(_VOTES, (array.astype(np.float32) for array in arrays), strict=True))
        if self.multipliers is not None:
            arrays_of_two = (self.multipliers.budgets, self.multipliers.values)
            named.update(zip(_MULTIPLIERS, (array.astype(np.float32) for array in arrays_of_two), strict=True))
        if self.practice is not None:
            named.update(zip(_PRACTICE, self.practice.arrays(), strict=True))
        # safetensors writes the buffer as it lies in memory: a transposed view would be stored with its axes mixed up.
        return {name: np.ascontiguousarray(array) for name, array in named.items() if array is not None}

    def _metadata(self) -> dict[str, Any]:
        return {
            "format_version": FORMAT_VERSION,
            "created_by": self.created_by,
            "pool": list(self.pool),
            "encoder_spec": self.encoder_spec,
            "d": self.d,
            "fuse_limit": self.fuse.limit,
            "prior_form": self.prior_form,
            "hyperparameters": self._hyperparameters(),
            "metrics": {name: float(value) for name, value in self.metrics.items()},
            "data_digest": self.data_digest,
            # Absent where there are none, so that such checkpoints keep the digest that they always had.
            **({"encoder_files": dict(self.encoder_files)} if self.encoder_files else {}),
            **({} if self.landmarks is None else {"landmark_radius": self.landmarks.radius}),
        }

    def _hyperparameters(self) -> dict[str, Any]:
        """By name; one that came later is absent at the value that means what older checkpoints mean."""
        named = {f.name: getattr(self.hyperparameters, f.name) for f in fields(Hyperparameters)}
        if not named["lambda_novel"]:
            del named["lambda_novel"]
        return named

    def _copy_encoder(self, target: Path) -> None:
        """The fine-tuned backbone's files from where they lie, checked again on the way."""
        if not self.encoder_files:
            return
        if self.directory is None:
            raise CheckpointError("directory is not set: where do the fine-tuned encoder's files lie?")
        for name in self.encoder_files:
            copy = target / name
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(self.directory / name, copy)
        _verified_files(target, self.encoder_files)


def _landmarks(tensors: Mapping[str, NDArray[np.float32]], metadata: Mapping[str, Any]) -> Landmarks | None:
    return Landmarks(tensors[_LANDMARKS], metadata["landmark_radius"]) if _LANDMARKS in tensors else None


def _kernel(tensors: Mapping[str, NDArray[np.float32]]) -> Kernel | None:
    named = [f"fuse.kernel_{name}" for name in _KERNEL]
    return Kernel(*(tensors[name] for name in named)) if named[0] in tensors else None


def _votes(tensors: Mapping[str, NDArray[np.float32]]) -> Votes | None:
    if _VOTES[0] not in tensors:
        return None
    weights, deviations, margins, level = _float64(tensors, _VOTES)
    return Votes(weights, deviations, margins, level)


def _float64(tensors: Mapping[str, NDArray[np.float32]], names: Sequence[str]) -> list[NDArray[np.float64]]:
    return [tensors[name].astype(np.float64) for name in names]


def _digest(weights: bytes, metadata: Mapping[str, Any]) -> str:
    digest = hashlib.sha256(json.dumps(metadata, sort_keys=True, separators=(",", ":")).encode())
    digest.update(b"\n")
    digest.update(weights)
    return digest.hexdigest()


def _read(source: Path) -> tuple[bytes, dict[str, Any]]:
    try:
        weights = (source / WEIGHTS_FILE).read_bytes()
        metadata = json.loads((source / METADATA_FILE).read_bytes())
    except FileNotFoundError as error:
        name = Path(str(error.filename)).name
        missing = f"it lacks the file {name}" if source.is_dir() else "the directory does not exist"
        raise CheckpointError(
            f"checkpoint {source}: {missing}; correct the path, or train one "
            "(`reward-router train PAIRS --out DIRECTORY`)"
        ) from error
    except OSError as error:
        raise CheckpointError(
            f"{source}: {error.strerror} ({Path(str(error.filename)).name}); give the directory of a checkpoint"
        ) from error
    except ValueError as error:
        raise CheckpointError(f"{source / METADATA_FILE}: is not JSON ({error}); copy the checkpoint again") from error
    if not isinstance(metadata, dict):
        raise CheckpointError(f"{source / METADATA_FILE}: is not a JSON object; copy the checkpoint again")
    return weights, metadata


def file_digests(root: Path, folder: str) -> dict[str, str]:
    """SHA-256 (hex) of every file below `root / folder`, by its path from `root`; what `encoder_files` holds."""
    files = sorted(path for path in (root / folder).rglob("*") if path.is_file())
    return {path.relative_to(root).as_posix(): _file_digest(path) for path in files}


def _verified_files(root: Path, expected: Mapping[str, str]) -> dict[str, str]:
    """`expected` itself.

    Raises:
        CheckpointError: a file is missing or altered, or would lie outside `root`.
    """
    for name, digest in expected.items():
        path = root / name
        if Path(name).is_absolute() or ".." in Path(name).parts:
            raise CheckpointError(f"{root}: encoder file {name!r} lies outside the checkpoint; train again")
        if not path.is_file() or _file_digest(path) != digest:
            raise CheckpointError(f"{path}: is missing or was altered; copy the whole checkpoint again")
    return dict(expected)


def _file_digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _write(path: Path, content: bytes) -> None:
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def _version() -> str:
    try:
        return importlib.metadata.version("reward-router")
    except importlib.metadata.PackageNotFoundError:
        return "(not installed)"

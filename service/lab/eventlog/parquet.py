"""Events as Parquet: one row per event, one row group per chunk, the header in the file's metadata.

The only module that knows pyarrow (extra `export`). Called by `export` and `load`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import msgspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from router_core.attempts import Attempt
from service.errors import ConfigurationError
from service.lab.eventlog.record import Header, LoggedEvent, event_of_row, model_of
from service.usecases.decisions import StoredDecision

METADATA_KEY = b"reward_router"
"""Where the file's metadata holds the header, as JSON."""

READ_ROWS = 8192
"""Rows held at once when a file is read."""

_MADE = ("x", "attempts", "shadows", "metadata", "audit")
_PLAIN = tuple(name for name in StoredDecision.__struct_fields__ if name not in _MADE)
"""Columns that are the decision's fields as they stand."""

_ATTEMPT = pa.struct(
    [
        ("arm", pa.int32()),
        ("turn", pa.int32()),
        ("outcome", pa.string()),
        ("reason", pa.string()),
        ("rewards", pa.list_(pa.float64())),
        ("verdict", pa.int32()),
        ("seconds", pa.float64()),
        ("price", pa.float64()),
        ("prompt_tokens_cut", pa.int32()),
        ("chance", pa.float64()),
        ("components", pa.map_(pa.string(), pa.list_(pa.float64()))),
        ("failures", pa.list_(pa.string())),
    ]
)

_AUDIT = pa.struct(
    [
        ("referee", pa.string()),
        ("verdict", pa.int32()),
        ("trust", pa.float64()),
        ("rewards", pa.list_(pa.float64())),
        ("price", pa.float64()),
        ("judged", pa.bool_()),
        ("signs", pa.map_(pa.string(), pa.list_(pa.float64()))),
        ("words", pa.list_(pa.string())),
    ]
)

_LEARNED = pa.struct([("arm", pa.int32()), ("reward", pa.float64())])


def arrow_schema(header: Header) -> Any:
    """Columns of a file, and its metadata. Doubles where the fold reads doubles, so that nothing is rounded."""
    doubles, name = pa.list_(pa.float64()), pa.dictionary(pa.int32(), pa.string())
    columns = [
        pa.field("event_id", pa.string(), nullable=False),
        pa.field("decision_id", pa.string(), nullable=False),
        pa.field("feedback_time_ms", pa.int64(), nullable=False),
        pa.field("time_ms", pa.int64(), nullable=False),
        pa.field("run", name, nullable=False),
        pa.field("policy", name, nullable=False),
        pa.field("version", pa.int64(), nullable=False),
        pa.field("arm", pa.int32()),
        pa.field("model", name),
        pa.field("n", pa.int32(), nullable=False),
        pa.field("x", pa.list_(pa.float32(), header.d), nullable=False),
        pa.field("offsets", doubles, nullable=False),
        pa.field("verdict", pa.int32(), nullable=False),
        pa.field("rewards", doubles, nullable=False),
        pa.field("propensity", pa.float64(), nullable=False),
        pa.field("propensities", doubles, nullable=False),
        pa.field("means", doubles, nullable=False),
        pa.field("sds", doubles, nullable=False),
        pa.field("floors", doubles, nullable=False),
        pa.field("attempts", pa.list_(_ATTEMPT), nullable=False),
        pa.field("shadows", pa.list_(_ATTEMPT)),
        pa.field("sticky", pa.string(), nullable=False),
        pa.field("multiplier", pa.float64(), nullable=False),
        pa.field("p_right", pa.float64()),
        pa.field("reference", pa.string()),
        pa.field("metadata", pa.string(), nullable=False),
        pa.field("inclusion", pa.float64()),
        pa.field("group", pa.string(), nullable=False),
        pa.field("audit", _AUDIT),
        pa.field("source", name, nullable=False),
        pa.field("after_gold", pa.bool_(), nullable=False),
        pa.field("signal", name, nullable=False),
        pa.field("value", pa.float64(), nullable=False),
        pa.field("reward", pa.float64()),
        pa.field("learned", pa.list_(_LEARNED), nullable=False),
    ]
    return pa.schema(columns, metadata={METADATA_KEY: header.to_json().encode()})


class ParquetWriter:
    """Writes one file, from its first byte to its last.

    Args:
        file: open for writing; the caller closes it.
        header: goes into the metadata.
    """

    def __init__(self, file: BinaryIO, header: Header) -> None:
        self._header = header
        self._schema = arrow_schema(header)
        self._writer = pq.ParquetWriter(file, self._schema, compression="zstd")

    def write(self, events: Sequence[LoggedEvent]) -> None:
        """Append events as one row group."""
        if events:
            self._writer.write_batch(record_batch(events, self._header))

    def close(self) -> None:
        """Write the footer; without it the file cannot be read."""
        self._writer.close()


def record_batch(events: Sequence[LoggedEvent], header: Header) -> Any:
    """Events as columns.

    Raises:
        ConfigurationError: a context of another length than the run's.
    """
    contexts = np.frombuffer(b"".join([event.decision.x for event in events]), "<f4")
    if contexts.size != len(events) * header.d:
        raise ConfigurationError(
            f"run {header.run!r} holds contexts of another length than d = {header.d}: its store is damaged"
        )
    columns: dict[str, Any] = {name: [getattr(event.decision, name) for event in events] for name in _PLAIN}
    columns |= {
        "event_id": [event.event_id for event in events],
        "decision_id": [event.decision_id for event in events],
        "feedback_time_ms": [event.feedback_time_ms for event in events],
        "run": [header.run] * len(events),
        "model": [model_of(header.pool, event.decision.arm) for event in events],
        "x": pa.FixedSizeListArray.from_arrays(pa.array(contexts), header.d),
        "attempts": [_rows(event.decision.attempts) for event in events],
        "shadows": [None if event.decision.shadows is None else _rows(event.decision.shadows) for event in events],
        "audit": [None if it is None else msgspec.structs.asdict(it) for it in (e.decision.audit for e in events)],
        "source": [event.source.value for event in events],
        "after_gold": [event.after_gold for event in events],
        "learned": [[{"arm": arm, "reward": reward} for arm, reward in event.learned] for event in events],
        "metadata": [json.dumps(event.decision.metadata, ensure_ascii=False) for event in events],
        "signal": [event.feedback.signal.value for event in events],
        "value": [event.feedback.value for event in events],
        "reward": [event.reward for event in events],
    }
    schema = arrow_schema(header)
    arrays = [
        columns[field.name] if field.name == "x" else pa.array(columns[field.name], field.type) for field in schema
    ]
    return pa.record_batch(arrays, schema=schema)


def _rows(attempts: Sequence[Attempt]) -> list[dict[str, Any]]:
    return [attempt._asdict() for attempt in attempts]


def read_parquet_header(path: Path) -> Header:
    """What the file says about itself.

    Raises:
        ConfigurationError: it is no Parquet file, or none of ours.
    """
    with _open(path) as file:
        metadata = file.schema_arrow.metadata or {}
    if METADATA_KEY not in metadata:
        raise ConfigurationError(f"{path} is no event log of reward-router: write one with `reward-router export`")
    return Header.from_json(metadata[METADATA_KEY], path)


def read_parquet(path: Path) -> Iterator[LoggedEvent]:
    """Every event, one by one; a chunk is in memory at a time.

    Raises:
        ConfigurationError: it cannot be read.
    """
    with _open(path) as file:
        try:
            for batch in file.iter_batches(READ_ROWS):
                contexts = batch["x"].flatten().to_numpy().reshape(batch.num_rows, -1)
                columns = {name: batch[name].to_pylist() for name in batch.schema.names if name != "x"}
                columns["metadata"] = [json.loads(facts) for facts in columns["metadata"]]
                for index, context in enumerate(contexts):
                    yield event_of_row({name: values[index] for name, values in columns.items()}, context.tobytes())
        except (OSError, pa.ArrowException, KeyError, TypeError, ValueError) as error:
            raise ConfigurationError(f"{path} holds no events ({error!r}): export again") from error


def _open(path: Path) -> Any:
    try:
        return pq.ParquetFile(path)
    except (OSError, pa.ArrowException) as error:
        raise ConfigurationError(f"{path} cannot be read as Parquet: {error}") from error

"""Records of a file: JSON Lines, a JSON array, CSV, TSV and Parquet, also compressed.

Knows files, nothing of preferences. Called by `convert`.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

from router_core.errors import DatasetError
from router_core.files import BYTE_ORDER_MARK, data_suffix, numbered_lines, open_data
from service.lab.convert.texts import UnusableError

READABLE = ".jsonl, .json, .csv, .tsv or .parquet, the former also with .gz or .zst"
MAX_FIELD_CHARS = 2**27
"""Longest field of a CSV file."""

Record = dict[str, Any]


def read_records(path: Path) -> Iterator[Record | UnusableError]:
    """Every record in order, or why it is none.

    Raises:
        DatasetError: the file cannot be read, or its name says nothing of what it holds.
    """
    suffix = data_suffix(path)
    if suffix in (".csv", ".tsv"):
        return _csv(path, "\t" if suffix == ".tsv" else ",")
    if suffix == ".parquet":
        return _parquet(path)
    if suffix in (".jsonl", ".ndjson", ".json"):
        return _json(path)
    raise DatasetError(f"{path}: the name does not say what it holds; give a file that ends in {READABLE}")


def _json(path: Path) -> Iterator[Record | UnusableError]:
    with open_data(path) as file:
        start = file.read(64).removeprefix(BYTE_ORDER_MARK).lstrip()
    if not start.startswith(b"["):
        for _, line in numbered_lines(path):
            try:
                yield _record(json.loads(line))
            except (ValueError, RecursionError):
                yield UnusableError("the line is not JSON")
        return
    with open_data(path) as file:
        try:
            records = json.loads(file.read().removeprefix(BYTE_ORDER_MARK))
        except (ValueError, RecursionError) as error:
            raise DatasetError(f"{path}: is not a JSON array ({error}); write one object a line") from error
    yield from map(_record, records)


def _record(value: Any) -> Record | UnusableError:
    return value if isinstance(value, dict) else UnusableError("the record is not an object")


def _csv(path: Path, delimiter: str) -> Iterator[Record | UnusableError]:
    csv.field_size_limit(MAX_FIELD_CHARS)
    with open_data(path) as file:
        lines: TextIO = io.TextIOWrapper(file, "utf-8-sig", newline="")
        try:
            for row in csv.DictReader(lines, delimiter=delimiter):
                if None in row or None in row.values():
                    yield UnusableError("the row has another number of columns than the header")
                else:
                    yield {name: value for name, value in row.items() if value != ""}
        except (csv.Error, UnicodeDecodeError) as error:
            raise DatasetError(f"{path}: is not CSV in UTF-8 ({error}); save it as such") from error


def _parquet(path: Path) -> Iterator[Record | UnusableError]:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise DatasetError(f"{path}: reading Parquet needs pyarrow: pip install 'reward-router[export]'") from error
    try:
        with open_data(path) as file:
            for batch in parquet.ParquetFile(pyarrow.PythonFile(file, "r")).iter_batches(1024):
                yield from batch.to_pylist()
    except pyarrow.ArrowException as error:
        raise DatasetError(f"{path}: cannot be read as Parquet ({error}); download it again") from error

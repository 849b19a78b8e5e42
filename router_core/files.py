"""Lines of data files: plain, gzip and zstd, with or without a byte order mark.

Knows names and bytes of files, nothing of what a line means. Called by whatever reads JSON Lines, so that a compressed
file is read everywhere or nowhere.
"""

from __future__ import annotations

import gzip
import io
import zlib
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, cast

from router_core.errors import DatasetError

BYTE_ORDER_MARK = b"\xef\xbb\xbf"
_UTF_16_MARKS = (b"\xff\xfe", b"\xfe\xff")


@contextmanager
def open_data(path: Path) -> Iterator[BinaryIO]:
    """A data file's bytes, decompressed where its name ends in `.gz` or `.zst`.

    Raises:
        DatasetError: the file cannot be read or decompressed, also while it is being read; or pyarrow, which reads
            `.zst`, is missing.
    """
    try:
        with _opened(path) as file:
            yield file
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise DatasetError(
            f"{path}: is not a whole gzip file ({error}); correct its name, or write it again"
        ) from error
    except OSError as error:
        raise DatasetError(f"{path}: cannot be read ({error.strerror or error}); give a data file") from error


def numbered_lines(path: Path) -> Generator[tuple[int, bytes]]:
    """Every line that is not blank, with its number from 1; a UTF-8 byte order mark is left out.

    Raises:
        DatasetError: as `open_data`, or the file is UTF-16.
    """
    with open_data(path) as file:
        for number, line in enumerate(file, start=1):
            if number == 1:
                if line.startswith(_UTF_16_MARKS):
                    raise DatasetError(f"{path}: is UTF-16; save it as UTF-8")
                line = line.removeprefix(BYTE_ORDER_MARK)
            if line.strip():
                yield number, line


def data_suffix(path: Path) -> str:
    """The suffix that says what a file holds, in lower case: `.jsonl` for `pairs.JSONL.gz`."""
    name = path.name.lower()
    for compressed in (".gz", ".zst"):
        name = name.removesuffix(compressed)
    return Path(name).suffix


def _opened(path: Path) -> BinaryIO:
    suffix = path.suffix.lower()
    if suffix == ".gz":
        return cast(BinaryIO, gzip.open(path, "rb"))
    if suffix == ".zst":
        return _zstd(path)
    return path.open("rb")


def _zstd(path: Path) -> BinaryIO:
    try:
        import pyarrow
    except ImportError as error:
        raise DatasetError(f"{path}: reading .zst needs pyarrow: pip install 'reward-router[export]'") from error
    path.open("rb").close()
    return io.BufferedReader(pyarrow.input_stream(str(path), compression="zstd"))

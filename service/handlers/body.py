"""Bodies of requests: which are taken, how they are read, and how JSON becomes a struct. Called by the hot routes.

A page in a browser can send a POST to any address, loopback included, and needs nobody's permission where the content
type is one of a form's (https://fetch.spec.whatwg.org/#cors-safelisted-request-header), or is missing. So those types
are refused, and a missing one where the `Origin` header tells that a browser sends it. A browser asks first
(`OPTIONS`) before it sends JSON to a foreign address, and is never told yes here.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from ipaddress import ip_address
from typing import Any, Generic, NoReturn, TypeVar, cast
from urllib.parse import urlsplit

import msgspec
from starlette.types import Receive

from service.errors import (
    BadRequestError,
    ForeignOriginError,
    PayloadTooLargeError,
    UnsupportedMediaTypeError,
    ValidationError,
)

T = TypeVar("T")
B = TypeVar("B")
Item = TypeVar("Item")


JSON_TYPE = b"application/json"

_BYTE_ORDER_MARK = b"\xef\xbb\xbf"


class ClientDisconnectedError(Exception):
    """The caller went away before its body was read; there is nobody to answer."""


def check_sender(headers: Sequence[tuple[bytes, bytes]], *, keyed: bool) -> None:
    """Return if the body is declared as JSON, and is not from a page that should not call.

    A page whose host name was made to point at loopback (DNS rebinding) may send JSON unasked. What keeps it out is the
    key; a gateway without keys takes requests of pages on `localhost` or a bare IP address only.

    Args:
        headers: of the request, names in small letters.
        keyed: True if callers must send a key.

    Raises:
        UnsupportedMediaTypeError: the content type is another, or is missing in a browser's request.
        ForeignOriginError: no keys are set, and the page's host is a name.
    """
    content_type = origin = None
    for name, value in headers:
        if name == b"content-type":
            content_type = value
        elif name == b"origin":
            origin = value
    # Compared in two steps: nearly every client sends exactly these words.
    if content_type != JSON_TYPE and not _is_json(content_type, by_browser=origin is not None):
        shown = "missing" if content_type is None else content_type[:100].decode("latin-1")
        raise UnsupportedMediaTypeError(
            f"content-type is {shown}: send JSON with content-type application/json",
            details={"field": "content-type"},
        )
    if origin is not None and not keyed and not _is_address(origin):
        raise ForeignOriginError(
            f"origin is {origin[:200].decode('latin-1')}, and the gateway has no API keys: set api_keys to let such "
            "pages call",
            details={"field": "origin"},
        )


def _is_json(content_type: bytes | None, *, by_browser: bool) -> bool:
    if content_type is None:
        return not by_browser
    essence = content_type.partition(b";")[0].strip(b" \t").lower()
    return essence == JSON_TYPE or (essence.startswith(b"application/") and essence.endswith(b"+json"))


def _is_address(origin: bytes) -> bool:
    """True if a page's host is `localhost` or an IP address: neither can be made to point elsewhere."""
    try:
        host = urlsplit(origin.decode("latin-1")).hostname or ""
        return host == "localhost" or ip_address(host) is not None
    except ValueError:
        return False


async def read_body(receive: Receive, max_bytes: int) -> bytes:
    """The whole body.

    Raises:
        ClientDisconnectedError: the caller is gone.
        PayloadTooLargeError: there is more than `max_bytes`.
    """
    chunks: list[bytes] = []
    size = 0
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ClientDisconnectedError
        chunk = message.get("body", b"")
        size += len(chunk)
        if size > max_bytes:
            raise PayloadTooLargeError(f"the body is larger than {max_bytes} bytes (max_body_bytes): send smaller ones")
        more = message.get("more_body", False)
        if not more and not chunks:
            return bytes(chunk)
        chunks.append(chunk)
        if not more:
            return b"".join(chunks)


def parse_body(decoder: msgspec.json.Decoder[T], body: bytes, *, names: Callable[[str], object] | None = None) -> T:
    """The document of a body. A UTF-8 byte order mark before it is passed over.

    Args:
        decoder: reads it.
        body: what came.
        names: looks for names that occur twice in one object; None: everywhere.

    Raises:
        ValidationError: it is not what the path takes, is nested too deeply, or names a field twice.
        BadRequestError: it is not JSON in UTF-8.
    """
    if body.startswith(_BYTE_ORDER_MARK):
        body = body[len(_BYTE_ORDER_MARK) :]
    try:
        document = decoder.decode(body)
        (names or _NAMES.decode)(body.decode())
    except msgspec.ValidationError as error:
        raise ValidationError(f"{error}: see /docs for the fields of this path") from error
    except msgspec.DecodeError as error:
        raise BadRequestError(
            f"the body is not JSON ({error}): send a JSON object with content-type application/json"
        ) from error
    except UnicodeDecodeError as error:
        raise BadRequestError("the body is not UTF-8: send JSON in UTF-8") from error
    except RecursionError as error:
        raise ValidationError("the body is nested too deeply: send fewer arrays and objects within each other") from (
            error
        )
    return document


class BatchReader(Generic[B, Item]):
    """Reads batches; an item that is not what the path takes is refused alone.

    Args:
        batch: struct of the whole, with `items`.
        item: struct of an item.
    """

    def __init__(self, batch: type[B], item: type[Item]) -> None:
        fields: Any = msgspec.structs.fields(cast(Any, batch))
        around = [
            (field.name, list[msgspec.Raw]) if field.name == "items" else (field.name, field.type, field.default)
            for field in fields
        ]
        self._type = batch
        self._batch = msgspec.json.Decoder(batch)
        self._around: msgspec.json.Decoder[Any] = msgspec.json.Decoder(
            msgspec.defstruct(batch.__name__, around, forbid_unknown_fields=True)
        )
        self._item = msgspec.json.Decoder(item)

    def read(self, body: bytes) -> tuple[B, list[Item | ValidationError]]:
        """Return what is said for all items, and the items, each with an error in its place where it does not fit.

        A batch whose items all fit is read once.

        Raises:
            ValidationError: what is around the items does not fit.
            BadRequestError: it is not JSON in UTF-8.
        """
        try:
            batch: Any = parse_body(self._batch, body)
        except ValidationError:
            around = parse_body(self._around, body, names=_outer_names)
            said = {name: getattr(around, name) for name in around.__struct_fields__}
            items = [self._one(index, bytes(raw)) for index, raw in enumerate(around.items)]
            return self._type(**{**said, "items": []}), items
        return batch, batch.items

    def _one(self, index: int, raw: bytes) -> Item | ValidationError:
        try:
            return parse_body(self._item, raw)
        except ValidationError as error:
            return ValidationError(f"items[{index}]: {error.message}", details=error.details)


def _no_name_twice(pairs: list[tuple[str, object]]) -> None:
    """Look at the names of one object, and keep nothing of it."""
    if len(pairs) > 1 and len({name for name, _ in pairs}) != len(pairs):
        _refuse_repeated(pairs)


def _outer_names(text: str) -> None:
    """Look at the names of the outermost object alone."""
    pairs = _PAIRS.decode(text)
    if isinstance(pairs, tuple):
        _no_name_twice(list(pairs))


def _refuse_repeated(pairs: list[tuple[str, object]]) -> NoReturn:
    names = [name for name, _ in pairs]
    twice = next(name for name in names if names.count(name) > 1)
    raise ValidationError(
        f"the field {twice[:100]!r} occurs more than once in one object: send it once", details={"field": twice[:100]}
    )


# msgspec takes the last of equal names and says nothing. Reading the names once more with the standard library costs
# 2 µs for a pair of 2 kB and 0.4 ms for 256 of them. Numbers are not needed: `len` is the cheapest reader.
_NAMES = json.JSONDecoder(object_pairs_hook=_no_name_twice, parse_int=len, parse_float=len)
_PAIRS = json.JSONDecoder(object_pairs_hook=tuple, parse_int=len, parse_float=len)

"""Security headers: what every answer says to browsers. A page says its own Content-Security-Policy.

Answers are for programs and are never kept, framed, or read as anything but what they say they are. TLS and with it
Strict-Transport-Security are for the proxy that ends it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from starlette.types import ASGIApp, Message, Receive, Scope, Send

POLICY: Final = b"content-security-policy"

SECURITY_HEADERS: Final = (
    (b"cache-control", b"no-store"),
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
    (b"cross-origin-resource-policy", b"same-origin"),
    (POLICY, b"default-src 'none'; frame-ancestors 'none'"),
)
"""What an answer has that says nothing else. `frame-ancestors` stands for X-Frame-Options, too."""


def with_security_headers(given: Sequence[tuple[bytes, bytes]]) -> list[tuple[bytes, bytes]]:
    """Return headers with those that are missing."""
    names = {name.lower() for name, _ in given}
    return [*given, *(header for header in SECURITY_HEADERS if header[0] not in names)]


class SecureAnswers:
    """Adds the headers to the answers of an application that do not say them themselves."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        async def secured(message: Message) -> None:
            if message["type"] == "http.response.start":
                message = {**message, "headers": with_security_headers(message.get("headers", ()))}
            await send(message)

        await self._app(scope, receive, secured)

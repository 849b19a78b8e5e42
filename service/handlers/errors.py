"""The one renderer of errors: `{"error": {"code", "message", "details"}}` with the class's status."""

from __future__ import annotations

import logging

import msgspec
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from router_core.errors import RouterCoreError
from service.errors import BadRequestError, NotFoundError, ServiceError, UnauthorizedError, ValidationError
from service.schemas import ErrorBody, ErrorReply

logger = logging.getLogger(__name__)

JSON = "application/json"


class InternalError(ServiceError):
    """Something that should not happen; the log has the traceback."""

    status = 500
    code = "internal"


class MethodNotAllowedError(ServiceError):
    """The path exists, the method does not."""

    status = 405
    code = "method_not_allowed"


def as_service_error(error: Exception) -> ServiceError:
    """The error that a caller is shown. What is not ours is logged and answered without its text."""
    if isinstance(error, ServiceError):
        return error
    if isinstance(error, HTTPException):
        if error.status_code == 404:
            return NotFoundError("no such path: see /docs for the API")
        if error.status_code == 405:
            allow = (error.headers or {}).get("Allow", "")
            # `service.app` answers HEAD wherever GET is taken.
            return wrong_method("GET, HEAD" if allow == "GET" else allow)
        return BadRequestError(str(error.detail))
    if isinstance(error, RequestValidationError):
        return _of_parameters(error)
    if isinstance(error, RouterCoreError):
        logger.error("router_core refused", extra={"fields": {"error": f"{type(error).__name__}: {error}"}})
        return InternalError(f"the router refused its own numbers ({type(error).__name__}): see the gateway's log")
    logger.error("unexpected error", exc_info=error)
    return InternalError("unexpected error: see the gateway's log")


def _of_parameters(error: RequestValidationError) -> ValidationError:
    """Return what FastAPI says of a query or a body, without the value: a body may hold texts."""
    first = error.errors()[0]
    field = ".".join(str(part) for part in first["loc"])
    return ValidationError(f"{field}: {first['msg']}: see /docs for the fields of this path", details={"field": field})


def wrong_method(allow: str) -> MethodNotAllowedError:
    """The error of a path that takes the methods `allow` only."""
    return MethodNotAllowedError(
        f"this path takes {allow or 'another method'}: see /docs for the API", details={"allow": allow}
    )


def error_reply(error: ServiceError) -> ErrorReply:
    """The body of an error."""
    return ErrorReply(ErrorBody(error.code, error.message, error.details))


def headers_of(error: ServiceError) -> dict[str, str]:
    """Extra headers of an error."""
    headers = {} if error.retry_after_seconds is None else {"retry-after": str(error.retry_after_seconds)}
    if isinstance(error, MethodNotAllowedError):
        headers["allow"] = str(error.details["allow"])
    if isinstance(error, UnauthorizedError):
        # RFC 9110, 15.5.2. Not `Basic`, which passes too: browsers would ask people for a password.
        headers["www-authenticate"] = 'Bearer realm="reward-router"'
    return headers


async def render(_: Request, error: Exception) -> Response:
    """FastAPI's exception handler."""
    shown = as_service_error(error)
    return Response(
        msgspec.json.encode(error_reply(shown)), status_code=shown.status, headers=headers_of(shown), media_type=JSON
    )

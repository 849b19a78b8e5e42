"""Errors of the service: each class fixes its HTTP status and its stable code.

    ServiceError
    ├── BadRequestError 400 · UnauthorizedError 401 · ForbiddenError 403 · ForeignOriginError 403 · NotFoundError 404
    ├── GoneError 410
    ├── ReadTimeoutError 408 · ConflictError 409 · RunConflictError 409
    ├── PayloadTooLargeError 413 · UnsupportedMediaTypeError 415 · HeadersTooLargeError 431
    ├── ValidationError 422 · OverCapacityError 429 · KeyLimitError 429 · TooManyConnectionsError 429
    ├── StoreUnavailableError 503 (and its child UnsafeStoreError) · NotReadyError 503 · NoWorkerError 503
    ├── DeadlineExceededError 503 · NoRewardError 503 · ActsUnavailableError 503
    ├── ConfigurationError (start-up only: printed by the CLI, never sent)
    └── service.scorers.protocol.WorkerError and its children

One renderer (`service.handlers.errors`) turns them into `{"error": {"code", "message", "details"}}`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar


class ServiceError(Exception):
    """Base of every error that the service raises on purpose.

    Args:
        message: names the field, the value and the remedy.
        details: more for programs: field names, limits, ids. JSON types only.
        retry_after_seconds: sent as `Retry-After` when set.
    """

    status: ClassVar[int] = 500
    code: ClassVar[str] = "internal"

    def __init__(
        self, message: str, *, details: Mapping[str, object] | None = None, retry_after_seconds: int | None = None
    ) -> None:
        super().__init__(message)
        self.message = message
        self.details = dict(details or {})
        self.retry_after_seconds = retry_after_seconds


class BadRequestError(ServiceError):
    """The body is not JSON of the expected shape."""

    status = 400
    code = "bad_request"


class UnauthorizedError(ServiceError):
    """The API key is missing or wrong."""

    status = 401
    code = "unauthorized"


class ForbiddenError(ServiceError):
    """The API key is right, and not for this: another scope or run is needed."""

    status = 403
    code = "forbidden"


class ForeignOriginError(ServiceError):
    """A page in a browser calls a gateway without keys, and its host is a name."""

    status = 403
    code = "foreign_origin"


class NotFoundError(ServiceError):
    """No such decision, run, model or policy."""

    status = 404
    code = "not_found"


class ReadTimeoutError(ServiceError):
    """The request was not whole within its time."""

    status = 408
    code = "read_timeout"


class ConflictError(ServiceError):
    """The decision already has another feedback value."""

    status = 409
    code = "feedback_conflict"


class RunConflictError(ServiceError):
    """The run's name belongs to another pool, prior, checkpoint or fold setting."""

    status = 409
    code = "run_conflict"


class GoneError(ServiceError):
    """The decision is older than the feedback window."""

    status = 410
    code = "decision_expired"


class ArchivedError(ServiceError):
    """The run is archived: it is neither asked nor taught any more."""

    status = 410
    code = "run_archived"


class PoolConflictError(ServiceError):
    """The run's pool was changed since the caller looked at it."""

    status = 409
    code = "pool_conflict"


class PayloadTooLargeError(ServiceError):
    """The body is larger than the limit."""

    status = 413
    code = "payload_too_large"


class UnsupportedMediaTypeError(ServiceError):
    """The body is not declared as JSON."""

    status = 415
    code = "unsupported_media_type"


class ValidationError(ServiceError):
    """A field is out of its bounds."""

    status = 422
    code = "validation"


class OverCapacityError(ServiceError):
    """More requests in flight than the limit."""

    status = 429
    code = "over_capacity"


class KeyLimitError(ServiceError):
    """The key has used up its own limits."""

    status = 429
    code = "key_limit"


class TooManyConnectionsError(ServiceError):
    """One address has more connections open than the limit."""

    status = 429
    code = "too_many_connections"


class HeadersTooLargeError(ServiceError):
    """The request line and the headers are larger than the limit, or too many."""

    status = 431
    code = "headers_too_large"


class StoreUnavailableError(ServiceError):
    """The store did not answer in time, or not as it should; nothing was acknowledged.

    Args:
        message: the sentence that callers are shown; it holds no address.
        where: the store's address, and what the server said where that may hold one; only `str(error)` shows it, for
            logs.
        details: see `ServiceError`.
        retry_after_seconds: see `ServiceError`.
    """

    status = 503
    code = "store_unavailable"

    def __init__(
        self,
        message: str,
        *,
        where: str = "",
        details: Mapping[str, object] | None = None,
        retry_after_seconds: int | None = 1,
    ) -> None:
        super().__init__(message, details=details, retry_after_seconds=retry_after_seconds)
        self.where = where

    def __str__(self) -> str:
        return f"{self.message} ({self.where})" if self.where else self.message


class UnsafeStoreError(StoreUnavailableError):
    """The store would lose what is acknowledged: nothing is saved until it is as it must be."""


class NotReadyError(ServiceError):
    """The run is still loading its posterior."""

    status = 503
    code = "not_ready"


class ActsUnavailableError(ServiceError):
    """The log of acts cannot be written, so that nothing is changed."""

    status = 503
    code = "acts_unavailable"


class DeadlineExceededError(ServiceError):
    """The request's time was over before a reward was there."""

    status = 503
    code = "deadline_exceeded"


class NoWorkerError(ServiceError):
    """No RM of the pool could be asked; there is no reward to give."""

    status = 503
    code = "no_worker"


class NoRewardError(ServiceError):
    """There is no reward yet, since no RM's scale is known, and none is invented."""

    status = 503
    code = "no_reward"


class ConfigurationError(ServiceError):
    """Settings, pool file or checkpoint do not fit each other. Printed at start-up."""

    code = "configuration"

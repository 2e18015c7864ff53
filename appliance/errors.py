"""One tree of errors. Each carries the HTTP status, the OpenAI error type and the code with which the API reports it."""

from __future__ import annotations

from dataclasses import dataclass


class ApplianceError(Exception):
    """Base of every error that may reach a user.

    `message` is written for that user and names the offending value; `param` is the request field at fault, where there is one;
    `retry_after_seconds` becomes a Retry-After header.
    """

    status: int = 500
    type: str = "server_error"
    code: str | None = "internal_error"

    def __init__(self, message: str, *, param: str | None = None, code: str | None = None, retry_after_seconds: float | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        self.retry_after_seconds = retry_after_seconds
        if code is not None:
            self.code = code


class InvalidRequest(ApplianceError):
    """400: the request cannot be served as it is written."""

    status = 400
    type = "invalid_request_error"
    code: str | None = None


class ContextLengthExceeded(InvalidRequest):
    """400: prompt (and room for one token) exceed what this node can hold for one sequence."""

    code = "context_length_exceeded"


class AuthenticationFailed(ApplianceError):
    """401: no API key, or none that is known."""

    status = 401
    type = "authentication_error"
    code = "invalid_api_key"


class PermissionDenied(ApplianceError):
    """403: the key is known but may not do this."""

    status = 403
    type = "permission_error"
    code = "permission_denied"


class NotFound(ApplianceError):
    """404: unknown route or model."""

    status = 404
    type = "invalid_request_error"
    code = "not_found"


class MethodNotAllowed(ApplianceError):
    """405: the route exists, the method does not."""

    status = 405
    type = "invalid_request_error"
    code = "method_not_allowed"


class PayloadTooLarge(ApplianceError):
    """413: the body is over `server.max_body_bytes`."""

    status = 413
    type = "invalid_request_error"
    code = "request_too_large"


class UnsupportedMediaType(ApplianceError):
    """415: the body is not JSON."""

    status = 415
    type = "invalid_request_error"
    code = "unsupported_media_type"


class RateLimited(ApplianceError):
    """429: this key's quota or rate limit is reached."""

    status = 429
    type = "rate_limit_error"
    code = "rate_limit_exceeded"


class Unavailable(ApplianceError):
    """503: loading, draining, restarting, or the queue is full. Always carries `retry_after_seconds`."""

    status = 503
    type = "server_error"
    code = "unavailable"

    def __init__(self, message: str, *, param: str | None = None, code: str | None = None, retry_after_seconds: float = 1.0) -> None:
        super().__init__(message, param=param, code=code, retry_after_seconds=retry_after_seconds)


class DeadlineExceeded(ApplianceError):
    """504: the request's server-side deadline passed before it finished."""

    status = 504
    type = "server_error"
    code = "deadline_exceeded"


class EngineFailed(ApplianceError):
    """500: the engine cannot serve this request (it was in flight at too many crashes, or the engine will not start)."""

    code = "engine_failed"


class ClientGone(ApplianceError):
    """499, in logs and records only: the client disconnected before its reply was complete."""

    status = 499
    type = "client_error"
    code = "client_disconnected"


@dataclass(frozen=True, slots=True)
class ConfigProblem:
    """One thing wrong with the settings: where it was read, what stood there, and what is allowed."""

    key: str
    value: str
    allowed: str
    source: str


class ConfigError(Exception):
    """Every problem found in the settings, together. The program prints them and exits with 2."""

    def __init__(self, problems: list[ConfigProblem]) -> None:
        self.problems = tuple(problems)
        super().__init__("\n".join(f"{p.key} = {p.value} (from {p.source}): {p.allowed}" for p in problems))


class ListenError(Exception):
    """The address cannot be listened on; the message says which, and why. The program prints it and exits with 1: a retry may succeed."""


class ModelError(Exception):
    """The model cannot be loaded; the message says which file or field, and what to do."""

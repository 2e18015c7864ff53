"""Errors in the specification's shape, always with all four members."""

from __future__ import annotations

import math

import msgspec
from aiohttp import web

from appliance.errors import ApplianceError, AuthenticationFailed

_encode = msgspec.json.Encoder().encode


def error_body(error: ApplianceError) -> bytes:
    """`{"error": {"message", "type", "param", "code"}}`."""
    message = error.message.encode("utf-8", "replace").decode()  # a message may quote a lone surrogate
    param = error.param.encode("utf-8", "replace").decode() if error.param is not None else None
    return _encode({"error": {"message": message, "type": error.type, "param": param, "code": error.code}})


def error_response(error: ApplianceError) -> web.Response:
    """The response for `error`, with Retry-After where it has one."""
    response = web.Response(status=error.status, body=error_body(error), content_type="application/json")
    if error.retry_after_seconds is not None:
        response.headers["Retry-After"] = str(max(1, math.ceil(error.retry_after_seconds)))
    if isinstance(error, AuthenticationFailed):
        response.headers["WWW-Authenticate"] = "Bearer"
    return response

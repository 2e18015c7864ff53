"""The outermost layer: request ids, keys, the error shape, and one RequestRecord for every generation request, whatever its end."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable

from aiohttp import web

from appliance.api.context import EXCHANGE, KEY_ID, REQUEST_ID, SERVICES
from appliance.api.error_reply import error_response
from appliance.api.exchange import Exchange
from appliance.api.request_id import clean_client_id, mint_request_id
from appliance.api.services import Services
from appliance.errors import (
    ApplianceError,
    AuthenticationFailed,
    ClientGone,
    InvalidRequest,
    MethodNotAllowed,
    NotFound,
    PayloadTooLarge,
    Unavailable,
)

logger = logging.getLogger(__name__)
Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]

OPEN_ROUTES = frozenset({"/health", "/ready"})
GENERATION_ROUTES = frozenset({"/v1/chat/completions", "/v1/completions"})


@web.middleware
async def serve(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Answer `request`. The response is written here, so that its ledger ends with its last byte."""
    services = request.app[SERVICES]
    received_at = services.clock.monotonic()
    request_id = str(mint_request_id(services.clock.wall()))
    client_id = clean_client_id(request.headers.get("X-Request-Id"))
    request[REQUEST_ID] = client_id or request_id
    try:
        request[KEY_ID] = _authenticate(services, request)
    except ApplianceError as error:
        return error_response(error)
    if _route(request) not in GENERATION_ROUTES or request.method != "POST":
        try:
            return await _answer(request, handler)
        except (ConnectionError, ClientGone):
            return _hang_up(request)
    exchange = Exchange(services, request_id=request_id, client_request_id=client_id, endpoint=request.path, received_at=received_at)
    exchange.key_id = request[KEY_ID]
    request[EXCHANGE] = exchange
    services.observer.on_received(exchange.endpoint)
    services.drain.enter()
    status = 500
    try:
        response = await _answer(request, handler, exchange)
        status = response.status
        exchange.writing()
        await response.prepare(request)
        await response.write_eof()
        exchange.written(exchange.num_unwritten_tokens)
        return response
    except asyncio.CancelledError as error:
        exchange.error = _why_cut(request, error)
        raise
    except (ConnectionError, ClientGone) as error:
        exchange.error = _why_cut(request, error)
        return _hang_up(request)
    finally:
        exchange.close(status)
        services.drain.leave()


async def add_request_id(request: web.Request, response: web.StreamResponse) -> None:
    """Signal before headers go out: the echo of X-Request-Id, and the end of the connection while draining."""
    response.headers["X-Request-Id"] = request.get(REQUEST_ID, "")
    if request.app[SERVICES].drain.draining:
        response.force_close()
        response.headers["Connection"] = "close"  # aiohttp wrote its own before this signal


async def _answer(request: web.Request, handler: Handler, exchange: Exchange | None = None) -> web.StreamResponse:
    """The handler's response, or that of the error it raised. ClientGone goes on: there is nobody to answer."""
    try:
        return await handler(request)
    except ClientGone:
        raise
    except ApplianceError as known:
        error = known
    except web.HTTPException as http:
        if http.status < 400:
            raise
        error = _of_http(request, http)
    except ConnectionError:
        raise
    except Exception as unknown:
        logger.exception("%s %s failed", request.method, request.path)
        error = ApplianceError(f"internal error ({type(unknown).__name__}); the server's log has the details")
    if exchange is not None:
        exchange.error = error
    response = error_response(error)
    if isinstance(error, MethodNotAllowed) and (allowed := error.__cause__) is not None:
        response.headers["Allow"] = getattr(allowed, "headers", {}).get("Allow", "")
    return response


def _authenticate(services: Services, request: web.Request) -> str:
    """The key's name, "" where keys are off or the route is open. Raises AuthenticationFailed.

    Open is what the router resolved to one of two handlers: no Host header, absolute URL or encoded path can make another route look open,
    and unknown paths are closed.
    """
    if not services.keys or _route(request) in OPEN_ROUTES:
        return ""
    scheme, _, token = request.headers.get("Authorization", "").partition(" ")
    secret = token.strip() if scheme.lower() == "bearer" else request.headers.get("X-Api-Key", "")
    if not secret:
        raise AuthenticationFailed("no API key: send it as `Authorization: Bearer KEY`")
    name = services.keys.name_of(secret)
    if name is None:
        raise AuthenticationFailed("the API key is not known")
    return name


def _route(request: web.Request) -> str | None:
    """The pattern of the route that will run; None for a path or method that nothing serves."""
    resource = request.match_info.route.resource
    return None if resource is None else resource.canonical


def _of_http(request: web.Request, http: web.HTTPException) -> ApplianceError:
    """aiohttp's own refusals in our tree."""
    path = request.path[:128]
    if http.status == 404:
        return NotFound(f"no such route: {request.method} {path}")
    if http.status == 405:
        error = MethodNotAllowed(f"{path} does not take {request.method}")
        error.__cause__ = http
        return error
    if http.status == 413:
        return PayloadTooLarge("the body is over this server's limit")
    if http.status < 500:
        return InvalidRequest(http.reason)
    return ApplianceError(http.reason)


def _hang_up(request: web.Request) -> web.Response:
    """For a client that left: closes what is left of the connection; aiohttp then fails to write the response, in silence.

    Raised instead, the error would be logged as a fault of the server.
    """
    if request.transport is not None:
        request.transport.abort()
    return error_response(ClientGone("the client disconnected before its reply was complete"))


def _why_cut(request: web.Request, error: BaseException) -> ApplianceError:
    """The client left, or the server ended the handler while stopping."""
    if isinstance(error, asyncio.CancelledError) and request.transport is not None and not request.transport.is_closing():
        return Unavailable("the server stopped before the reply was complete", code="aborted", retry_after_seconds=5)
    return error if isinstance(error, ClientGone) else ClientGone("the client disconnected before its reply was complete")

"""The outermost layer: request ids, keys, the error shape, and one RequestRecord for every generation request, whatever its end."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from urllib.parse import urlsplit

from aiohttp import hdrs, web

from appliance.api.context import EXCHANGE, KEY_ID, REQUEST_ID, SERVICES, TRACE
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
    PermissionDenied,
    Unavailable,
)
from appliance.logs import log_other_request, log_request

logger = logging.getLogger(__name__)
_CLIENT_GONE = ClientGone.status
Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]

_SAFE_METHODS = frozenset({"GET", "HEAD", "OPTIONS"})
OPEN_ROUTES = frozenset({"/health", "/ready"})
QUIET_ROUTES = OPEN_ROUTES | {"/metrics"}  # asked every few seconds, by probes and scrapers
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
        refusal = _invite(services, request) or error_response(error)
        _log_other(services, request, request_id, refusal.status, received_at)
        return refusal
    if _route(request) not in GENERATION_ROUTES or request.method != "POST":
        status = _CLIENT_GONE
        try:
            plain = await _answer(request, handler)
            status = plain.status
            return plain
        except (ConnectionError, ClientGone):
            return _hang_up(request)
        finally:
            _log_other(services, request, request_id, status, received_at)
    exchange = Exchange(services, request_id=request_id, client_request_id=client_id, endpoint=request.path, received_at=received_at)
    exchange.key_id = request[KEY_ID]
    request[EXCHANGE] = exchange
    headers = request.headers
    trace = request[TRACE] = services.tracing.begin(
        headers.getall("traceparent", ()), headers.getall("tracestate", ()), request_id, received_at, exchange.received_wall
    )
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
        try:
            record = exchange.close(status)
        finally:
            services.drain.leave()  # or a fault in the accounts would hold up the next drain
        trace.end(record, exchange.ledger.intervals)
        log_request(record, trace.context, exchange.texts)


async def add_request_id(request: web.Request, response: web.StreamResponse) -> None:
    """Signal before headers go out: the echo of X-Request-Id, our place in the trace, and the end of a connection while draining or past repair."""
    response.headers["X-Request-Id"] = request.get(REQUEST_ID, "")
    if (trace := request.get(TRACE)) is not None and trace.context is not None:
        response.headers["traceresponse"] = trace.context.header
    if request.app[SERVICES].drain.draining or request.content.exception() is not None:
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


def _log_other(services: Services, request: web.Request, request_id: str, status: int, received_at: float) -> None:
    """The line of a request that has no ledger. The path as the router knows it, or cut: a stranger chose it."""
    route = _route(request)
    expected = route in QUIET_ROUTES or (route is not None and status < 400)
    seconds = services.clock.monotonic() - received_at
    log_other_request(
        request_id, request.method, route or request.rel_url.raw_path[:128], status, seconds, key_id=request.get(KEY_ID, ""), expected=expected
    )


def _authenticate(services: Services, request: web.Request) -> str:
    """The key's name, "" where keys are off or the route is open. Raises AuthenticationFailed.

    Open is what the router resolved to one of a few handlers: no Host header, absolute URL or encoded path can make another route look open,
    and unknown paths are closed. A browser may show a session cookie instead of a key, where its login says so.
    """
    route, browser = _route(request), services.browser_login
    if not services.keys:
        _refuse_other_pages(request)
    if not services.keys or route in OPEN_ROUTES or (browser is not None and route in browser.open_routes):
        return ""
    scheme, _, token = request.headers.get("Authorization", "").partition(" ")
    secret = token.strip() if scheme.lower() == "bearer" else request.headers.get("X-Api-Key", "")
    if not secret:
        if browser is not None and (by_cookie := browser.key_name(request, route)) is not None:
            return by_cookie
        raise AuthenticationFailed("no API key: send it as `Authorization: Bearer KEY`")
    name = services.keys.name_of(secret)
    if name is None:
        raise AuthenticationFailed("the API key is not known")
    return name


def _refuse_other_pages(request: web.Request) -> None:
    """Where no key is asked for, a page from elsewhere must not act through the browser of somebody who may reach this server. It could not read the
    answer, but it could cause one. Raises PermissionDenied; what is no browser sends neither header."""
    site, origin = request.headers.get("Sec-Fetch-Site"), request.headers.get(hdrs.ORIGIN)
    if request.method in _SAFE_METHODS or (site is None and origin is None):
        return
    own = site in ("same-origin", "none") if site is not None else urlsplit(origin or "").netloc.lower() == request.headers.get(hdrs.HOST, "").lower()
    if not own:
        raise PermissionDenied("a page of another origin may not ask this server for anything")


def _invite(services: Services, request: web.Request) -> web.Response | None:
    return services.browser_login.invite(request) if services.browser_login is not None else None


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

"""Logging in with an API key, and which requests a browser's cookie opens."""

from __future__ import annotations

from collections.abc import Callable
from urllib.parse import parse_qs, urlsplit

from aiohttp import hdrs, web

from appliance.console.pages import Pages
from appliance.console.sessions import SessionCookies
from appliance.errors import PayloadTooLarge, PermissionDenied

LOGIN_ROUTE = "/console/login"
COOKIE = "appliance_session"
# What a cookie opens beside the console's own routes: what its page calls and links to. Everything else takes a key.
_API_ROUTES = frozenset({"/v1/chat/completions", "/v1/scale/decisions/{decision_id}/approve", "/metrics", "/openapi.json"})
_MAX_FORM_BYTES = 8192
_SAFE_METHODS = frozenset({"GET", "HEAD"})


class Login:
    """The console's login. `name_of(key)` is the name of an API key, None if it is not known; it compares in constant time."""

    open_routes = frozenset({LOGIN_ROUTE})

    def __init__(self, cookies: SessionCookies, name_of: Callable[[str], str | None], pages: Pages) -> None:
        self._cookies = cookies
        self._name_of = name_of
        self._pages = pages

    def key_name(self, request: web.Request, route: str | None) -> str | None:
        """The name of the key that the request's cookie stands for; None where there is none, or where it does not count for `route`.

        What changes something must also come from our own page: SameSite keeps other sites out, this keeps out other ports of this host.
        """
        if route is None or not (route == "/" or route.startswith("/console/") or route in _API_ROUTES):
            return None
        session = self._cookies.read(request.cookies.get(COOKIE, ""))
        if session is None or (request.method not in _SAFE_METHODS and not is_same_origin(request)):
            return None
        return session.name

    def invite(self, request: web.Request) -> web.Response | None:
        """For a browser that opens the page without a session: the way to the login page. None for everything else."""
        if request.path == "/" and request.method in _SAFE_METHODS and "text/html" in request.headers.get(hdrs.ACCEPT, ""):
            return _see_other(LOGIN_ROUTE)
        return None

    async def form(self, request: web.Request) -> web.Response:
        """GET: the login page; to the console for a browser that is logged in."""
        if self.key_name(request, LOGIN_ROUTE) is not None:
            return _see_other("/")
        return self._pages.login()

    async def enter(self, request: web.Request) -> web.Response:
        """POST: a known key gets a cookie, anything else the page again with 401."""
        _check_origin(request)
        name = self._name_of(await _posted_key(request))
        if name is None:
            return self._pages.login("This key is not known.", status=401)
        response = _see_other("/")
        response.set_cookie(
            COOKIE,
            self._cookies.issue(name),
            max_age=int(self._cookies.lifetime_seconds),
            path="/",
            httponly=True,
            samesite="Strict",
            secure=_is_https(request),
        )
        return response

    async def leave(self, request: web.Request) -> web.Response:
        """POST: the session ends, here and in the browser."""
        _check_origin(request)
        self._cookies.revoke(request.cookies.get(COOKIE, ""))
        response = _see_other(LOGIN_ROUTE)
        response.del_cookie(COOKIE, path="/", httponly=True, samesite="Strict", secure=_is_https(request))
        return response


def is_same_origin(request: web.Request) -> bool:
    """Whether a browser says that the request comes from a page of this origin. Without any word of it: no."""
    site = request.headers.get("Sec-Fetch-Site")
    if site is not None:
        return site == "same-origin"
    origin = request.headers.get(hdrs.ORIGIN)
    return origin is not None and urlsplit(origin).netloc.lower() == request.headers.get(hdrs.HOST, "").lower()


def _check_origin(request: web.Request) -> None:
    if not is_same_origin(request):
        raise PermissionDenied("this form takes posts of its own page only")


async def _posted_key(request: web.Request) -> str:
    """The field `key` of the form; "" where there is none. Raises PayloadTooLarge."""
    body = await request.content.read(_MAX_FORM_BYTES + 1)
    while len(body) <= _MAX_FORM_BYTES and (more := await request.content.read(_MAX_FORM_BYTES)):
        body += more
    if len(body) > _MAX_FORM_BYTES:
        raise PayloadTooLarge(f"the form is over {_MAX_FORM_BYTES} bytes")
    fields = parse_qs(body.decode("utf-8", "replace"), max_num_fields=8)
    return fields.get("key", [""])[0].strip()


def _is_https(request: web.Request) -> bool:
    return request.secure or request.headers.get("X-Forwarded-Proto", "").lower() == "https"


def _see_other(location: str) -> web.Response:
    return web.Response(status=303, headers={hdrs.LOCATION: location, hdrs.CACHE_CONTROL: "no-store"})

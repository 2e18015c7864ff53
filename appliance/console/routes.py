"""The console's routes: the page, its files, and JSON for what it shows."""

from __future__ import annotations

import ipaddress
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from typing import Any

import msgspec
from aiohttp import hdrs, web
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.ext.asyncio import AsyncSession

from appliance.clock import Clock
from appliance.console.live import LiveFeed
from appliance.console.login import LOGIN_ROUTE, Login
from appliance.console.pages import Pages
from appliance.errors import InvalidRequest, NotFound, PermissionDenied, Unavailable
from appliance.store import queries
from appliance.store.database import Database
from appliance.store.results import RequestFilter

_log = logging.getLogger(__name__)
_encode = msgspec.json.Encoder().encode
_MAX_PAGE = 200
_MAX_POINTS = 1500  # a day by the minute
_MAX_HISTORY_SECONDS = 400 * 86400.0
_STREAM_FRAMES = 900  # then the browser connects again, and its session is looked at again
Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


@dataclass(frozen=True, slots=True, kw_only=True)
class About:
    """What does not change while the server runs."""

    model: str
    instance_id: str
    fleet: str
    version: str
    ttft_slo_seconds: float
    tpot_slo_seconds: float
    slo_target: float
    slo_reason: str
    scaling_mode: str
    sample_seconds: float
    retention_days: int
    metrics_enabled: bool


class Console:
    """GET / with its files, /console/api/... and, where keys are on, the login. `database` is None where the store is off, `login` where keys are."""

    def __init__(self, about: About, pages: Pages, feed: LiveFeed, *, database: Database | None, login: Login | None, clock: Clock) -> None:
        self.login = login
        self._about = about
        self._pages = pages
        self._feed = feed
        self._database = database
        self._clock = clock

    def add_routes(self, app: web.Application) -> None:
        """Register everything on an application that shapes ApplianceErrors and, where keys are on, lets in only who may."""
        for path, handler in (
            ("/", self._index),
            ("/console/static/{version}/{name:.+}", self._file),
            ("/console/api/about", self._get_about),
            ("/console/api/live", self._live),
            ("/console/api/snapshot", self._snapshot),
            ("/console/api/history", self._history),
            ("/console/api/requests", self._requests),
            ("/console/api/requests/{request_id}", self._request),
            ("/console/api/decisions", self._decisions),
            ("/console/api/events", self._events),
        ):
            app.router.add_get(path, handler if self.login is not None else _only_local_names(handler))
        if self.login is not None:
            app.router.add_get(LOGIN_ROUTE, self.login.form)
            app.router.add_post(LOGIN_ROUTE, self.login.enter)
            app.router.add_post("/console/logout", self.login.leave)
        app.on_shutdown.append(self._shut)

    async def _shut(self, _: web.Application) -> None:
        await self._feed.close()

    async def _index(self, _: web.Request) -> web.Response:
        return self._pages.index()

    async def _file(self, request: web.Request) -> web.Response:
        return self._pages.file(request)

    async def _get_about(self, _: web.Request) -> web.Response:
        return _json(
            {**{name: getattr(self._about, name) for name in About.__slots__}, "login": self.login is not None, "store": self._database is not None}
        )

    async def _snapshot(self, _: web.Request) -> web.Response:
        return _json(self._feed.frame(None))

    async def _live(self, request: web.Request) -> web.StreamResponse:
        """Server-sent events, one a second, each a frame of the LiveFeed."""
        if request.method == hdrs.METH_HEAD:
            return web.Response(content_type="text/event-stream", headers={hdrs.CACHE_CONTROL: "no-store"})
        async with self._feed.watch() as frames:
            response = web.StreamResponse(headers={hdrs.CONTENT_TYPE: "text/event-stream", hdrs.CACHE_CONTROL: "no-store", "X-Accel-Buffering": "no"})
            await response.prepare(request)
            for _ in range(_STREAM_FRAMES):
                frame = await frames.get()
                if frame is None:
                    break
                await response.write(b"data: " + frame + b"\n\n")
        return response

    async def _history(self, request: web.Request) -> web.Response:
        """Samples of this instance over the last `seconds`, at the resolution that suits; only `columns` (comma-separated) where they are given."""
        seconds = _number(request, "seconds", 900.0, 1.0, _MAX_HISTORY_SECONDS)
        wanted = frozenset(filter(None, request.query.get("columns", "").split(",")))
        since, until = self._clock.wall() - seconds, self._clock.wall() + 1.0
        async with self._session() as session:
            history = await queries.sample_history(
                session, since_wall=since, until_wall=until, max_points=_MAX_POINTS, instance_id=self._about.instance_id
            )
        if not wanted:
            return _json(history)
        series = [replace(one, columns={name: column for name, column in one.columns.items() if name in wanted}) for one in history.series]
        return _json(replace(history, series=tuple(series)))

    async def _requests(self, request: web.Request) -> web.Response:
        """A page of the ledger; `cursor` of the page before goes on."""
        where = RequestFilter(
            failed=True if request.query.get("failed") == "1" else None,
            good=False if request.query.get("slow") == "1" else None,
            key_id=request.query.get("key"),
        )
        limit = int(_number(request, "limit", 50, 1, _MAX_PAGE))
        async with self._session() as session:
            return _json(await queries.find_requests(session, where, limit=limit, cursor=request.query.get("cursor")))

    async def _request(self, request: web.Request) -> web.Response:
        async with self._session() as session:
            found = await queries.request_by_id(session, request.match_info["request_id"])
        if not found:
            raise NotFound("no finished request has this id; rows are written a moment after the reply, and purged after the retention time")
        return _json({"requests": found, "cursor": None})

    async def _decisions(self, request: web.Request) -> web.Response:
        limit = int(_number(request, "limit", 50, 1, _MAX_PAGE))
        async with self._session() as session:
            return _json({"decisions": await queries.scale_decisions(session, limit=limit)})

    async def _events(self, request: web.Request) -> web.Response:
        limit = int(_number(request, "limit", 50, 1, _MAX_PAGE))
        async with self._session() as session:
            return _json({"events": await queries.engine_events(session, limit=limit)})

    @asynccontextmanager
    async def _session(self) -> AsyncIterator[AsyncSession]:
        """A session to read with. Raises NotFound where the store is off, Unavailable while the database is away."""
        if self._database is None:
            raise NotFound("store.enabled is off: nothing is kept to show", code="store_off")
        try:
            async with self._database.session() as session:
                yield session
        except (SQLAlchemyError, OSError) as error:
            _log.warning("the console cannot read the database: %s", type(error).__name__)
            raise Unavailable("the database is away; rows are spooled meanwhile", code="store_away", retry_after_seconds=5) from error


def _only_local_names(handler: Handler) -> Handler:
    """Without keys the server is loopback's alone, and so is the page: no name of the Internet may point here, or a foreign page that resolves to
    this machine would read everything (DNS rebinding)."""

    async def checked(request: web.Request) -> web.StreamResponse:
        if not is_local_name(request.headers.get(hdrs.HOST, "")):
            raise PermissionDenied("without an API key the console answers to localhost and IP addresses only; set a key to use it by another name")
        return await handler(request)

    return checked


def is_local_name(host: str) -> bool:
    """Whether a Host header holds localhost, a name under it, or an IP address."""
    name = host.rpartition(":")[0] if host.rpartition(":")[2].isdigit() else host
    if name.lower() == "localhost" or name.lower().endswith(".localhost"):
        return True
    try:
        ipaddress.ip_address(name.strip("[]"))
    except ValueError:
        return False
    return True


def _json(value: Any) -> web.Response:
    headers = {hdrs.CACHE_CONTROL: "no-store", "X-Content-Type-Options": "nosniff"}
    return web.Response(body=_encode(value), content_type="application/json", headers=headers)


def _number(request: web.Request, name: str, default: float, least: float, most: float) -> float:
    """A number of the query within its range. Raises InvalidRequest."""
    text = request.query.get(name)
    if text is None:
        return default
    try:
        value = float(text)
    except ValueError:
        value = float("nan")
    if not least <= value <= most:
        raise InvalidRequest(f"{name} is {text[:32]!r}; a number from {least:g} to {most:g} is expected", param=name)
    return value

"""The scale state over HTTP, as an aiohttp application to be mounted. Who may call it is the business of the application around it."""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable

from aiohttp import web
from sqlalchemy.exc import SQLAlchemyError

from appliance.errors import ApplianceError, InvalidRequest, Unavailable, UnsupportedMediaType
from appliance.scaling import adapters
from appliance.scaling.loop import ScalingLoop

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


def create_scaling_app(loop: ScalingLoop, *, caller: Callable[[web.Request], str] = lambda _: "") -> web.Application:
    """GET /v1/scale, /v1/scale/keda, /v1/scale/ray and /v1/scale/metric; POST /v1/scale/decisions/{id}/approve, /v1/scale/replicas and
    /v1/scale/endpoints/enable. `caller` names who asks, for the record of an approval."""
    app = web.Application(middlewares=[_errors], client_max_size=64 * 1024)
    add_scaling_routes(app, loop, caller=caller)
    return app


def add_scaling_routes(app: web.Application, loop: ScalingLoop, *, caller: Callable[[web.Request], str] = lambda _: "") -> None:
    """The same routes on an application that shapes ApplianceErrors itself."""

    async def state(_: web.Request) -> web.Response:
        return web.json_response(adapters.state_json(loop.view()))

    async def keda(_: web.Request) -> web.Response:
        return web.json_response(adapters.keda_metrics_api(loop.view()))

    async def ray(_: web.Request) -> web.Response:
        return web.json_response(adapters.ray_serve_scale(loop.view()))

    async def metric(_: web.Request) -> web.Response:
        return web.Response(text=adapters.prometheus_gauge(loop.view()), content_type="text/plain", charset="utf-8")

    async def approve(request: web.Request) -> web.Response:
        try:
            decision = await loop.approve(request.match_info["decision_id"], by=caller(request))
        except (SQLAlchemyError, OSError) as error:
            raise Unavailable("the database is away; try again", retry_after_seconds=5.0) from error
        return web.json_response({"approved": decision.id, "sequence": decision.sequence, "desired_replicas": decision.desired_replicas})

    async def replicas(request: web.Request) -> web.Response:
        count = (await _object(request)).get("replicas")
        if not isinstance(count, int) or isinstance(count, bool) or not 0 <= count <= 100_000:
            raise InvalidRequest(f"replicas is {count!r}; a whole number from 0 to 100000 is expected", param="replicas")
        loop.observe_replicas(count)
        return web.json_response(adapters.state_json(loop.view()))

    async def enable(request: web.Request) -> web.Response:
        url = (await _object(request)).get("url")
        if not isinstance(url, str) or not url.isprintable() or any("\ud800" <= character <= "\udfff" for character in url):
            raise InvalidRequest(f"url is {url!r}; the URL of an endpoint is expected", param="url")
        try:
            return web.json_response({"enabled": await loop.enable_endpoint(url)})
        except (SQLAlchemyError, OSError) as error:
            raise Unavailable("the database is away; try again", retry_after_seconds=5.0) from error

    app.router.add_get("/v1/scale", state)
    app.router.add_get("/v1/scale/keda", keda)
    app.router.add_get("/v1/scale/ray", ray)
    app.router.add_get("/v1/scale/metric", metric)
    app.router.add_post("/v1/scale/decisions/{decision_id}/approve", approve)
    app.router.add_post("/v1/scale/replicas", replicas)
    app.router.add_post("/v1/scale/endpoints/enable", enable)


async def _object(request: web.Request) -> dict[str, object]:
    if "Content-Type" in request.headers and request.content_type != "application/json":
        raise UnsupportedMediaType(f"the body must be application/json, not {request.content_type[:64]}")
    try:
        body = json.loads(await request.read())
    except (ValueError, RecursionError) as error:
        raise InvalidRequest(f"the body is not JSON: {error}") from error
    if not isinstance(body, dict):
        raise InvalidRequest("the body is not a JSON object")
    return body


@web.middleware
async def _errors(request: web.Request, handler: Handler) -> web.StreamResponse:
    try:
        return await handler(request)
    except ApplianceError as error:
        shape = {"error": {"message": error.message, "type": error.type, "param": error.param, "code": error.code}}
        headers = {} if error.retry_after_seconds is None else {"Retry-After": str(max(1, round(error.retry_after_seconds)))}
        return web.json_response(shape, status=error.status, headers=headers)

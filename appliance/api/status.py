"""GET /health, /ready, /version, /metrics, /v1/models, /v1/models/{id}."""

from __future__ import annotations

from typing import Any

import msgspec
from aiohttp import web

from appliance import __version__
from appliance.api.admission import check_model, why_not_ready
from appliance.api.context import SERVICES
from appliance.api.error_reply import error_response
from appliance.api.services import Services
from appliance.errors import ApplianceError, EngineFailed, NotFound, Unavailable

_encode = msgspec.json.Encoder().encode


def json_response(value: Any) -> web.Response:
    """`value` as JSON."""
    return web.Response(body=_encode(value), content_type="application/json")


async def health(request: web.Request) -> web.Response:
    """Whether the node is alive: 200 while it loads or drains, 503 once the engine has failed or overruns its phase's deadline."""
    services = request.app[SERVICES]
    if (reason := why_not_alive(services)) is not None:
        return error_response(Unavailable(reason, code="unhealthy", retry_after_seconds=5))
    return json_response({"status": "ok", "engine": services.engine.state})


async def ready(request: web.Request) -> web.Response:
    """Whether a request would be served now; if not, 503 with the reason and Retry-After."""
    services = request.app[SERVICES]
    reason: ApplianceError | None = why_not_ready(services)
    if isinstance(reason, EngineFailed):
        reason = Unavailable(reason.message, code="engine_failed", retry_after_seconds=60)
    if reason is None and (overdue := why_not_alive(services)) is not None:
        reason = Unavailable(overdue, code="unhealthy", retry_after_seconds=5)
    return error_response(reason) if reason is not None else json_response({"status": "ready"})


def why_not_alive(services: Services) -> str | None:
    """The reason why the engine counts as dead or stuck; None if it lives. A restarting engine is being helped already."""
    engine = services.engine
    if engine.state in ("failed", "stopped"):
        return f"the engine has {engine.state}"
    heartbeat = engine.heartbeat
    if heartbeat is None or engine.state == "restarting" or heartbeat.phase_deadline_seconds <= 0:
        return None
    spent = services.clock.monotonic() - heartbeat.phase_started_at
    if spent <= heartbeat.phase_deadline_seconds:
        return None
    return f"the engine is stuck: {heartbeat.phase} takes {spent:.1f} s, {heartbeat.phase_deadline_seconds:g} s at most were expected"


async def version(request: web.Request) -> web.Response:
    """The program's version."""
    return json_response({"version": __version__})


async def metrics(request: web.Request) -> web.Response:
    """The Prometheus exposition, in OpenMetrics where the scraper's Accept header prefers that."""
    services = request.app[SERVICES]
    if not services.settings.metrics.enabled:
        raise NotFound("metrics are off on this node (metrics.enabled)")
    body, content_type = services.metrics_text(request.headers.get("Accept", ""))
    return web.Response(body=body, headers={"Content-Type": content_type})


async def models(request: web.Request) -> web.Response:
    """The one model that is served."""
    services = request.app[SERVICES]
    return json_response({"object": "list", "data": [_card(services)]})


async def model(request: web.Request) -> web.Response:
    """One model by its name (which may hold slashes)."""
    services = request.app[SERVICES]
    check_model(services, request.match_info["model"])
    return json_response(_card(services))


def _card(services: Services) -> dict[str, Any]:
    facts = services.engine.ready
    return {
        "id": services.model_name,
        "object": "model",
        "created": 0,
        "owned_by": "appliance",
        "root": services.model_name,
        "parent": None,
        "max_model_len": None if facts is None else facts.context_length,
    }

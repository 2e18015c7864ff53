"""The aiohttp application: routes, middleware, and the thread pool for long texts."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

from aiohttp import web

from appliance.api import chat, completions, openapi, status, tokenization
from appliance.api.context import SERVICES, WRITES
from appliance.api.middleware import add_request_id, serve
from appliance.api.off_loop import TEXT_POOL
from appliance.api.services import Services
from appliance.api.write_batch import WriteBatch

_NUM_TEXT_THREADS = 2  # tokenizing releases the GIL; more threads would only take cores from the engine


def create_app(services: Services) -> web.Application:
    """The API over `services`. Run it with `AppRunner(app, handler_cancellation=True)`, or clients that leave are noticed late."""
    app = web.Application(middlewares=[serve], client_max_size=services.settings.server.max_body_bytes)
    app[SERVICES] = services
    app[WRITES] = WriteBatch()
    app[TEXT_POOL] = ThreadPoolExecutor(_NUM_TEXT_THREADS, thread_name_prefix="text")
    app.on_response_prepare.append(add_request_id)
    app.on_cleanup.append(_close_pool)
    app.add_routes(
        [
            web.post("/v1/chat/completions", chat.chat_completions),
            web.post("/v1/completions", completions.completions),
            web.get("/v1/models", status.models),
            web.get("/v1/models/{model:.+}", status.model),
            web.get("/health", status.health),
            web.get("/ready", status.ready),
            web.get("/version", status.version),
            web.get("/metrics", status.metrics),
            web.get("/openapi.json", openapi.openapi),
        ]
    )
    for prefix in ("", "/v1"):
        app.router.add_post(prefix + "/tokenize", tokenization.tokenize)
        app.router.add_post(prefix + "/detokenize", tokenization.detokenize)
    return app


async def _close_pool(app: web.Application) -> None:
    app[TEXT_POOL].shutdown(wait=False, cancel_futures=True)

"""Runs a plan and writes its reply, streamed or whole. Every request that enters here ends in exactly one reply or one ClientGone."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Sequence
from typing import Any, Protocol

from aiohttp import web

from appliance.api import sse
from appliance.api.error_reply import error_body
from appliance.api.exchange import Exchange
from appliance.api.generation import Choices, Piece
from appliance.api.plan import Plan
from appliance.api.services import Services
from appliance.api.usage import Usage, usage_of
from appliance.errors import ApplianceError, ClientGone

logger = logging.getLogger(__name__)


class Renderer(Protocol):
    """How an endpoint words its output. Stateful, one a request."""

    templates: sse.ChunkTemplates

    def opening(self, choice: int) -> bytes | None:
        """The body of a choice's first chunk, before its first text."""

    def bodies(self, piece: Piece) -> Sequence[bytes]:
        """The bodies of a piece's chunks: its text, then its end."""

    def whole(self, pieces: Sequence[Sequence[Piece]], usage: Usage) -> Any:
        """The reply that is not streamed, from all pieces by choice."""


async def reply(request: web.Request, services: Services, exchange: Exchange, plan: Plan, renderer: Renderer) -> web.StreamResponse:
    """Submit `plan` and answer. Raises ApplianceError only while nothing has been written."""
    exchange.stream = plan.stream
    choices = Choices(services, exchange, plan)
    try:
        choices.submit()
        if plan.stream:
            return await _Stream(request, services, exchange, plan, renderer).run(choices)
        return await _whole(exchange, plan, renderer, choices)
    finally:
        choices.close()


async def _whole(exchange: Exchange, plan: Plan, renderer: Renderer, choices: Choices) -> web.Response:
    by_choice: list[list[Piece]] = [[] for _ in plan.requests]
    num_tokens = 0
    async for pieces in choices.pieces():
        for piece in pieces:
            by_choice[piece.choice].append(piece)
            num_tokens += len(piece.token_ids)
        exchange.written(0)
    exchange.detokenizing()
    usage = usage_of(plan.num_prompt_tokens, num_tokens, exchange.num_cached_tokens)
    body = sse.encode(renderer.whole(by_choice, usage))
    exchange.num_unwritten_tokens = num_tokens
    return web.Response(body=body, content_type="application/json")


class _Stream:
    """One event stream. Headers go out with the first token, or with the first ping, so that an early error still has its own status."""

    def __init__(self, request: web.Request, services: Services, exchange: Exchange, plan: Plan, renderer: Renderer) -> None:
        self._request = request
        self._exchange = exchange
        self._plan = plan
        self._renderer = renderer
        self._ping_seconds = services.settings.server.ping_seconds
        self._opened = [False] * len(plan.requests)
        self._num_tokens = 0
        self._wrote = False  # since the pinger last looked
        self._lock = asyncio.Lock()  # headers and chunks of two tasks must not interleave
        self._response = web.StreamResponse(
            headers={"Content-Type": "text/event-stream; charset=utf-8", "Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        )

    async def run(self, choices: Choices) -> web.StreamResponse:
        pinger = asyncio.create_task(self._ping())
        try:
            async for pieces in choices.pieces():
                await self._write(*self._chunks(pieces))
            await self._write(self._ending(), 0)
        except ApplianceError as error:
            if not self._response.prepared or isinstance(error, ClientGone):
                raise
            await self._fail(error)
        except Exception as error:
            if not self._response.prepared:
                raise
            logger.exception("request %s failed in mid-stream", self._exchange.id)
            await self._fail(ApplianceError(f"internal error ({type(error).__name__}); the server's log has the details"))
        finally:
            pinger.cancel()
        return self._response

    def _chunks(self, pieces: Sequence[Piece]) -> tuple[bytes, int]:
        """What is ready together, as one write."""
        out: list[bytes] = []
        renderer, chunk = self._renderer, self._renderer.templates.chunk
        num_tokens = 0
        for piece in pieces:
            choice = piece.choice
            num_tokens += len(piece.token_ids)
            if not self._opened[choice]:
                self._opened[choice] = True
                if (opening := renderer.opening(choice)) is not None:
                    out.append(chunk(choice, opening))
            out.extend([chunk(choice, body) for body in renderer.bodies(piece)])
        self._num_tokens += num_tokens
        return b"".join(out), num_tokens

    def _ending(self) -> bytes:
        if not self._plan.include_usage:
            return sse.DONE
        usage = usage_of(self._plan.num_prompt_tokens, self._num_tokens, self._exchange.num_cached_tokens)
        return self._renderer.templates.usage(usage) + sse.DONE

    async def _write(self, data: bytes, num_tokens: int) -> None:
        """Raises ClientGone."""
        exchange = self._exchange
        exchange.writing()
        if data:
            self._wrote = True
            try:
                if not self._response.prepared or self._lock.locked():
                    async with self._lock:
                        await self._prepare()
                await self._response.write(data)
            except (ConnectionError, RuntimeError) as error:  # RuntimeError: aiohttp ended the response under us
                raise ClientGone("the client disconnected before its reply was complete") from error
        exchange.written(num_tokens)

    async def _prepare(self) -> None:
        if not self._response.prepared:
            await self._response.prepare(self._request)

    async def _fail(self, error: ApplianceError) -> None:
        """Say in the stream what went wrong; it ends there."""
        self._exchange.error = error
        await self._write(sse.error_event(error_body(error)), 0)

    async def _ping(self) -> None:
        """A comment line whenever nothing was written for `ping_seconds`: proxies close streams that are silent in the queue."""
        with contextlib.suppress(ConnectionError, RuntimeError):  # the handler is cancelled or finds out by itself
            while True:
                await asyncio.sleep(self._ping_seconds)
                if self._wrote:
                    self._wrote = False
                    continue
                async with self._lock:
                    await self._prepare()
                await self._response.write(sse.PING)

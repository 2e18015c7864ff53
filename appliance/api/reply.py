"""Runs a plan and writes its reply, streamed or whole. Every request that enters here ends in exactly one reply or one ClientGone."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any, Protocol

from aiohttp import web

from appliance.api import sse
from appliance.api.exchange import Exchange
from appliance.api.generation import Choices, Piece
from appliance.api.plan import Plan
from appliance.api.services import Services
from appliance.api.stream import ChunkRenderer, Stream
from appliance.api.usage import Usage, usage_of


class Renderer(ChunkRenderer, Protocol):
    """How an endpoint words its output."""

    def whole(self, pieces: Sequence[Sequence[Piece]], usage: Usage) -> Any:
        """The reply that is not streamed, from all pieces by choice."""


async def reply(request: web.Request, services: Services, exchange: Exchange, plan: Plan, renderer: Renderer) -> web.StreamResponse:
    """Submit `plan` and answer. Raises ApplianceError only while nothing has been written."""
    exchange.stream = plan.stream
    sink = Stream(request, services, exchange, plan, renderer) if plan.stream else _Whole(exchange, plan, renderer)
    choices = Choices(services, exchange, plan, sink)
    try:
        choices.submit()
        return await sink.run(choices)
    finally:
        choices.close()


class _Whole:
    """The sink of a request that is answered in one piece."""

    blocked = False

    def __init__(self, exchange: Exchange, plan: Plan, renderer: Renderer) -> None:
        self._exchange = exchange
        self._plan = plan
        self._renderer = renderer
        self._by_choice: list[list[Piece]] = [[] for _ in plan.requests]
        self._end: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def take(self, pieces: list[Piece], ended: bool) -> None:
        """Keep `pieces`."""
        for piece in pieces:
            self._by_choice[piece.choice].append(piece)
        if ended and not self._end.done():
            self._end.set_result(None)

    def fail(self, error: Exception) -> None:
        """End the request with `error`."""
        if not self._end.done():
            self._end.set_exception(error)

    async def run(self, choices: Choices) -> web.Response:
        """The reply, once all is there. Raises what the request ends with."""
        await self._end
        exchange, plan = self._exchange, self._plan
        exchange.detokenizing()
        num_tokens = sum(len(piece.token_ids) for pieces in self._by_choice for piece in pieces)
        usage = usage_of(plan.num_prompt_tokens, num_tokens, exchange.num_cached_tokens)
        body = sse.encode(self._renderer.whole(self._by_choice, usage))
        exchange.num_unwritten_tokens = num_tokens
        return web.Response(body=body, content_type="application/json")

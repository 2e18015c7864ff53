"""One event stream. Between its first token and its end no task wakes: each token goes from the engine client's wake-up to the transport.

`StreamResponse.write` would cost more than all the rest of a token's way, so chunks are framed here and written to the transport that aiohttp has
prepared; its own flow control says when to wait.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Sequence
from typing import Protocol

from aiohttp import hdrs, web
from aiohttp.abc import AbstractStreamWriter

from appliance.api import sse
from appliance.api.context import WRITES
from appliance.api.error_reply import error_body
from appliance.api.exchange import Exchange
from appliance.api.generation import Choices, Piece
from appliance.api.plan import Plan
from appliance.api.services import Services
from appliance.api.usage import usage_of
from appliance.errors import ApplianceError, ClientGone

logger = logging.getLogger(__name__)
_GONE = "the client disconnected before its reply was complete"


class ChunkRenderer(Protocol):
    """How an endpoint words its chunks. Stateful, one a request."""

    templates: sse.ChunkTemplates
    text_members: tuple[bytes, bytes] | None  # around the JSON string of a chunk that is text alone; None where chunks hold more than text

    def opening(self, choice: int) -> bytes | None:
        """The body of a choice's first chunk, before its first text."""

    def bodies(self, piece: Piece) -> Sequence[bytes]:
        """The bodies of a piece's chunks: its text, then its end."""


class Stream:
    """The sink of a streamed request, and its handler's wait.

    Headers go out with the first token, or with the first ping, so that an early error still has its own status. A client that does not read
    blocks the stream once the transport's buffer is full: what its sequences gain then stays with the engine's client, four bytes a token, and
    goes out as one write when there is room again.
    """

    __slots__ = (
        "_attention",
        "_chunked",
        "_ended",
        "_error",
        "_exchange",
        "_held",
        "_lock",
        "_num_tokens",
        "_num_unwritten_tokens",
        "_opened",
        "_ping_seconds",
        "_plan",
        "_protocol",
        "_renderer",
        "_request",
        "_response",
        "_text_frames",
        "_transport",
        "_writer",
        "_writes",
        "_wrote",
        "blocked",
    )

    def __init__(self, request: web.Request, services: Services, exchange: Exchange, plan: Plan, renderer: ChunkRenderer) -> None:
        self.blocked = False
        self._request = request
        self._protocol = request.protocol
        self._writes = request.app[WRITES]
        self._exchange = exchange
        self._plan = plan
        self._renderer = renderer
        self._ping_seconds = services.settings.server.ping_seconds
        self._opened = [False] * len(plan.requests)
        self._text_frames: list[tuple[bytes, bytes] | None] = [None] * len(plan.requests)  # by choice, once it is open and if text is all it sends
        self._num_tokens = 0
        self._wrote = False  # since the pinger last looked
        self._held = b""  # the first write, until the handler has sent the headers
        self._num_unwritten_tokens = 0
        self._ended = False
        self._error: Exception | None = None
        self._attention = asyncio.Event()  # there is something that only the handler can do
        self._lock = asyncio.Lock()  # handler and pinger must not both send the headers
        self._transport: asyncio.Transport | None = None  # once the headers are out
        self._writer: AbstractStreamWriter | None = None
        self._chunked = True
        self._response = web.StreamResponse(
            headers={"Content-Type": "text/event-stream; charset=utf-8", "Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        )

    # The sink.

    def take(self, pieces: list[Piece], ended: bool) -> None:
        """Write `pieces`, together with the stream's end if this is it; or keep them until the handler has made room."""
        self._ended = ended
        data, num_tokens = self._render(pieces)
        if ended:
            data += self._ending()
            self._attention.set()
        self._num_unwritten_tokens += num_tokens
        transport = self._transport
        if not data:
            return
        if transport is None or self._protocol.writing_paused:
            self._held, self.blocked = data, True
            self._attention.set()
            return
        self._wrote = True
        self._writes.add(transport, self._framed(data))
        self._exchange.num_written_tokens += self._num_unwritten_tokens
        self._num_unwritten_tokens = 0

    def fail(self, error: Exception) -> None:
        """End the stream with `error`."""
        self._error = error
        self._attention.set()

    # The handler.

    async def run(self, choices: Choices) -> web.StreamResponse:
        """Return after the last byte, or raise what the request ends with, if that can still have a status of its own."""
        pinger = asyncio.create_task(self._ping())
        try:
            await self._serve(choices)
        except ApplianceError as error:
            if not self._response.prepared or isinstance(error, ClientGone):
                raise
            await self._say(error)
        except Exception as error:
            if not self._response.prepared:
                raise
            logger.exception("request %s failed in mid-stream", self._exchange.id)
            await self._say(ApplianceError(f"internal error ({type(error).__name__}); the server's log has the details"))
        finally:
            pinger.cancel()
        return self._response

    async def _serve(self, choices: Choices) -> None:
        while True:
            await self._attention.wait()
            self._attention.clear()
            if self.blocked:
                await self._unblock()
            if self._error is not None:
                raise self._error
            if self._ended:
                self._writes.flush()  # the end of the body is aiohttp's to write
                return
            choices.advance()

    async def _unblock(self) -> None:
        """Write what was held, for the headers' sake or the client's, and wait until there is room for more. Raises ClientGone."""
        self._exchange.writing()
        held, self._held = self._held, b""
        try:
            if self._writer is not None:
                await self._writer.drain()
            await self._open(held)
            if self._writer is not None:
                await self._writer.drain()
        except (ConnectionError, RuntimeError) as error:  # RuntimeError: aiohttp ended the response under us
            raise ClientGone(_GONE) from error
        self.blocked = False
        self._exchange.written(self._num_unwritten_tokens)
        self._num_unwritten_tokens = 0

    async def _open(self, data: bytes) -> None:
        """Send the headers if they are not out, and `data`. Raises ClientGone, or what aiohttp raises for it."""
        async with self._lock:
            if self._transport is None:
                self._writer = await self._response.prepare(self._request)
                self._chunked = self._response.headers.get(hdrs.TRANSFER_ENCODING) == "chunked"  # HTTP/1.0 knows no chunks
                self._transport = self._request.transport
        self._write_now(data)

    async def _say(self, error: ApplianceError) -> None:
        """Say in the stream what went wrong; it ends there."""
        self._exchange.error = error
        self._write_now(sse.error_event(error_body(error)))

    async def _ping(self) -> None:
        """A comment line whenever nothing was written for `ping_seconds`: proxies close streams that are silent in the queue."""
        with contextlib.suppress(ConnectionError, RuntimeError, ClientGone):  # the handler is cancelled or finds out by itself
            while True:
                await asyncio.sleep(self._ping_seconds)
                if not self._wrote and not self.blocked and not self._protocol.writing_paused:
                    await self._open(sse.PING)
                self._wrote = False

    # Bytes.

    def _framed(self, data: bytes) -> bytes:
        return b"%x\r\n%b\r\n" % (len(data), data) if self._chunked else data

    def _write_now(self, data: bytes) -> None:
        if self._transport is None or self._transport.is_closing():
            raise ClientGone(_GONE)
        self._writes.flush()
        self._transport.write(self._framed(data))

    def _render(self, pieces: list[Piece]) -> tuple[bytes, int]:
        """The chunks of what is ready together, and its number of tokens."""
        num_tokens = 0
        out: list[bytes] = []
        for piece in pieces:
            num_tokens += len(piece.token_ids)
            frame = self._text_frames[piece.choice]
            if frame is None or piece.scores is not None or piece.finish_reason is not None:
                self._render_slowly(piece, out)
            elif piece.text:
                out.append(b"%b%b%b" % (frame[0], sse.encode(piece.text), frame[1]))
        self._num_tokens += num_tokens
        return (out[0] if len(out) == 1 else b"".join(out)), num_tokens

    def _render_slowly(self, piece: Piece, out: list[bytes]) -> None:
        """The chunks of a piece that begins or ends its choice or holds more than text."""
        renderer, choice = self._renderer, piece.choice
        chunk = renderer.templates.chunk
        if not self._opened[choice]:
            self._opened[choice] = True
            if renderer.text_members is not None:
                self._text_frames[choice] = renderer.templates.frame(choice, renderer.text_members)
            if (opening := renderer.opening(choice)) is not None:
                out.append(chunk(choice, opening))
        out.extend([chunk(choice, body) for body in renderer.bodies(piece)])

    def _ending(self) -> bytes:
        if not self._plan.include_usage:
            return sse.DONE
        usage = usage_of(self._plan.num_prompt_tokens, self._num_tokens, self._exchange.num_cached_tokens)
        return self._renderer.templates.usage(usage) + sse.DONE

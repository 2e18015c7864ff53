"""The server's end of the engine's socket: frames in, whole and decoded; frames out, one write per loop tick, in bounded memory."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import cast

from appliance.engine.wire import FrameReader, FromEngine, ToEngine, encode

_BUFFER_BYTES = 1 << 20  # beyond it `writable` is False, and sequences wait unencoded


class EngineConnection(asyncio.Protocol):
    """One connection to one engine process. `on_lost` is called once, with the reason if it was a broken frame or a failing handler."""

    def __init__(
        self, on_messages: Callable[[list[FromEngine]], None], on_writable: Callable[[], None], on_lost: Callable[[str | None], None]
    ) -> None:
        self._on_messages = on_messages
        self._on_writable = on_writable
        self._on_lost = on_lost
        self._reader = FrameReader(FromEngine)
        self._transport: asyncio.Transport | None = None
        self._pending: list[bytes] = []
        self._num_pending_bytes = 0
        self._flush_scheduled = False
        self._paused = False
        self._lost = False

    @property
    def writable(self) -> bool:
        """True while a large frame may be added."""
        return not (self._lost or self._paused) and self._num_pending_bytes < _BUFFER_BYTES

    def send(self, message: ToEngine) -> None:
        """Add one frame to this tick's write. Ignored after the end. Raises ValueError for a frame over the limit."""
        if self._lost:
            return
        frame = encode(message)
        self._pending.append(frame)
        self._num_pending_bytes += len(frame)
        if not self._flush_scheduled and self._transport is not None:
            self._flush_scheduled = True
            asyncio.get_running_loop().call_soon(self._flush)

    def close(self) -> None:
        """Close at once; nothing is reported any more. Idempotent."""
        self._lost = True
        self._pending.clear()
        if self._transport is not None:
            self._transport.abort()

    def _flush(self) -> None:
        self._flush_scheduled = False
        if self._lost or self._transport is None:
            return
        was_full = self._num_pending_bytes >= _BUFFER_BYTES
        frames, self._pending, self._num_pending_bytes = self._pending, [], 0
        self._transport.write(b"".join(frames))
        if was_full and self.writable:
            self._on_writable()

    def _fail(self, reason: str | None) -> None:
        if not self._lost:
            self.close()
            self._on_lost(reason)

    # asyncio.Protocol

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        self._transport.set_write_buffer_limits(high=_BUFFER_BYTES)
        if self._lost:
            self._transport.abort()
        elif self._pending:
            self._flush()

    def data_received(self, data: bytes) -> None:
        if self._lost:
            return
        try:
            self._on_messages(cast(list[FromEngine], self._reader.feed(data)))
        except Exception as error:  # whatever is wrong with a frame, the stream is worthless from here on
            self._fail(f"broken frame: {type(error).__name__}: {error}")

    def eof_received(self) -> bool:
        return False

    def connection_lost(self, exc: Exception | None) -> None:
        self._fail(None)

    def pause_writing(self) -> None:
        self._paused = True

    def resume_writing(self) -> None:
        self._paused = False
        if self.writable:
            self._on_writable()

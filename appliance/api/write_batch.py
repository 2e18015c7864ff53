"""The writes of one tick of the event loop, put off to its end and done together."""

from __future__ import annotations

import asyncio


class WriteBatch:
    """What streams have to write, in order. One for all streams of a loop.

    A send evicts what the interpreter works with, so a step's streams are all rendered first, then all written: 17.3 us of CPU a token instead
    of 20.8 when each is written as it is rendered (256 streams at 100 steps/s, means of five runs in turn on a shared machine; a bare send was 8).
    """

    __slots__ = ("_due",)

    def __init__(self) -> None:
        self._due: list[tuple[asyncio.WriteTransport, bytes]] = []

    def add(self, transport: asyncio.WriteTransport, data: bytes) -> None:
        """Write `data` in the next tick."""
        due = self._due
        if not due:
            asyncio.get_running_loop().call_soon(self.flush)
        due.append((transport, data))

    def flush(self) -> None:
        """Write what is due now: whoever writes past the batch calls this first, and keeps the order."""
        due, self._due = self._due, []
        for transport, data in due:
            if not transport.is_closing():  # if it is, its handler is being cancelled
                transport.write(data)

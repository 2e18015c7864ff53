"""How late the event loop is: everything that the server does for one request makes the others wait."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

_PERIOD_SECONDS = 0.2


class LoopLag:
    """Asks for a callback five times a second and tells `observe` how many seconds late each one ran. On the running loop; `stop` ends it."""

    def __init__(self, observe: Callable[[float], None], period_seconds: float = _PERIOD_SECONDS) -> None:
        self._observe = observe
        self._period = period_seconds
        self._loop = asyncio.get_running_loop()
        self._due = self._loop.time() + period_seconds
        self._handle: asyncio.TimerHandle | None = self._loop.call_at(self._due, self._tick)

    def stop(self) -> None:
        """Observe no more. Idempotent."""
        if self._handle is not None:
            self._handle.cancel()
            self._handle = None

    def _tick(self) -> None:
        now = self._loop.time()
        self._observe(max(0.0, now - self._due))
        self._due = now + self._period
        self._handle = self._loop.call_at(self._due, self._tick)

"""The lag of the event loop is what a callback waits beyond its time."""

from __future__ import annotations

import asyncio
import time

from appliance.metrics.event_loop import LoopLag


async def test_a_blocked_loop_is_seen() -> None:
    """Fifty milliseconds without a turn show as a lag of most of that; a loop that is free shows next to none; `stop` ends it."""
    lags: list[float] = []
    heard = asyncio.Event()

    def observe(seconds: float) -> None:
        lags.append(seconds)
        heard.set()

    meter = LoopLag(observe, period_seconds=0.01)
    await heard.wait()
    heard.clear()
    time.sleep(0.05)  # noqa: ASYNC251 - the fault to be seen
    seen = len(lags)
    await heard.wait()
    assert lags[seen] >= 0.035
    assert all(lag >= 0 for lag in lags)
    meter.stop()
    meter.stop()
    count = len(lags)
    await asyncio.sleep(0.03)
    assert len(lags) == count

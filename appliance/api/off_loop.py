"""Work on long texts, kept off the event loop."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from aiohttp import web

T = TypeVar("T")
INLINE_CHARACTERS = 2000  # about 0.5 ms of templating and tokenizing: below it a detour through a thread and its wake-ups costs more
TEXT_POOL = web.AppKey("text_pool", ThreadPoolExecutor)


async def off_loop(pool: ThreadPoolExecutor, size: int, work: Callable[[], T]) -> T:
    """The result of `work`, computed on a thread if `size` characters are worth it: the event loop serves every other stream meanwhile."""
    if size <= INLINE_CHARACTERS:
        return work()
    return await asyncio.get_running_loop().run_in_executor(pool, work)

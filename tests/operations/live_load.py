"""Mixed load that moves every family: streams and whole replies, several choices, shared prefixes, long prompts, clients that leave, bad requests."""

from __future__ import annotations

import asyncio
import contextlib
import random
import time
from collections.abc import Collection
from typing import Any

import aiohttp

KEYS = {"web": "sk-web-0123456789", "batch": "sk-batch-0123456789"}
SHARED = "The quick brown fox jumps over the lazy dog. " * 3  # some blocks of prefix
KINDS = {"stream": 8.0, "whole": 3.0, "leave": 2.0, "bad": 1.0, "long": 2.0, "burst": 0.5}  # with their weights
CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"


class Load:
    """Clients that ask until they are told to stop. `counts` says what they sent, by kind, and how the answers were, by status."""

    def __init__(
        self,
        url: str,
        num_clients: int,
        *,
        largest_output: int = 60,
        pause_seconds: float = 0.05,
        paths: tuple[str, ...] = (CHAT, COMPLETIONS),
        kinds: Collection[str] = KINDS,
    ) -> None:
        self.counts: dict[str, int] = {}
        self._url = url
        self._num_clients = num_clients
        self._largest = largest_output
        self._pause = pause_seconds
        self._paths = paths
        self._kinds = list(kinds)
        self._tasks: list[asyncio.Task[None]] = []

    async def __aenter__(self) -> Load:
        self._session = aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(120), connector=aiohttp.TCPConnector(limit=0))
        self._tasks = [asyncio.create_task(self._client(seed)) for seed in range(self._num_clients)]
        return self

    async def __aexit__(self, *_: object) -> None:
        for task in self._tasks:
            task.cancel()
        results = await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._session.close()
        for result in results:
            if isinstance(result, Exception):
                raise result

    async def for_seconds(self, seconds: float) -> tuple[float, float]:
        """Let the clients go on for so long; when it began and ended, Unix time."""
        began = time.time()
        done, _ = await asyncio.wait(self._tasks, timeout=seconds, return_when=asyncio.FIRST_EXCEPTION)
        for task in done:
            task.result()
        return began, time.time()

    async def _client(self, seed: int) -> None:
        generator = random.Random(seed)
        while True:
            with contextlib.suppress(aiohttp.ClientConnectionError, aiohttp.ClientPayloadError):  # the server may be stopped on purpose
                await self._ask(generator)
            await asyncio.sleep(generator.uniform(0, 2 * self._pause))

    async def _ask(self, generator: random.Random) -> None:
        path = generator.choice(self._paths)
        kind = generator.choices(self._kinds, [KINDS[kind] for kind in self._kinds])[0]
        text = f"{SHARED}{generator.randrange(8)}" if generator.random() < 0.6 else f"{generator.randrange(1 << 30)}: {'x' * generator.randrange(60)}"
        if kind == "long":
            text = "".join(generator.choice("abcdefgh ") for _ in range(300))
        body: dict[str, Any] = {"max_tokens": generator.randint(2, self._largest), "temperature": 1.0, "seed": generator.randrange(1 << 40)}
        body |= {"messages": [{"role": "user", "content": text}]} if path == CHAT else {"prompt": text}
        body |= {"ignore_eos": True} if generator.random() < 0.8 else {"stop": ["a", "e"]}
        body |= {"n": 2} if generator.random() < 0.1 else {}
        if kind == "bad":
            body["temperature"] = 99
        if kind == "burst":
            await asyncio.gather(*(self._post(generator, path, body | {"stream": False, "n": 1}, kind) for _ in range(12)))
            return
        await self._post(generator, path, body | {"stream": kind != "whole"}, kind)

    async def _post(self, generator: random.Random, path: str, body: dict[str, Any], kind: str) -> None:
        self.counts[kind] = self.counts.get(kind, 0) + 1
        headers = {"Authorization": f"Bearer {generator.choice(list(KEYS.values()))}"}
        async with self._session.post(self._url + path, json=body, headers=headers) as response:
            status = str(response.status)
            self.counts[status] = self.counts.get(status, 0) + 1
            assert response.status in ((400,) if kind == "bad" else (200, 503)), await response.text()
            num_lines = 0
            async for _ in response.content:
                num_lines += 1
                if kind == "leave" and num_lines >= 6:
                    response.close()  # the connection, not only the response
                    return

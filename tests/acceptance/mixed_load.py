"""A load generator of mixed requests that keeps its own count of everything: what it asked, what it got, when, and where it hung up."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import random
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import aiohttp

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
CONTEXT_LENGTH = 1024
BAD: tuple[tuple[int, dict[str, Any] | bytes], ...] = (  # expected status, what is put over a good body (or sent in its place)
    (400, b"{nonsense"),
    (400, {"temperature": 99}),
    (400, {"max_tokens": 0}),
    (400, {"n": 1000}),
    (400, {"stop": ["x"] * 100}),
    (404, {"model": "gpt-9"}),
    (401, {}),  # with a wrong key
)


@dataclass(slots=True)
class Ask:
    """One request to be made."""

    index: int
    kind: str  # good, bad, over_long, leave
    path: str
    body: dict[str, Any] | bytes
    key: str
    expected_status: int = 200
    leave_after_tokens: int | None = None  # hang up at so many
    leave_after_seconds: float | None = None

    @property
    def id(self) -> str:
        """Its X-Request-Id."""
        return f"mixed-{self.index}"


@dataclass(slots=True)
class Seen:
    """What became of it, as its client saw it. Times are CLOCK_MONOTONIC."""

    ask: Ask
    status: int = 0  # 0: no answer came before the client left
    left: bool = False  # the client hung up before the end
    usage: dict[str, Any] | None = None
    sent_at: float = 0.0
    ended_at: float = 0.0
    token_times: list[list[float]] = field(default_factory=list)  # of a stream, by choice

    @property
    def num_received(self) -> int:
        """Tokens of a stream that arrived."""
        return sum(map(len, self.token_times))

    @property
    def ttft_seconds(self) -> float | None:
        """Sending to the first token of any choice."""
        firsts = [times[0] for times in self.token_times if times]
        return min(firsts) - self.sent_at if firsts else None

    @property
    def tpot_seconds(self) -> float | None:
        """Mean gap of the first choice."""
        times = self.token_times[0] if self.token_times else []
        return (times[-1] - times[0]) / (len(times) - 1) if len(times) > 1 else None

    @property
    def gaps(self) -> list[float]:
        """Every gap between two tokens of a choice."""
        return [after - before for times in self.token_times for before, after in itertools.pairwise(times)]


def make_asks(count: int, seed: int, keys: list[str]) -> list[Ask]:
    """`count` requests of every kind, in random order: about 70 % good, 12 % that leave, 11 % bad, 7 % over-long."""
    generator = random.Random(seed)
    return [_ask(generator, index, keys) for index in range(count)]


def make_streams(count: int, seed: int, keys: list[str], first_index: int) -> list[Ask]:
    """`count` streams of one choice that run to their end. Their prompts are long: beside their prefill, what lies between a client's clock and the
    server's on a busy machine is little."""
    generator = random.Random(seed)
    asks = []
    for index in range(first_index, first_index + count):
        path = generator.choice((CHAT, COMPLETIONS))
        body = _body(generator, path, stream=True) | {"n": 1, "max_tokens": generator.randint(8, 32)}
        text = "".join(generator.choices("abcdefghijklmnopqrstuvwxyz ", k=generator.randint(500, 800)))
        body |= {"messages": [{"role": "user", "content": text}]} if path == CHAT else {"prompt": text}
        body.pop("stop", None)
        asks.append(Ask(index, "good", path, body, generator.choice(keys)))
    return asks


def _ask(generator: random.Random, index: int, keys: list[str]) -> Ask:
    path = generator.choice((CHAT, COMPLETIONS))
    body, key = _body(generator, path, stream=generator.random() < 0.6), generator.choice(keys)
    draw = generator.random()
    if draw < 0.70:
        return Ask(index, "good", path, body, key)
    if draw < 0.82:
        body |= {"max_tokens": 150, "ignore_eos": True}
        body.pop("stop", None)
        if body["stream"] and generator.random() < 0.7:
            return Ask(index, "leave", path, body, key, leave_after_tokens=generator.randint(1, 60))
        return Ask(index, "leave", path, body, key, leave_after_seconds=generator.uniform(0.03, 0.4))
    if draw < 0.93:
        status, change = generator.choice(BAD)
        if status == 401:
            key = "sk-wrong"
        return Ask(index, "bad", path, change if isinstance(change, bytes) else body | change, key, status)
    words = "word " * CONTEXT_LENGTH
    body |= {"messages": [{"role": "user", "content": words}]} if path == CHAT else {"prompt": words}
    return Ask(index, "over_long", path, body, key, 400)


def _body(generator: random.Random, path: str, *, stream: bool) -> dict[str, Any]:
    text = f"{generator.randrange(40)}: " + "abcdefgh" * generator.randrange(8)
    body: dict[str, Any] = {
        "n": generator.choice((1, 1, 1, 2, 3)),
        "max_tokens": generator.randint(1, 24),
        "seed": generator.randrange(1 << 40),
        "temperature": generator.choice((0, 1.0)),
        "stream": stream,
        "return_token_ids": stream,
    }
    body |= {"messages": [{"role": "user", "content": text}]} if path == CHAT else {"prompt": text}
    if stream:
        body["stream_options"] = {"include_usage": True}
    if path == COMPLETIONS and not stream and generator.random() < 0.3:
        body["prompt"] = [text, text[::-1]]
    if generator.random() < 0.15:
        body["stop"] = ["a", "e", "!"]
    else:
        body["ignore_eos"] = True
    return body


async def run_load(url: str, asks: Iterable[Ask], concurrency: int) -> list[Seen]:
    """All of `asks`, at most `concurrency` at a time, each on whatever connection is free."""
    queue = iter(asks)
    seen: list[Seen] = []
    timeout = aiohttp.ClientTimeout(120)
    async with aiohttp.ClientSession(url, connector=aiohttp.TCPConnector(limit=0), timeout=timeout) as session:

        async def work() -> None:
            for ask in queue:
                seen.append(await _run(session, ask))  # noqa: PERF401 - the queue is shared: a comprehension would hold all back to the end

        await asyncio.gather(*(work() for _ in range(concurrency)))
    return seen


async def _run(session: aiohttp.ClientSession, ask: Ask) -> Seen:
    seen = Seen(ask)
    limit = asyncio.timeout(ask.leave_after_seconds)  # None: for ever
    try:
        with contextlib.suppress(_Left):
            async with limit:
                await _talk(session, ask, seen)
    except TimeoutError:
        seen.left = True
    seen.ended_at = time.monotonic()
    return seen


class _Left(Exception):
    """The client hangs up."""


async def _talk(session: aiohttp.ClientSession, ask: Ask, seen: Seen) -> None:
    data = ask.body if isinstance(ask.body, bytes) else json.dumps(ask.body).encode()
    headers = {"Content-Type": "application/json", "X-Request-Id": ask.id, "Authorization": f"Bearer {ask.key}"}
    seen.sent_at = time.monotonic()
    async with session.post(ask.path, data=data, headers=headers) as response:
        seen.status = response.status
        if response.content_type != "text/event-stream":
            seen.usage = (await response.json()).get("usage")
            return
        seen.token_times = [[] for _ in range(_num_choices(ask))]
        async for line in response.content:
            if line.startswith(b"data: {"):
                _take(json.loads(line[6:]), seen)
                if ask.leave_after_tokens is not None and seen.num_received >= ask.leave_after_tokens:
                    seen.left = True
                    response.close()  # the connection, not only the response
                    raise _Left


def _num_choices(ask: Ask) -> int:
    return ask.body["n"] if isinstance(ask.body, dict) else 1


def _take(event: dict[str, Any], seen: Seen) -> None:
    assert "error" not in event, event
    now = time.monotonic()
    seen.usage = event.get("usage") or seen.usage
    for choice in event["choices"]:
        seen.token_times[choice["index"]] += [now] * len(choice.get("token_ids") or ())

"""The streaming client against servers that behave, dribble, break off and lie."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import pytest

from appliance.bench.records import Job, Outcome, RequestPlan
from appliance.bench.sse_client import SseConnection
from appliance.bench.worker import run_job

Reply = Callable[[asyncio.StreamWriter], Awaitable[None]]
OK = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
USAGE = {"choices": [], "usage": {"prompt_tokens": 4, "completion_tokens": 9}}


def text(content: str, finish: str | None = None) -> dict[str, object]:
    """A chunk of /v1/completions."""
    return {"choices": [{"index": 0, "text": content, "finish_reason": finish}], "usage": None}


def delta(finish: str | None = None, **fields: object) -> dict[str, object]:
    """A chunk of /v1/chat/completions."""
    return {"choices": [{"index": 0, "delta": fields, "finish_reason": finish}]}


def sse(*events: dict[str, object] | str, newline: str = "\n", compact: bool = True) -> bytes:
    """Events as text."""
    separators = (",", ":") if compact else (", ", ": ")
    lines = [event if isinstance(event, str) else json.dumps(event, separators=separators) for event in events]
    return "".join(f"data: {line}{newline}{newline}" for line in lines).encode()


def chunked(body: bytes, size: int) -> bytes:
    """`body` in HTTP chunks of `size` bytes, closed."""
    parts = [body[i : i + size] for i in range(0, len(body), size)]
    return b"".join(f"{len(part):x}\r\n".encode() + part + b"\r\n" for part in parts) + b"0\r\n\r\n"


@asynccontextmanager
async def server(reply: Reply) -> AsyncIterator[str]:
    """The URL of a server that reads a request and lets `reply` answer it, as often as asked."""

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                length = int(head.lower().split(b"content-length:")[1].split(b"\r\n")[0])
                await reader.readexactly(length)
                await reply(writer)
                await writer.drain()
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()

    listening = await asyncio.start_server(handle, "127.0.0.1", 0)
    async with listening:
        yield f"http://127.0.0.1:{listening.sockets[0].getsockname()[1]}/v1/completions"


async def ask(reply: Reply, times: int = 1, limit: float = 5.0) -> Outcome:
    """The outcome of the last of `times` requests over one connection."""
    async with server(reply) as url:
        connection = SseConnection(url, {"Authorization": "Bearer k"})
        for _ in range(times):
            outcome = Outcome(0, 0.0)
            await connection.request(b'{"prompt": "x"}', outcome, limit)
        connection.close()
        await asyncio.sleep(0)
        return outcome


def sender(data: bytes, piece: int | None = None) -> Reply:
    """Sends `data`, whole or in pieces that each reach the client alone."""

    async def reply(writer: asyncio.StreamWriter) -> None:
        step = piece or len(data)
        for i in range(0, len(data), step):
            writer.write(data[i : i + step])
            await writer.drain()
            if piece:
                await asyncio.sleep(0)

    return reply


STREAM = sse(text("a"), text("b"), text("", None), text("c", "length"), USAGE, "[DONE]")


@pytest.mark.parametrize("size", [1, 7, 50, 100_000])
@pytest.mark.parametrize("piece", [None, 3])
async def test_a_stream_is_read_however_it_is_cut(size: int, piece: int | None) -> None:
    """HTTP chunks and TCP segments that split events anywhere change nothing in what is counted."""
    outcome = await ask(sender(OK + chunked(STREAM, size), piece))
    assert outcome.error is None
    assert (outcome.num_chunks, len(outcome.gaps)) == (4, 3)
    assert (outcome.num_prompt_tokens, outcome.num_output_tokens) == (4, 9)
    assert outcome.started_at <= outcome.first_at <= outcome.last_at


@pytest.mark.parametrize("newline", ["\n", "\r\n"])
@pytest.mark.parametrize("compact", [True, False])
async def test_other_servers_spellings(newline: str, compact: bool) -> None:
    """CRLF between events and spaces in the JSON are read as well."""
    body = sse(text("a"), text("b"), USAGE, "[DONE]", newline=newline, compact=compact)
    outcome = await ask(sender(OK + chunked(body, 11), 5))
    assert (outcome.error, outcome.num_chunks, outcome.num_output_tokens) == (None, 2, 9)


async def test_chunks_without_a_token_are_not_counted() -> None:
    """A chat stream's role, its bare finish reason, and comments are no tokens; content, reasoning and tool calls are."""
    body = sse(
        delta(role="assistant", content=""),
        delta(reasoning_content="hm"),
        delta(content="a"),
        delta(tool_calls=[{}]),
        delta(finish="stop"),
        USAGE,
        "[DONE]",
    )
    outcome = await ask(sender(OK + chunked(b": ping\n\n" + body, 1000)))
    assert (outcome.error, outcome.num_chunks) == (None, 3)


async def test_one_connection_serves_many_requests() -> None:
    """Keep-alive: the second and third request are read like the first."""
    outcome = await ask(sender(OK + chunked(STREAM, 30)), times=3)
    assert (outcome.error, outcome.num_chunks) == (None, 4)


async def test_a_body_may_end_with_its_connection() -> None:
    """A server without chunks or length closes, and the stream is complete."""

    async def reply(writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n" + STREAM)
        await writer.drain()
        writer.close()

    outcome = await ask(reply)
    assert (outcome.error, outcome.num_chunks) == (None, 4)


async def test_an_error_reply_is_noted_with_its_body() -> None:
    """The status and the server's words."""
    body = b'{"error": {"message": "busy"}}'
    outcome = await ask(sender(b"HTTP/1.1 503 Service Unavailable\r\nContent-Length: %d\r\n\r\n" % len(body) + body))
    assert outcome.error == 'HTTP 503: {"error": {"message": "busy"}}'


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (OK + chunked(STREAM, 50)[:100], "closed early"),
        (b"", "closed early"),
        (OK + b"zz\r\n", "broken reply"),
        (OK + chunked(b"data: {nonsense\n\n", 100), "broken reply"),
        (OK + chunked(sse(text("a"), {"error": {"message": "engine died"}}), 100), "engine died"),
        (OK + chunked(sse(USAGE, "[DONE]"), 100), "no token"),
    ],
)
async def test_broken_streams_are_failures(data: bytes, message: str) -> None:
    """What breaks off, cannot be read, reports an error or holds no token is no completed request."""

    async def reply(writer: asyncio.StreamWriter) -> None:
        writer.write(data)
        await writer.drain()
        writer.close()

    outcome = await ask(reply)
    assert outcome.error is not None
    assert message in outcome.error


async def test_a_server_that_is_silent_times_out() -> None:
    """The bound of a request holds."""

    async def reply(_: asyncio.StreamWriter) -> None:
        await asyncio.sleep(1.0)

    outcome = await ask(reply, limit=0.05)
    assert outcome.error == "no end within 0.05 s"


async def test_no_server_is_a_failure() -> None:
    """A refused connection is an outcome, not an exception."""
    async with server(sender(b"")) as url:
        pass
    outcome = Outcome(0, 0.0)
    await SseConnection(url, {}).request(b"{}", outcome, 2.0)
    assert outcome.error is not None
    assert outcome.error.startswith("connection: ")


@pytest.mark.parametrize(("keep_alive", "num_connections"), [(True, 1), (False, 3)])
async def test_connections_are_kept_or_opened_for_each_request(keep_alive: bool, num_connections: int) -> None:
    """One connection serves a lane's requests, unless each is asked to have its own."""
    peers = set()

    async def reply(writer: asyncio.StreamWriter) -> None:
        peers.add(writer.get_extra_info("peername"))
        writer.write(OK + chunked(sse(text("a"), USAGE, "[DONE]"), 1000))

    async with server(reply) as url:
        job = Job(
            url=url, headers={}, body=b"", chat=False, text_prompts=False, plans=[RequestPlan(i, 1, 1) for i in range(3)], concurrency=1, seed=0,
            min_token_id=0, max_token_id=1, prefix_tokens=0, timeout_seconds=10.0, limit_seconds=10.0, keep_alive=keep_alive,
        )  # fmt: skip
        outcomes = await run_job(job, [b"{}"] * 3, lambda _: None)
    assert [outcome.error for outcome in outcomes] == [None] * 3
    assert len(peers) == num_connections

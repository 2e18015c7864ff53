"""A lean HTTP/1.1 client for streamed completions: one request at a time on one kept-alive connection.

A chunk of text costs a search for two byte strings, not a JSON parse: the client must stay far cheaper than the server that it measures.
A chunk counts as one with tokens when it has a choice, as in vLLM's client, with two exceptions: a chat chunk that only names the role (it comes
before any token), and a chunk without text that only tells the finish reason (its token was in the chunk before).
"""

from __future__ import annotations

import asyncio
import ssl
import time
from typing import cast
from urllib.parse import urlsplit

import msgspec

from appliance.bench.records import Outcome

_MAX_ERROR_CHARS = 200


class _Delta(msgspec.Struct):
    content: str | None = None
    reasoning_content: str | None = None
    tool_calls: list[object] | None = None


class _Choice(msgspec.Struct):
    text: str | None = None
    delta: _Delta | None = None
    finish_reason: str | None = None


class _Usage(msgspec.Struct):
    prompt_tokens: int = 0
    completion_tokens: int = 0


class _Chunk(msgspec.Struct):
    choices: list[_Choice] = []
    usage: _Usage | None = None
    error: object = None


_decode_chunk = msgspec.json.Decoder(_Chunk).decode


class SseConnection(asyncio.Protocol):
    """One connection, owned by one task. `request` may be called again after it returned."""

    def __init__(self, url: str, headers: dict[str, str]) -> None:
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError(f"not an http or https URL: {url}")
        self._host = parts.hostname
        self._port = parts.port or (443 if parts.scheme == "https" else 80)
        self._ssl = ssl.create_default_context() if parts.scheme == "https" else None
        path = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
        lines = [f"POST {path} HTTP/1.1", f"Host: {parts.netloc}", "Content-Type: application/json", "Accept: text/event-stream"]
        lines += [f"{name}: {value}" for name, value in headers.items()]
        self._head = "\r\n".join(lines).encode() + b"\r\nContent-Length: "
        self._transport: asyncio.Transport | None = None
        self._outcome: Outcome | None = None
        self._finished: asyncio.Future[None] | None = None
        self._start_parsing()

    async def request(self, body: bytes, outcome: Outcome, timeout_seconds: float) -> None:
        """Send one request and fill `outcome` until its stream ends. Errors are noted in it, not raised; cancellation closes the connection."""
        try:
            async with asyncio.timeout(timeout_seconds):
                if self._transport is None or self._transport.is_closing():
                    await asyncio.get_running_loop().create_connection(lambda: self, self._host, self._port, ssl=self._ssl)
                assert self._transport is not None
                self._start_parsing()
                self._outcome = outcome
                self._finished = asyncio.get_running_loop().create_future()
                outcome.started_at = time.monotonic()
                self._transport.write(self._head + str(len(body)).encode() + b"\r\n\r\n" + body)
                await self._finished
        except TimeoutError:
            outcome.error = f"no end within {timeout_seconds:g} s"
        except OSError as error:
            outcome.error = f"connection: {error.strerror or error}"
        finally:
            self._outcome = self._finished = None
            if outcome.error is not None or not self._complete:
                self.close()

    def close(self) -> None:
        """Drop the connection."""
        if self._transport is not None:
            self._transport.abort()
            self._transport = None

    # asyncio's side

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's is no subclass

    def connection_lost(self, exc: Exception | None) -> None:
        self._transport = None
        if self._outcome is not None and not self._complete:
            if not self._chunked and self._body_left is None and self._head_done and exc is None:
                self._end()  # a body without a length ends with its connection
            else:
                self._fail(f"connection closed early{f': {exc}' if exc else ''}")

    def data_received(self, data: bytes) -> None:
        if self._outcome is None:
            return
        now = time.monotonic()
        self._raw += data
        try:
            if not self._head_done and not self._read_head():
                return
            self._read_body()
            if self._events:
                self._read_events(now)
            if self._complete:
                self._end()
        except (ValueError, msgspec.MsgspecError) as error:
            self._fail(f"broken reply: {error}")

    # parsing

    def _start_parsing(self) -> None:
        self._raw = bytearray()  # as received, not yet cut
        self._events = bytearray()  # the body, without its transfer coding
        self._head_done = False
        self._status = 0
        self._chunked = False
        self._body_left: int | None = None  # bytes to come of the chunk or of the body; None: unknown
        self._complete = False
        self._keep_alive = True

    def _read_head(self) -> bool:
        end = self._raw.find(b"\r\n\r\n")
        if end < 0:
            return False
        head = bytes(self._raw[:end]).lower()
        del self._raw[: end + 4]
        self._status = int(head.split(b" ", 2)[1])
        fields = dict(line.split(b":", 1) for line in head.split(b"\r\n")[1:] if b":" in line)
        self._chunked = b"chunked" in fields.get(b"transfer-encoding", b"")
        length = fields.get(b"content-length")
        self._body_left = int(length) if length is not None else None
        self._keep_alive = b"close" not in fields.get(b"connection", b"")
        self._head_done = True
        return True

    def _read_body(self) -> None:
        """Move what is whole of the body from `_raw` to `_events`."""
        raw = self._raw
        if not self._chunked:
            self._events += raw
            if self._body_left is not None:
                self._body_left -= len(raw)
                self._complete = self._body_left <= 0
            raw.clear()
            return
        start = 0
        while not self._complete:
            line_end = raw.find(b"\r\n", start)
            if line_end < 0:
                break
            size = int(raw[start:line_end].split(b";")[0], 16)
            end = line_end + 2 + size
            if len(raw) < end + 2:
                break
            self._events += raw[line_end + 2 : end]
            self._complete = size == 0
            start = end + 2
        del raw[:start]

    def _read_events(self, now: float) -> None:
        if self._status != 200:
            return  # an error's body is read whole, in _end
        if b"\r" in self._events:
            self._events = self._events.replace(b"\r\n", b"\n")
        events = bytes(self._events)
        start = 0
        while (end := events.find(b"\n\n", start)) >= 0:
            self._read_event(events[start:end], now)
            start = end + 2
        if start:
            del self._events[:start]

    def _read_event(self, event: bytes, now: float) -> None:
        outcome = self._outcome
        if outcome is None or not event.startswith(b"data:"):
            return  # a comment that keeps proxies awake
        if outcome.first_at and b'"finish_reason":null' in event and b'"usage":{' not in event:
            outcome.gaps.append(now - outcome.last_at)
            outcome.last_at = now
            outcome.num_chunks += 1
            return
        payload = event[5:].strip()
        if payload == b"[DONE]":
            return
        chunk = _decode_chunk(payload)
        if chunk.error is not None:
            self._fail(f"in the stream: {_short(payload)}")
            return
        if chunk.usage is not None:
            outcome.num_prompt_tokens, outcome.num_output_tokens = chunk.usage.prompt_tokens, chunk.usage.completion_tokens
        if chunk.choices and _has_token(chunk.choices[0]):
            if outcome.first_at:
                outcome.gaps.append(now - outcome.last_at)
            else:
                outcome.first_at = now
            outcome.num_chunks += 1
            outcome.last_at = now
        elif outcome.first_at:
            outcome.last_at = now

    def _end(self) -> None:
        outcome, finished = self._outcome, self._finished
        if outcome is None or finished is None or finished.done():
            return
        self._complete = True
        if self._status != 200:
            outcome.error = f"HTTP {self._status}: {_short(bytes(self._events))}"
        elif not outcome.first_at and outcome.error is None:
            outcome.error = "the stream held no token"
        if not self._keep_alive:
            self.close()
        finished.set_result(None)

    def _fail(self, message: str) -> None:
        if self._outcome is not None and self._outcome.error is None:
            self._outcome.error = message
        if self._finished is not None and not self._finished.done():
            self._finished.set_result(None)


def _has_token(choice: _Choice) -> bool:
    if choice.delta is None:
        return bool(choice.text) or choice.finish_reason is None
    delta = choice.delta
    return bool(delta.content or delta.reasoning_content or delta.tool_calls)


def _short(data: bytes) -> str:
    return data.decode(errors="replace")[:_MAX_ERROR_CHARS]

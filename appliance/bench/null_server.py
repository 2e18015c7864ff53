"""A server that streams made-up tokens as fast as it can, to find the load generator's own ceiling. Its own process, loopback only.

One event a write and the streams in turn, as an engine's step would send them: larger writes would flatter the client.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
from collections import deque
from typing import cast

_HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
_IDLE_SECONDS = 120.0  # it leaves by itself when nobody has talked to it for so long


def _event(payload: dict[str, object] | str) -> bytes:
    text = payload if isinstance(payload, str) else json.dumps(payload, separators=(",", ":"))
    event = f"data: {text}\n\n".encode()
    return f"{len(event):x}\r\n".encode() + event + b"\r\n"


def _chunk(choices: list[object], usage: dict[str, int] | None) -> dict[str, object]:
    return {
        "id": "cmpl-0190a4f0-7f1e-7000-8000-000000000000",
        "object": "text_completion",
        "created": 1700000000,
        "model": "null",
        "choices": choices,
        "usage": usage,
    }


_TOKEN = _event(_chunk([{"index": 0, "text": " token", "logprobs": None, "finish_reason": None}], None))
_LAST = _event(_chunk([{"index": 0, "text": " token", "logprobs": None, "finish_reason": "length"}], None))


class _Streams:
    """Every open stream, served in turn by one task."""

    def __init__(self) -> None:
        self.open: deque[_NullProtocol] = deque()
        self.wake = asyncio.Event()

    async def run(self) -> None:
        """Until the process idles for `_IDLE_SECONDS`."""
        while True:
            if not self.open:
                self.wake.clear()
                await asyncio.wait_for(self.wake.wait(), _IDLE_SECONDS)
            for _ in range(len(self.open)):
                stream = self.open.popleft()
                if stream.send_one():
                    self.open.append(stream)
            await asyncio.sleep(0)


class _NullProtocol(asyncio.Protocol):
    def __init__(self, streams: _Streams) -> None:
        self._streams = streams
        self._raw = bytearray()
        self._left = 0
        self._total = 0
        self._paused = False
        self._transport: asyncio.Transport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's is no subclass
        self._transport.set_write_buffer_limits(high=16384)

    def connection_lost(self, exc: Exception | None) -> None:
        self._transport = None

    def pause_writing(self) -> None:
        self._paused = True

    def resume_writing(self) -> None:
        self._paused = False

    def data_received(self, data: bytes) -> None:
        self._raw += data
        end = self._raw.find(b"\r\n\r\n")
        if end < 0 or self._transport is None:
            return
        head = bytes(self._raw[:end]).lower()
        if head.startswith(b"get "):
            del self._raw[: end + 4]
            body = json.dumps({"object": "list", "data": [{"id": "null", "object": "model"}]}).encode()
            self._transport.write(b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n" % len(body) + body)
            return
        length = int(head.split(b"content-length:", 1)[1].split(b"\r\n", 1)[0])
        if len(self._raw) < end + 4 + length:
            return
        request = json.loads(self._raw[end + 4 : end + 4 + length])
        del self._raw[: end + 4 + length]
        self._left = self._total = int(request.get("max_tokens", 16))
        self._transport.write(_HEAD)
        self._streams.open.append(self)
        self._streams.wake.set()

    def send_one(self) -> bool:
        """Write the next event; whether there is more to come."""
        if self._transport is None:
            return False
        if self._paused:
            return True
        self._left -= 1
        if self._left > 0:
            self._transport.write(_TOKEN)
            return True
        usage = {"prompt_tokens": 1, "completion_tokens": self._total, "total_tokens": self._total + 1}
        self._transport.write(_LAST + _event(_chunk([], usage)) + _event("[DONE]") + b"0\r\n\r\n")
        return False


async def serve(host: str, port: int) -> None:
    """Serve until idle; the port goes to standard output as the first line."""
    streams = _Streams()
    server = await asyncio.get_running_loop().create_server(lambda: _NullProtocol(streams), host, port)
    print(server.sockets[0].getsockname()[1], flush=True)
    try:
        await streams.run()
    except TimeoutError:
        pass
    finally:
        server.close()


def main() -> int:
    """`python -m appliance.bench.null_server [--port PORT]`."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--port", type=int, default=0)
    arguments = parser.parse_args()
    from appliance.bench.loop import run

    try:
        run(serve("127.0.0.1", arguments.port))
    except KeyboardInterrupt:
        return 0
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Bad requests against the real server: each gets its 4xx, and a stream that runs beside them does not notice."""

from __future__ import annotations

import asyncio
import io
import json
import socket
from typing import Any

import aiohttp
from appliance_server import ApplianceServer, Stream, check_ledger, run_stream

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
HELLO = [{"role": "user", "content": "hi"}]


def _chat(**fields: Any) -> bytes:
    return json.dumps({"messages": HELLO, "max_tokens": 1, **fields}).encode()


# name -> (path, body, status, code)
BAD: dict[str, tuple[str, bytes, int, str | None]] = {
    "malformed": (CHAT, b'{"messages": [', 400, None),
    "empty": (CHAT, b"", 400, None),
    "not-an-object": (CHAT, b"[1, 2, 3]", 400, None),
    "binary": (CHAT, bytes(range(256)), 400, None),
    "deep": (CHAT, b'{"messages": ' + b"[" * 200_000 + b"]" * 200_000 + b"}", 400, None),
    "wrong-types": (CHAT, b'{"messages": "hi", "temperature": "hot"}', 400, None),
    "wrong-role": (CHAT, b'{"messages": [{"role": 7, "content": "hi"}]}', 400, None),
    "no-messages": (CHAT, b"{}", 400, None),
    "bool-for-int": (CHAT, _chat(n=True), 400, None),
    "too-many-choices": (CHAT, _chat(n=1_000_000), 400, None),
    "no-room-for-output": (CHAT, _chat(max_tokens=0), 400, None),
    "hot": (CHAT, _chat(temperature=1e300), 400, None),
    "huge-seed": (CHAT, _chat(seed=1 << 70), 400, None),
    "bias-out-of-vocabulary": (CHAT, _chat(logit_bias={"99999999": 1}), 400, None),
    "lone-surrogate": (CHAT, b'{"messages": [{"role": "user", "content": "\\ud800 \\udc00x"}]}', 400, None),
    "encoded-surrogate": (CHAT, b'{"messages": [{"role": "user", "content": "\xed\xa0\x80"}]}', 400, None),
    "unknown-model": (CHAT, _chat(model="gpt-9"), 404, "model_not_found"),
    "over-long-prompt": (CHAT, json.dumps({"messages": [{"role": "user", "content": "word " * 20_000}]}).encode(), 400, "context_length_exceeded"),
    "over-long-ids": (COMPLETIONS, json.dumps({"prompt": [1] * 2000}).encode(), 400, "context_length_exceeded"),
    "ids-out-of-vocabulary": (COMPLETIONS, b'{"prompt": [49152]}', 400, None),
    "negative-ids": (COMPLETIONS, b'{"prompt": [-1]}', 400, None),
    "ids-past-64-bits": (COMPLETIONS, b'{"prompt": [123456789012345678901234567890]}', 400, None),
    "empty-prompt": (COMPLETIONS, b'{"prompt": ""}', 400, None),
    "ten-megabytes": (CHAT, json.dumps({"messages": [{"role": "user", "content": "x" * 10_000_000}]}).encode(), 413, "request_too_large"),
}


async def _post(session: aiohttp.ClientSession, url: str, path: str, body: bytes) -> tuple[int, dict[str, Any]]:
    async with session.post(url + path, data=io.BytesIO(body), headers={"Content-Type": "application/json"}) as response:
        return response.status, await response.json()


async def test_bad_requests_get_their_status_and_harm_no_one(embedded_server: ApplianceServer) -> None:
    """Every one of them, twice and all at once, beside a stream that ends with the tokens that it has alone."""
    server = embedded_server
    ask = {"prompt": "The moon is", "max_tokens": 40, "temperature": 1.0, "seed": 5, "ignore_eos": True}
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(100)) as session:
        alone = await run_stream(session, server.url, ask, Stream())
        beside = Stream(request_id="beside-bad-ones")
        running = asyncio.create_task(run_stream(session, server.url, ask, beside))
        await beside.wait_tokens(3)
        before = server.metrics()
        names = [name for name in BAD for _ in range(2)]
        replies = await asyncio.gather(*(_post(session, server.url, *BAD[name][:2]) for name in names))
        wrong = {}
        for name, (status, body) in zip(names, replies, strict=True):
            error = body.get("error", {})
            if status != BAD[name][2] or set(error) != {"message", "type", "param", "code"} or (BAD[name][3] and error["code"] != BAD[name][3]):
                wrong[name] = (status, body)
        assert not wrong
        await running
    assert beside.error is None
    assert beside.token_ids == alone.token_ids
    after = server.metrics()
    for status in ("400", "404", "413"):
        expected = 2 * sum(1 for bad in BAD.values() if str(bad[2]) == status)
        assert after.value("requests_total", status=status) - before.value("requests_total", status=status) == expected
    assert after.value("requests_total", status="500") == 0
    rows = server.wait_rows("select * from requests where status >= 400", count=len(names))
    assert {row["error_code"] for row in rows if row["status"] == 413} == {"request_too_large"}
    for row in rows:
        check_ledger(row)


async def test_raw_nonsense_on_the_socket_is_refused(embedded_server: ApplianceServer) -> None:
    """No HTTP, headers without end, a length that lies and a half request: the connection ends, the server does not."""
    server = embedded_server
    host, _, port = server.url.removeprefix("http://").partition(":")

    def exchange(data: bytes) -> bytes:
        with socket.create_connection((host, int(port)), timeout=10) as connection:
            connection.sendall(data)
            received = b""
            while chunk := connection.recv(65536):
                received += chunk
            return received

    def cut_short(data: bytes) -> None:
        with socket.create_connection((host, int(port)), timeout=10) as connection:
            connection.sendall(data)

    post = f"POST {CHAT} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n".encode()
    assert b" 400 " in await asyncio.to_thread(exchange, b"\x16\x03\x01\x02\x00nonsense\r\n\r\n")
    assert b" 400 " in await asyncio.to_thread(exchange, b"GET / HTTP/1.1\r\nAuthorization: " + b"sk-1" * 25_000 + b"\r\n\r\n")
    for _ in range(20):
        await asyncio.to_thread(cut_short, post + b"Content-Length: 100\r\n\r\n{}")
    async with aiohttp.ClientSession() as session:
        status, reply = await _post(session, server.url, CHAT, _chat())
    assert status == 200, reply
    assert not any("sk-1" in line for line in server.output), "a header reached the log"
    await asyncio.to_thread(server.wait_until, lambda: server.metrics().value("requests_in_flight") == 0, 10, "nothing in flight")

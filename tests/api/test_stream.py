"""The way of a token to the socket: framing, order, and clients that do not read."""

import asyncio
import json
import socket

from appliance.api.write_batch import WriteBatch

CHAT = "/v1/chat/completions"
BODY = b'{"messages": [{"role": "user", "content": "hi"}], "stream": true, "ignore_eos": true}'


async def ask(server, *, version="1.1", narrow=False):
    """A raw connection on which a stream was asked for: (reader, writer). `narrow`: with small buffers of its own."""
    host, port = server.url.removeprefix("http://").split(":")
    sock = socket.socket()
    if narrow:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    sock.setblocking(False)
    await asyncio.get_running_loop().sock_connect(sock, (host, int(port)))
    reader, writer = await asyncio.open_connection(sock=sock, limit=1024)
    head = f"POST {CHAT} HTTP/{version}\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(BODY)}\r\n\r\n"
    writer.write(head.encode() + BODY)
    return reader, writer


async def hang_up(writer):
    """Close a raw connection."""
    writer.close()
    await writer.wait_closed()


def contents(text):
    """The text of a stream's deltas, which must end in [DONE]."""
    events = [line.removeprefix("data: ") for line in text.split("\n") if line.startswith("data: ")]
    assert events[-1] == "[DONE]"
    return "".join([choice["delta"].get("content", "") for event in events[:-1] for choice in json.loads(event)["choices"]])


async def test_http_1_0_gets_no_chunks(server):
    """A client of HTTP/1.0 gets the bare events, and the end of the connection as their end."""
    server.engine.script = server.say("Hello!", finish="length")
    reader, writer = await ask(server, version="1.0")
    head, _, body = (await reader.read()).partition(b"\r\n\r\n")
    await hang_up(writer)
    assert b"chunked" not in head.lower()
    assert body.startswith(b"data: {")
    assert body.endswith(b"data: [DONE]\n\n")
    assert contents(body.decode()) == "Hello!"


async def test_a_client_that_does_not_read_leaves_its_tokens_with_the_engine_client(server):
    """Once its buffers are full nothing more is taken for it, other streams go on, and it gets every byte when it reads again."""
    server.engine.script = None
    reader, writer = await ask(server, narrow=True)
    stuck = await server.generation(0)
    stuck.put([120] * 3_000_000)  # more than the sockets hold
    await asyncio.sleep(0.1)
    for _ in range(50):
        stuck.put([121])
    stuck.put([122], finish="length")
    await asyncio.sleep(0.05)
    assert len(stuck._deltas) == 51
    other = asyncio.create_task(server.events(CHAT, {"messages": [{"role": "user", "content": "hi"}], "stream": True}))
    (await server.generation(1)).put([65, 0], finish="stop")
    assert (await other)[-1] == "[DONE]"
    received = bytearray()
    while not received.endswith(b"[DONE]\n\n\r\n0\r\n\r\n"):
        received += await reader.read(1 << 20)
    await hang_up(writer)
    assert received.count(b"x") >= 3_000_000
    assert received.count(b'"content":"y"') == 50
    assert received.index(b'"content":"y"') < received.index(b'"content":"z"')
    record = await server.record(2)
    assert (record.num_generated_tokens, record.num_written_tokens) == (3_000_051, 3_000_051)


async def test_choices_that_gain_together_are_written_together(server):
    """The pieces that one tick brings for several choices leave in one chunk."""
    server.engine.script = None
    writes = []
    add = WriteBatch.add
    batch_add = lambda batch, transport, data: (writes.append(data), add(batch, transport, data))  # noqa: E731
    WriteBatch.add = batch_add
    try:
        events = asyncio.create_task(server.events(CHAT, {"messages": [{"role": "user", "content": "hi"}], "stream": True, "n": 3}))
        generations = [await server.generation(index) for index in range(3)]
        for text in "ab":
            for generation in generations:
                generation.put([ord(text)])
            await asyncio.sleep(0.02)
        for generation in generations:
            generation.put([ord("c")], finish="length")
        assert (await events)[-1] == "[DONE]"
    finally:
        WriteBatch.add = add
    assert [data.count(b"data: ") for data in writes] == [3, 7]  # text; text and end of each, [DONE]


class _Transport:
    """Remembers what is written."""

    def __init__(self, log, name):
        self.log, self.name, self.closing = log, name, False

    def is_closing(self):
        return self.closing

    def write(self, data):
        self.log.append((self.name, data))


async def test_a_batch_keeps_order_and_skips_what_has_closed():
    """Writes come in the next tick in the order of their adding, or at once at a flush; a transport that closed meanwhile is left out."""
    log = []
    batch = WriteBatch()
    one, two = _Transport(log, 1), _Transport(log, 2)
    for transport, data in ((one, b"a"), (two, b"b"), (one, b"c")):
        batch.add(transport, data)
    assert log == []
    two.closing = True
    await asyncio.sleep(0)
    assert log == [(1, b"a"), (1, b"c")]
    batch.add(one, b"d")
    batch.flush()
    assert log[-1] == (1, b"d")
    await asyncio.sleep(0)
    assert len(log) == 3

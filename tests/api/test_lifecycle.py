"""Loading, restarting, failing, draining, full queues and clients that leave."""

import asyncio
import socket

import msgspec
import pytest

from appliance.engine.wire import Heartbeat, SequenceEvent
from appliance.errors import Unavailable

CHAT = "/v1/chat/completions"
ASK = {"messages": [{"role": "user", "content": "hi"}]}


def heartbeat(server, *, started_ago=0.0, deadline=60.0, phase="load", progress=0.0):
    """A heartbeat whose phase began `started_ago` seconds ago."""
    server.engine.heartbeat = Heartbeat(phase, server.services.clock.monotonic() - started_ago, deadline, progress)


async def rejected(server, code):
    """A request is turned away with 503, Retry-After, `code`, one rejection and one record."""
    status, body, headers = await server.post(CHAT, ASK)
    assert status == 503
    assert body["error"]["code"] == code
    assert int(headers["Retry-After"]) >= 1
    assert ("rejected", code) in server.observer.calls
    record = await server.record()
    assert (record.status, record.error_code) == (503, code)
    return headers


async def test_while_loading_requests_get_503_with_the_time_left(server):
    """Requests and /ready answer 503 and extrapolate Retry-After from the load's progress; /health is 200."""
    server.engine.state, server.engine.ready = "starting", None
    heartbeat(server, started_ago=10, progress=0.5)
    headers = await rejected(server, "loading")
    assert headers["Retry-After"] in ("10", "11")
    status, body, headers = await server.get("/ready")
    assert (status, body["error"]["code"]) == (503, "loading")
    assert "load, 50%" in body["error"]["message"]
    assert int(headers["Retry-After"]) >= 1
    assert (await server.get("/health"))[0] == 200
    status, body, _ = await server.get("/v1/models")
    assert body["data"][0]["max_model_len"] is None


async def test_a_restarting_engine_is_waited_for(server):
    """While the engine restarts, /ready is 503 but a request waits and is served."""
    server.engine.state = "restarting"
    status, body, _ = await server.get("/ready")
    assert (status, body["error"]["code"]) == (503, "engine_restarting")
    assert (await server.get("/health"))[0] == 200
    assert (await server.post(CHAT, ASK))[0] == 200


async def test_a_failed_engine_is_unhealthy(server):
    """Once the engine is given up, /health and /ready are 503 and requests get 500 engine_failed."""
    server.engine.state = "failed"
    assert (await server.get("/health"))[0] == 503
    status, body, headers = await server.get("/ready")
    assert (status, body["error"]["code"]) == (503, "engine_failed")
    assert "Retry-After" in headers
    status, body, _ = await server.post(CHAT, ASK)
    assert (status, body["error"]["code"]) == (500, "engine_failed")


@pytest.mark.parametrize(("phase", "spent", "status"), [("step", 59, 200), ("step", 61, 503), ("idle", 61, 503)])
async def test_a_phase_past_its_deadline_is_unhealthy(server, phase, spent, status):
    """A stuck step is no longer alive; a slow one is."""
    heartbeat(server, started_ago=spent, deadline=60, phase=phase)
    assert (await server.get("/health"))[0] == status
    assert (await server.get("/ready"))[0] == status


async def test_a_full_queue_rejects_before_the_engine(server):
    """Beyond max_waiting and the batch, requests get 503 queue_full at once."""
    server.engine.num_in_flight = server.services.settings.engine.max_waiting + 4
    await rejected(server, "queue_full")
    assert server.engine.generations == []


async def test_the_engines_own_rejection_counts_too(server):
    """A queue that turns out full in the engine is the same 503, submitted or not."""
    server.engine.refusal = Unavailable("full", code="queue_full", retry_after_seconds=3)
    headers = await rejected(server, "queue_full")
    assert headers["Retry-After"] == "3"


async def test_choices_submitted_before_a_refusal_are_aborted(server):
    """If the second choice is refused, the first does not run on."""
    submit = server.engine.submit

    def refuse_second(request):
        if server.engine.generations:
            raise Unavailable("full", code="queue_full")
        return submit(request)

    server.engine.script = None
    server.engine.submit = refuse_second
    status, _, _ = await server.post(CHAT, {**ASK, "n": 2})
    assert status == 503
    assert server.engine.generations[0].aborted


async def test_draining_finishes_what_is_open_and_takes_nothing_new(server):
    """A drain lets the open stream end, turns new requests away and closes their connections; wait_idle returns after the last byte."""
    server.engine.script = None
    stream = asyncio.create_task(server.events(CHAT, {**ASK, "stream": True}))
    generation = await server.generation()
    drain = server.services.drain
    drain.begin()
    idle = asyncio.create_task(drain.wait_idle())
    status, body, headers = await server.post(CHAT, ASK)
    assert (status, body["error"]["code"]) == (503, "draining")
    assert headers["Connection"] == "close"
    assert (await server.get("/ready"))[0] == 503
    assert (await server.get("/health"))[0] == 200
    assert not idle.done()
    generation.put([*b"end", 0], finish="stop")
    assert (await stream)[-1] == "[DONE]"
    await idle
    assert drain.num_open == 0


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("n", [1, 3])
async def test_a_client_that_leaves_aborts_its_sequences(server, stream, n):
    """Closing the connection aborts every choice at once and leaves a 499 record whose states still sum up."""
    server.engine.script = None
    response = asyncio.create_task(server.session.post(server.url + CHAT, json={**ASK, "stream": stream, "n": n}))
    await server.generation(n - 1)
    if stream:
        server.engine.generations[0].put([65])
        reply = await response
        await reply.content.readany()
        reply.close()
    else:
        response.cancel()
    record = await server.record()
    assert all(generation.aborted for generation in server.engine.generations)
    assert (record.status, record.finish_reason, record.error_code) == (499, "abort", "client_disconnected")
    assert record.num_generated_tokens == record.num_written_tokens == (1 if stream else 0)
    assert sum(record.states.values()) == pytest.approx(record.duration_seconds, abs=1e-9)
    assert server.services.drain.num_open == 0


async def test_a_client_that_leaves_is_no_fault_of_the_server(server, caplog):
    """Disconnects at any point are not logged as errors."""
    server.engine.script = None
    for stream in (True, False):
        request = asyncio.create_task(server.session.post(server.url + CHAT, json={**ASK, "stream": stream}))
        number = len(server.engine.generations)
        await server.generation(number)
        request.cancel()
        await server.record(number + 1)
    assert [record for record in caplog.records if record.levelname in ("ERROR", "WARNING")] == []


async def test_a_client_that_leaves_while_sending_is_recorded(server):
    """A body that never ends because the client left makes a 499, and no sequence."""
    host, port = server.url.removeprefix("http://").split(":")
    _, writer = await asyncio.open_connection(host, int(port))
    writer.write(f"POST {CHAT} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 500\r\n\r\n{{".encode())
    await writer.drain()
    await server.until(lambda: server.services.drain.num_open == 1)
    writer.close()
    await writer.wait_closed()
    assert (await server.record()).status == 499
    assert server.engine.generations == []


async def test_a_slow_reader_shows_as_write_blocked(server):
    """Time in which the client does not take what is ready counts as write_blocked, not as decode."""
    server.engine.script = None
    host, port = server.url.removeprefix("http://").split(":")
    narrow = socket.socket()
    narrow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    narrow.setblocking(False)
    await asyncio.get_running_loop().sock_connect(narrow, (host, int(port)))
    reader, writer = await asyncio.open_connection(sock=narrow, limit=1024)
    body = b'{"messages": [{"role": "user", "content": "hi"}], "stream": true, "ignore_eos": true}'
    writer.write(f"POST {CHAT} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body)
    generation = await server.generation()
    generation.put([299] * 600_000)  # 6.6 MB of text: more than the sockets' buffers hold
    await asyncio.sleep(0.8)
    generation.put([66], finish="length")
    tail = b""
    while b"[DONE]" not in tail:
        tail = (tail + await reader.read(1 << 20))[-100:]
    writer.close()
    await writer.wait_closed()
    record = await server.record()
    assert record.states["write_blocked"] > 0.15
    assert sum(record.states.values()) == pytest.approx(record.duration_seconds, abs=1e-9)


async def test_the_record_of_a_request_holds_its_numbers(server):
    """Counts, times and the engine's events end up in one record, with states that sum to the duration exactly."""
    server.engine.script = None
    clock = server.services.clock
    events = asyncio.create_task(server.events(CHAT, {**ASK, "stream": True, "seed": 9, "max_tokens": 50}))
    generation = await server.generation()
    generation.num_cached_tokens, generation.num_preemptions, generation.num_restarts = 16, 2, 1

    def event(kind):
        return SequenceEvent(0, kind, clock.monotonic())

    pause = 0.01
    for kind in ("queued", "scheduled", "prefill_wait", "prefill", "prefilled", "preempted", "resumed", "engine_restart", "resumed"):
        generation.put(events=[event(kind)])
        await asyncio.sleep(pause)
    generation.put([65])
    await asyncio.sleep(pause)
    generation.put([66, 0], finish="stop")
    await events
    record = await server.record()
    assert (record.endpoint, record.model, record.stream, record.status) == (CHAT, "tiny", True, 200)
    assert (record.num_prompt_tokens, record.num_cached_tokens) == (len(b"<user>hi<assistant>"), 16)
    assert (record.num_generated_tokens, record.num_written_tokens) == (3, 3)
    assert (record.num_preemptions, record.num_engine_restarts) == (2, 1)
    assert (record.finish_reason, record.error_code, record.seed, record.max_tokens) == ("stop", None, 9, 50)
    assert record.ttft_seconds >= 9 * pause
    assert record.tpot_seconds >= pause / 2
    assert record.max_itl_seconds >= pause
    assert sum(record.states.values()) == pytest.approx(record.duration_seconds, abs=1e-9)
    for state in ("queued", "prefill_wait", "prefill", "decode", "preempted", "engine_restart"):
        assert record.states[state] >= 0.9 * pause, state
    assert record.states["decode"] < 5 * pause
    assert server.observer.records == server.records
    assert msgspec.json.encode(record)
    assert server.observer.calls == [("received", CHAT), ("admitted", record.num_prompt_tokens, 50), ("first_token",)]


async def test_what_was_sampled_beyond_a_stop_string_is_generated_but_not_written(server):
    """Surplus tokens behind a stop string count as generated, not as written."""
    server.engine.script = server.say("aSTOPbcd", group=100)
    await server.post(CHAT, {**ASK, "stop": "STOP"})
    record = await server.record()
    assert (record.num_generated_tokens, record.num_written_tokens) == (9, 5)


async def test_the_server_stopping_ends_a_request_as_503(start_server):
    """A handler that is cancelled while its client is still there is recorded as aborted by the server."""
    server = await start_server()
    server.engine.script = None
    request = asyncio.create_task(server.session.post(server.url + CHAT, json=ASK))
    await server.generation()
    handler = next(task for task in asyncio.all_tasks() if "_handle_request" in repr(task) or "RequestHandler.start" in repr(task))
    handler.cancel()
    with pytest.raises(Exception, match="disconnected"):
        await request
    record = await server.record()
    assert (record.status, record.error_code) == (503, "aborted")
    assert server.engine.generations[0].aborted

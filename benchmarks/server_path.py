"""Server CPU per token, from the engine's frame to the client's socket: everything but the engine is real.

Three processes: a paced engine that only sends frames, the server (aiohttp under uvloop, the supervised engine client, the recorder), and a client
that only drains bytes. One token a stream a step. CPU is the server's own, user and system, over the middle of each run; what an idle
server spends on the same steps is not taken off. Loopback charges the sender with the receiver's share of TCP: `floor` is a bare `send` of the
same bytes to the same client.
Usage: python benchmarks/server_path.py [--streams 1 64 256] [--steps-per-second 50] [--profile FILE]
"""

from __future__ import annotations

import argparse
import asyncio
import cProfile
import json
import os
import resource
import select
import socket
import subprocess
import sys
import time
from collections.abc import Sequence

import uvloop
from aiohttp import web

from appliance.api.app import create_app
from appliance.api.keys import ApiKeys
from appliance.api.services import Drain, Services
from appliance.clock import SystemClock
from appliance.engine.supervisor import SupervisedEngine
from appliance.engine.wire import FrameReader, Heartbeat, Ready, SequenceEvent, Start, StepOutput, Submit, ToEngine, encode, pack_ids
from appliance.events import EngineEvent, RequestRecord, StepStats
from appliance.metrics.goodput import Slo
from appliance.metrics.recorder import Recorder
from appliance.settings import Settings
from appliance.text.chat_template import ChatTemplate
from appliance.text.load import TextModel
from appliance.text.tokenizer import ByteTokenizer

_TEXT = "The quick brown fox jumps over the lazy dog; naïvely, it said “hello” and was gone. "
_PIN = "SERVER_PATH_PIN"  # in the environment: the first core is the server's alone
_WARM_STEPS = 0.2  # share of a run's steps before counting begins; as much is left out at its end
_ENDPOINTS = {"chat": "/v1/chat/completions", "completions": "/v1/completions", "whole": "/v1/completions"}


def _pin(*, server: bool) -> None:
    """Keep the server on the first core and the others off it, if asked to."""
    if os.environ.get(_PIN) and (os.cpu_count() or 1) > 1:
        os.sched_setaffinity(0, {0} if server else set(range(1, os.cpu_count() or 2)))


# The engine process.


def run_engine(fd: int, num_streams: int, steps_per_second: float) -> None:
    """Wait for `num_streams` sequences, then give each a token a step until all have what they asked for; again and again."""
    sock = socket.socket(fileno=fd)
    reader = FrameReader(ToEngine)
    counts = dict.fromkeys(("max_num_batched_tokens", "block_size", "num_blocks", "num_parameters", "weight_bytes", "kv_bytes_per_token"), 1)
    sock.sendall(encode(Heartbeat("idle", time.monotonic(), 1e9)))
    ready = Ready(
        device="none", dtype="x", quantization="x", vocab_size=256, context_length=100_000, max_num_seqs=512, load_seconds=0.0, reasons=(), **counts
    )
    sock.sendall(encode(ready))
    waiting: list[Submit] = []
    while True:
        while len(waiting) < num_streams:
            readable, _, _ = select.select([sock], [], [], 1.0)
            if readable:
                if not (data := sock.recv(1 << 20)):
                    return
                waiting += [message for message in reader.feed(data) if isinstance(message, Submit)]
            sock.sendall(encode(Heartbeat("idle", time.monotonic(), 1e9)))
        _play(sock, waiting[:num_streams], steps_per_second)
        del waiting[:num_streams]


def _play(sock: socket.socket, batch: Sequence[Submit], steps_per_second: float) -> None:
    ids = [submit.sequence_id for submit in batch]
    packed, num_steps, text = pack_ids(ids), batch[0].sampling.max_tokens, _TEXT.encode()
    stats = StepStats(
        **{**dict.fromkeys(StepStats.__struct_fields__, 0), "chunks": (), "block_ends": None, "graph_hit": True, "num_running": len(ids)}
    )  # type: ignore[arg-type]
    events = tuple(SequenceEvent(sequence_id, kind, time.monotonic()) for sequence_id in ids for kind in ("scheduled", "prefilled"))
    next_at = time.monotonic()
    for step in range(num_steps):
        tokens = pack_ids([text[(step + row) % len(text)] for row in range(len(ids))])
        finished = tuple((sequence_id, "length", "") for sequence_id in ids) if step == num_steps - 1 else ()
        sock.sendall(encode(StepOutput(stats=stats, sequence_ids=packed, token_ids=tokens, finished=finished, events=events if not step else ())))
        next_at += 1.0 / steps_per_second
        time.sleep(max(0.0, next_at - time.monotonic()))


# The client process.


def run_client(port: int, kind: str, num_streams: int, num_tokens: int, prompt_tokens: int) -> None:
    """Open the streams, drain them to their ends, print one JSON line: bytes, seconds, gaps between arrivals (s)."""
    request = {"max_tokens": num_tokens, "stream": kind != "whole", "ignore_eos": True, "temperature": 0}
    prompt = "x" * prompt_tokens
    body = json.dumps(request | ({"messages": [{"role": "user", "content": prompt}]} if kind == "chat" else {"prompt": prompt})).encode()
    head = f"POST {_ENDPOINTS[kind]} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n".encode()
    epoll, socks = select.epoll(), {}
    for _ in range(num_streams):
        sock = socket.create_connection(("127.0.0.1", port))
        sock.sendall(head + body)
        socks[sock.fileno()] = sock
        epoll.register(sock.fileno(), select.EPOLLIN)
    num_bytes, num_events, gaps, last_at, tails = 0, 0, [], dict.fromkeys(socks, 0.0), dict.fromkeys(socks, b"")
    ending = b"\r\n0\r\n\r\n" if kind != "whole" else b"}"
    while socks:
        for fd, _ in epoll.poll():
            data = socks[fd].recv(1 << 16)
            now = time.monotonic()
            if last_at[fd]:
                gaps.append(now - last_at[fd])
            last_at[fd] = now
            num_bytes += len(data)
            num_events += data.count(b"data: ")
            tails[fd] = (tails[fd] + data[-8:])[-8:]
            if not data or tails[fd].endswith(ending):
                epoll.unregister(fd)
                socks.pop(fd).close()
    gaps.sort()
    shares = {f"gap_p{share}": round(gaps[int(len(gaps) * share / 100)] * 1e3, 2) for share in (50, 99)} if gaps else {}
    print(json.dumps({"bytes": num_bytes, "events": num_events, **shares}), flush=True)


# The server process.


class _Reports:
    """The recorder as EngineObserver, that also notes the CPU time at two steps of a run."""

    def __init__(self, recorder: Recorder) -> None:
        self._recorder = recorder
        self.on_gaps = recorder.on_gaps
        self.profile: cProfile.Profile | None = None
        self.begin(0, 0)

    def begin(self, first: int, last: int) -> None:
        self.num_steps, self._first, self._last = 0, first, last
        self.marks: list[tuple[float, float, float]] = []

    def on_step(self, stats: StepStats) -> None:
        self._recorder.on_step(stats)
        self.num_steps += 1
        if self.num_steps in (self._first, self._last):
            usage = resource.getrusage(resource.RUSAGE_SELF)
            self.marks.append((usage.ru_utime, usage.ru_stime, time.monotonic()))
            if self.profile is not None:
                (self.profile.enable if self.num_steps == self._first else self.profile.disable)()

    def on_engine_event(self, event: EngineEvent) -> None:
        self._recorder.on_engine_event(event)


async def _measure(kind: str, num_streams: int, steps_per_second: float, num_steps: int, profile: cProfile.Profile | None) -> dict[str, object]:
    clock = SystemClock()
    recorder = Recorder(clock=clock, slo=Slo(0.5, 0.03))
    reports = _Reports(recorder)
    reports.profile = profile
    command = (sys.executable, __file__, "--engine", str(num_streams), str(steps_per_second))
    engine = SupervisedEngine(Start(model_path="none", cache_dir="/nonexistent"), clock=clock, observer=reports, command=command)
    records: list[RequestRecord] = []
    template = ChatTemplate("{% for message in messages %}{{ message['content'] }}{% endfor %}", {})
    services = Services(
        settings=Settings.model_validate({"state_dir": "/nonexistent"}),
        engine=engine,
        text=TextModel(ByteTokenizer(), template, (0,)),
        clock=clock,
        model_name="SmolLM2-135M-Instruct",
        keys=ApiKeys(None),
        drain=Drain(),
        observer=recorder,
        metrics_text=recorder.exposition,
        on_record=records.append,
    )
    runner = web.AppRunner(create_app(services), handler_cancellation=True, access_log=None)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0, backlog=1024).start()
    await engine.start()
    await engine.wait_ready(20.0)
    warm = max(1, int(num_steps * _WARM_STEPS))
    reports.begin(warm, num_steps - warm)
    client = await asyncio.create_subprocess_exec(
        sys.executable, __file__, "--client", *map(str, (runner.addresses[0][1], kind, num_streams, num_steps, 32)), stdout=subprocess.PIPE
    )
    printed, _ = await client.communicate()
    await engine.close()
    await runner.cleanup()
    if sum(record.num_written_tokens for record in records) != num_streams * num_steps:
        raise SystemExit(f"written: {sum(record.num_written_tokens for record in records)} tokens of {num_streams * num_steps}")
    (user0, system0, at0), (user1, system1, at1) = reports.marks
    num_tokens = num_streams * (num_steps - 2 * warm)
    facts = json.loads(printed)
    return {
        "kind": kind,
        "streams": num_streams,
        "tok_s": round(num_tokens / (at1 - at0)),
        "us_per_token": round((user1 - user0 + system1 - system0) / num_tokens * 1e6, 2),
        "user_us": round((user1 - user0) / num_tokens * 1e6, 2),
        "system_us": round((system1 - system0) / num_tokens * 1e6, 2),
        "busy": round((user1 - user0 + system1 - system0) / (at1 - at0), 3),
        "bytes_per_token": round(facts["bytes"] / (num_streams * num_steps), 1),
        "detokenize_share": round(sum(r.states["detokenize"] for r in records) / sum(r.duration_seconds for r in records), 4),
        "events_per_token": round(facts["events"] / (num_streams * num_steps), 3),
        **{name: value for name, value in facts.items() if name.startswith("gap")},
    }


def _floor(num_streams: int, num_bytes: int, num_steps: int) -> float:
    """Microseconds of CPU of one bare send of `num_bytes` to a client that drains, over `num_streams` sockets in turn."""
    listener = socket.create_server(("127.0.0.1", 0), backlog=1024)
    client = os.fork()
    if not client:
        _pin(server=False)
        _drain([socket.create_connection(listener.getsockname()) for _ in range(num_streams)])
        os._exit(0)
    socks = [listener.accept()[0] for _ in range(num_streams)]
    for sock in socks:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    data, spent = b"x" * num_bytes, 0.0
    for _ in range(num_steps):
        time.sleep(0.01)
        began = time.process_time()
        for sock in socks:
            sock.send(data)
        spent += time.process_time() - began
    for sock in socks:
        sock.close()
    os.waitpid(client, 0)
    return spent / (num_steps * num_streams) * 1e6


def _drain(socks: list[socket.socket]) -> None:
    epoll = select.epoll()
    for sock in socks:
        epoll.register(sock.fileno(), select.EPOLLIN)
    by_fd = {sock.fileno(): sock for sock in socks}
    while all(by_fd[fd].recv(1 << 16) for fd, _ in epoll.poll()):
        pass


def main() -> None:
    """Measure, or be one of the other two processes."""
    parser = argparse.ArgumentParser(description="server CPU per token")
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 64, 256])
    parser.add_argument("--kinds", nargs="+", choices=_ENDPOINTS, default=list(_ENDPOINTS))
    parser.add_argument("--steps-per-second", type=float, default=50.0)
    parser.add_argument("--num-steps", type=int, default=200)
    parser.add_argument("--profile", help="write cProfile's statistics of the counted steps here; the figures are then not to be used")
    parser.add_argument("--pin", action="store_true", help="keep the first core for the server alone")
    parser.add_argument("--engine", nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--fd", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--client", nargs=5, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.pin:
        os.environ[_PIN] = "1"
    _pin(server=not (options.engine or options.client))
    if options.engine:
        run_engine(options.fd, int(options.engine[0]), float(options.engine[1]))
        return
    if options.client:
        port, kind, *numbers = options.client
        run_client(int(port), kind, *map(int, numbers))
        return
    for num_streams in options.streams:
        print(json.dumps({"floor_us": round(_floor(num_streams, 260, 100), 2), "streams": num_streams, "bytes": 260}), flush=True)
        for kind in options.kinds:
            profile = cProfile.Profile() if options.profile else None
            print(json.dumps(uvloop.run(_measure(kind, num_streams, options.steps_per_second, options.num_steps, profile))), flush=True)
            if profile is not None:
                profile.dump_stats(options.profile)


if __name__ == "__main__":
    main()

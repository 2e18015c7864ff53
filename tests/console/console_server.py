"""A console in front of seeded SQL and an engine in memory: real aiohttp on loopback, nothing behind it."""

from __future__ import annotations

import asyncio
import collections
import math
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
from aiohttp import web
from sqlalchemy import insert

from appliance.api.app import create_app
from appliance.api.context import KEY_ID
from appliance.api.keys import ApiKeys
from appliance.api.services import Drain, Services
from appliance.clock import Clock, SystemClock
from appliance.console.assembly import Keys, make_console
from appliance.console.routes import Console
from appliance.engine.client import Delta, SequenceRequest
from appliance.engine.wire import Heartbeat, Ready, SequenceEvent
from appliance.events import EngineEvent, LedgerState, RequestRecord, Sample, ScaleDecision, StepStats
from appliance.metrics.goodput import Slo
from appliance.metrics.hardware import HardwareReading, ProcessReading
from appliance.metrics.nvml import GpuReading
from appliance.metrics.recorder import Recorder
from appliance.settings import Settings
from appliance.store.database import Database
from appliance.store.outbox import Outbox
from appliance.store.rows import TABLES, completed, row_of
from appliance.text.chat_template import ChatTemplate
from appliance.text.load import TextModel
from appliance.text.tokenizer import ByteTokenizer

EOS = 0
INSTANCE = "gpu-7"
REPLY = "Paris is the capital of France. It lies on the Seine."
TEMPLATE = "{% for message in messages %}<{{ message['role'] }}>{{ message['content'] }}{% endfor %}"
READY = Ready(
    device="NVIDIA H100 80GB HBM3",
    dtype="bfloat16",
    quantization="none",
    vocab_size=300,
    context_length=32768,
    max_num_seqs=256,
    max_num_batched_tokens=8192,
    block_size=16,
    num_blocks=39000,
    num_parameters=596_049_920,
    weight_bytes=1_192_099_840,
    kv_bytes_per_token=114_688,
    load_seconds=7.4,
    reasons=("39000 blocks fill what is left of 90 % of the device's memory",),
)


class FakeGeneration:
    """A sequence that says REPLY, `pace_seconds` between its tokens."""

    num_cached_tokens = num_preemptions = num_restarts = 0

    def __init__(self, request: SequenceRequest, sequence_id: int, pace_seconds: float) -> None:
        self.request = request
        self.sequence_id = sequence_id
        self.bill = SimpleNamespace(seconds=0.1, joules=None)
        self._ready: collections.deque[Delta] = collections.deque()
        self._listener: Callable[[], None] | None = None
        self._task = asyncio.create_task(self._speak(pace_seconds))

    async def _speak(self, pace_seconds: float) -> None:
        loop = asyncio.get_running_loop()
        ids = [*REPLY.encode(), EOS]
        for start in range(0, len(ids), 4):
            group = ids[start : start + 4]
            last = start + 4 >= len(ids)
            events = [SequenceEvent(self.sequence_id, "scheduled", loop.time()), SequenceEvent(self.sequence_id, "prefilled", loop.time())]
            self._ready.append(Delta(group, [loop.time()] * len(group), None, events if start == 0 else [], "stop" if last else None, None))
            if self._listener is not None:
                self._listener()
            await asyncio.sleep(pace_seconds)

    def take(self) -> Delta:
        return self._ready.popleft() if self._ready else Delta([], [], None, [], None, None)

    def listen(self, listener: Callable[[], None], *, every_token: bool) -> None:
        self._listener = listener
        if self._ready:
            asyncio.get_running_loop().call_soon(listener)

    async def next(self) -> Delta:
        raise NotImplementedError("the API listens")

    def abort(self) -> None:
        self._task.cancel()

    def finish(self, num_tokens: int) -> None:
        pass


class FakeEngine:
    """An EngineClient in memory, in whatever state a test wants."""

    def __init__(self) -> None:
        self.state = "ready"
        self.ready: Ready | None = READY
        self.heartbeat: Heartbeat | None = None
        self.pid: int | None = 1
        self.num_in_flight = 0
        self.pace_seconds = 0.01

    async def start(self) -> None:
        pass

    async def wait_ready(self, timeout_seconds: float | None = None) -> Ready:
        return READY

    def submit(self, request: SequenceRequest) -> FakeGeneration:
        return FakeGeneration(request, 1, self.pace_seconds)

    async def close(self) -> None:
        pass


def make_samples(now: float, seconds: float, period: float = 10.0) -> Iterator[Sample]:
    """A day's wave of traffic on one GPU, sampled every `period`, up to `now`."""
    for index in range(int(seconds / period)):
        at = now - period * index
        load = _load(at)
        tokens = max(0, int(9000 * load * period))
        overloaded = load > 0.93
        fields = {
            "at_wall": at,
            "period_seconds": period,
            "engine_state": "ready",
            "num_requests": int(tokens / 180),
            "num_errors": int(index % 97 == 0),
            "num_rejected": 4 if overloaded else 0,
            "num_good_requests": int(tokens / 180 * (0.94 if overloaded else 0.998)),
            "num_prompt_tokens": int(tokens * 2.6),
            "num_cached_tokens": int(tokens * 0.9),
            "num_generated_tokens": tokens,
            "num_surplus_tokens": tokens // 500,
            "num_preemptions": 0,
            "num_aborted": 0,
            "num_steps": int(period / 0.011),
            "step_seconds": period * load,
            "ttft_p50_seconds": 0.06 + 0.09 * load,
            "ttft_p95_seconds": 0.14 + 0.38 * load**4,
            "tpot_p50_seconds": 0.007 + 0.006 * load,
            "tpot_p95_seconds": 0.009 + 0.016 * load,
            "goodput": 0.94 if overloaded else 0.998,
            "num_running": int(128 * load),
            "num_waiting": 12 if overloaded else 0,
            "oldest_waiting_age_seconds": 0.31 if overloaded else 0.0,
            "kv_utilisation": 0.2 + 0.6 * load,
            "kv_cached_share": 0.15,
            "kv_waste": 0.04,
            "cpu_utilisation": 0.2 + 0.1 * load,
            "memory_used_bytes": 21 << 30,
            "server_cpu_seconds": 1.0,
            "server_resident_bytes": 300 << 20,
            "engine_cpu_seconds": 9.0,
            "engine_resident_bytes": 4 << 30,
            "gpu_utilisation": min(1.0, 0.5 + 0.5 * load),
            "gpu_memory_used_bytes": 72 << 30,
            "gpu_power_watts": 180 + 420 * load,
            "gpu_temperature_celsius": 48 + 20 * load,
            "gpu_joules": (180 + 420 * load) * period,
        }
        yield Sample(**({field.name: 0 for field in msgspec.structs.fields(Sample) if field.required} | fields))  # type: ignore[arg-type]


def make_record(now: float, index: int, **changes: Any) -> RequestRecord:
    """The request received `3 * index` seconds before `now`; its states sum to its duration."""
    states = dict.fromkeys((state.value for state in LedgerState), 0.0)
    decode = 1.2 + (index % 7) * 0.4
    failed = index % 13 == 5
    states |= {"received": 0.0004, "admitted": 0.0021, "queued": 0.02 * (index % 5), "prefill_wait": 0.012, "prefill": 0.06, "decode": decode}
    states |= {"detokenize": 0.011, "write_blocked": 0.004 * (index % 3)}
    if index % 11 == 4:
        states["preempted"] = 0.35
    if failed:
        states |= {"prefill_wait": 0.0, "prefill": 0.0, "decode": 0.0, "detokenize": 0.0, "queued": 0.0, "preempted": 0.0}
    fields: dict[str, Any] = {
        "id": f"01900000-0000-7000-8000-{index:012d}",
        "client_request_id": f"job-{index}" if index % 4 == 0 else None,
        "endpoint": "/v1/chat/completions",
        "model": "Qwen3-0.6B",
        "key_id": ("alice", "batch", "bob")[index % 3],
        "stream": True,
        "received_wall": now - 3.0 * index,
        "duration_seconds": sum(states.values()),
        "status": 503 if failed else 200,
        "finish_reason": None if failed else "stop",
        "error_code": "queue_full" if failed else None,
        "num_choices": 1,
        "num_prompt_tokens": 310 + index,
        "num_cached_tokens": 96,
        "num_generated_tokens": 0 if failed else 120 + index % 60,
        "num_written_tokens": 0 if failed else 120 + index % 60,
        "ttft_seconds": None if failed else 0.09 + 0.02 * (index % 5),
        "tpot_seconds": None if failed else 0.011,
        "max_itl_seconds": None if failed else 0.03,
        "num_preemptions": int(index % 11 == 4),
        "num_engine_restarts": 0,
        "states": states,
        "seed": 7,
        "joules": None if failed else 31.5,
    }
    return msgspec.convert(fields | changes, RequestRecord)


def make_decision(now: float, sequence: int, **changes: Any) -> ScaleDecision:
    """One decision, a minute older for each that follows."""
    fields: dict[str, Any] = {
        "id": f"01900000-0000-7000-9000-{sequence:012d}",
        "sequence": sequence,
        "at_wall": now - 600.0 * (4 - sequence),
        "expires_wall": now + 300.0,
        "instance_id": INSTANCE,
        "fleet": "blue",
        "direction": "up" if sequence % 2 else "down",
        "current_replicas": 1 if sequence % 2 else 2,
        "desired_replicas": 2 if sequence % 2 else 1,
        "reason": "91 % of first tokens came within 0.5 s over the last 30 s (the target is 99 %), and 12 sequences wait"
        if sequence % 2
        else "one replica would hold the highest load of the last 300 s at 62 % of its capacity",
        "inputs": {"ttft_attainment": 0.91, "num_waiting": 12.0, "kv_utilisation": 0.81, "output_tokens_per_second": 8400.0},
        "alternatives": ("hold: the queue has grown for 20 s", "3 replicas: two hold the demand"),
        "mode": "approve",
    }
    return msgspec.convert(fields | changes, ScaleDecision)


def make_hardware() -> HardwareReading:
    """A host with one GPU."""
    process = ProcessReading(cpu_seconds=10.0, resident_bytes=300 << 20, num_fds=20, num_threads=9)
    gpu = GpuReading(
        index=0,
        name="NVIDIA H100 80GB HBM3",
        uuid="GPU-0",
        utilisation=0.83,
        memory_used_bytes=72 << 30,
        memory_bytes=80 << 30,
        power_watts=478.0,
        energy_joules=1e6 + 478.0 * time.monotonic(),
        temperature_celsius=61.0,
    )
    return HardwareReading(
        at=0.0,
        num_cpus=16,
        cpu_utilisation=0.27,
        memory_used_bytes=21 << 30,
        memory_bytes=128 << 30,
        disk_free_bytes=400 << 30,
        server=process,
        engine=process,
        gpus=(gpu,),
    )


async def seed(database: Database, now: float, *, seconds: float = 3600.0, num_requests: int = 130, num_decisions: int = 3) -> None:
    """Fill an empty database with samples, requests, decisions and engine events."""
    await database.migrate()
    events = [EngineEvent("started", now - 3600, "python -m appliance.engine.process", 71), EngineEvent("ready", now - 3592, "after 7.4 s", 71)]
    records = [make_record(now - 2.0, index) for index in range(num_requests)]
    async with database.begin() as connection:
        for rows in (list(make_samples(now, seconds)), records, events):
            named = [row_of(row, INSTANCE, "blue") for row in rows]
            name = named[0][0]
            await connection.execute(insert(TABLES[name]), [completed(name, row) for _, row in named])
    outbox = Outbox(database, instance_id=INSTANCE, fleet="blue")
    for sequence in range(1, num_decisions + 1):
        outcome = None if sequence == num_decisions else "delivered"
        await outbox.record(make_decision(now, sequence), [], outcome=outcome)


def work(recorder: Recorder) -> None:
    """Let the recorder see one busy step, 1,960 tokens and 40 finished requests, all good."""
    _step(recorder, [(0.0105, 96)] * 20, num_running=96, num_waiting=3)
    for index in range(40):
        recorder.on_admitted(300, 128)
        recorder.on_first_token(0.11 + 0.002 * index)
        recorder.on_request(make_record(recorder.clock.wall(), 0, duration_seconds=1.7))


async def keep_busy(recorder: Recorder) -> None:
    """Traffic that goes on where the seeded samples end, until it is cancelled."""
    period = 0.1
    requests = 0.0
    while True:
        load = _load(recorder.clock.wall())
        tokens = int(9000 * load * period)
        _step(recorder, [(0.007 + 0.006 * load, tokens)], num_running=int(128 * load), num_waiting=0)
        recorder.on_admitted(int(tokens * 2.6), tokens)
        requests += tokens / 180
        while requests >= 1.0:
            requests -= 1.0
            recorder.on_first_token(0.06 + 0.09 * load + 0.2 * load**4 * (recorder.clock.monotonic() * 7919 % 1.0) ** 6)
            recorder.on_request(make_record(recorder.clock.wall(), 0, num_generated_tokens=0, tpot_seconds=0.007 + 0.006 * load))
        await asyncio.sleep(period)


def _step(recorder: Recorder, gaps: Sequence[tuple[float, int]], *, num_running: int, num_waiting: int) -> None:
    used = 200 + int(600 * num_running / 128)
    values = {
        "num_sequences": num_running,
        "num_running": num_running,
        "num_waiting": num_waiting,
        "oldest_waiting_age_seconds": 0.12 if num_waiting else 0.0,
        "num_blocks": 1000,
        "num_used_blocks": used,
        "num_used_tokens": int(used * 16 * 0.96),
        "num_cached_blocks": 150,
        "graph_hit": True,
        "launch_seconds": 0.009,
    }
    zeros = {field.name: 0 for field in msgspec.structs.fields(StepStats) if field.required}
    recorder.on_step(StepStats(**(zeros | values)), gaps)  # type: ignore[arg-type]


def _load(at_wall: float) -> float:
    """Share of the GPU that is busy: a slow wave with a small one on it."""
    return 0.55 + 0.4 * math.sin(at_wall / 900) + 0.05 * math.sin(at_wall / 47)


@dataclass
class ConsoleServer:
    """A running server and its parts."""

    url: str
    engine: FakeEngine
    recorder: Recorder
    database: Database | None
    console: Console
    records: list[RequestRecord]


SCALING = {
    "instance_id": INSTANCE,
    "fleet": "blue",
    "mode": "approve",
    "desired_replicas": 2,
    "current_replicas": 1,
    "pinned": False,
    "sequence": 3,
    "age_seconds": 2.0,
    "hold": {"kind": "settled", "reason": "the last decision waits for approval"},
    "last_decision": {"id": "01900000-0000-7000-9000-000000000003"},
    "disabled_endpoints": [],
}


@asynccontextmanager
async def console_server(
    folder: Path,
    *,
    keys: dict[str, str] | None = None,
    database: Database | None = None,
    clock: Clock | None = None,
    engine: FakeEngine | None = None,
    instance_id: str = INSTANCE,
) -> AsyncIterator[ConsoleServer]:
    """The API with its console for the length of the block."""
    clock = clock or SystemClock()
    settings = Settings.model_validate({"state_dir": str(folder), "instance_id": instance_id, "fleet": "blue"})
    slo = Slo(0.5, 0.03, 0.99, "default of cuda for ttft and tpot")
    recorder = Recorder(clock=clock, slo=slo, version="1.2.3", model="Qwen3-0.6B", instance_id=INSTANCE, fleet="blue")
    engine = engine or FakeEngine()
    recorder.bind_engine(engine)
    api_keys = ApiKeys(keys)
    console = make_console(
        settings,
        clock=clock,
        recorder=recorder,
        engine=engine,
        model_name="Qwen3-0.6B",
        version="1.2.3",
        database=database,
        hardware=make_hardware,
        scaling=lambda: SCALING,
        keys=Keys(api_keys.name_of, api_keys.digest_of) if keys else None,
        secret_file=folder / "console.secret",
    )
    records: list[RequestRecord] = []
    services = Services(
        settings=settings,
        engine=engine,  # type: ignore[arg-type]
        text=TextModel(ByteTokenizer(), ChatTemplate(TEMPLATE, {}), (EOS,)),
        clock=clock,
        model_name="Qwen3-0.6B",
        keys=api_keys,
        drain=Drain(),
        observer=recorder,
        metrics_text=recorder.exposition,
        on_record=records.append,
        browser_login=console.login,
    )
    app = create_app(services)
    console.add_routes(app)
    approved: list[str] = []

    async def approve(request: web.Request) -> web.Response:
        approved.append(f"{request.match_info['decision_id']} by {request.get(KEY_ID, '')}")
        return web.json_response({"approved": request.match_info["decision_id"]})

    app.router.add_post("/v1/scale/decisions/{decision_id}/approve", approve)
    runner = web.AppRunner(app, handler_cancellation=True, access_log=None, shutdown_timeout=1.0)
    await runner.setup()
    try:
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        url = f"http://127.0.0.1:{runner.addresses[0][1]}"
        yield ConsoleServer(url, engine, recorder, database, console, records)
    finally:
        await runner.cleanup()

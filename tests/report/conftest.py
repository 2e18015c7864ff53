"""A day of an appliance in SQL, written by the writer itself, and a browser where one is installed."""

from __future__ import annotations

import math
import sys
import uuid
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path

import msgspec
import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "console"))

from console_browser import Browser, connected, find_chromium, running_chromium

from appliance.clock import ManualClock
from appliance.events import EngineEvent, LedgerState, RequestRecord, Sample, ScaleDecision
from appliance.metrics.goodput import Slo, judge
from appliance.report.collect import ReportData, collect
from appliance.settings import CostSettings, Settings, SloSettings, StoreSettings
from appliance.store.database import Database
from appliance.store.outbox import Outbox
from appliance.store.writer import StoreWriter

MIDNIGHT = 1_700_006_400.0  # 2023-11-15 00:00 UTC
HOSTILE = "<script>alert('x')</script>&\"</td>"
SLO = Slo(ttft_seconds=0.5, tpot_seconds=0.05, target=0.95)

PRICED = Settings(
    slo=SloSettings(ttft_seconds=0.5, tpot_seconds=0.05, target=0.95),
    cost=CostSettings(prompt_per_million=1.0, output_per_million=4.0, cached_per_million=0.5, currency="EUR"),
)


def make_request(index: int, at: float, **changes: object) -> RequestRecord:
    """The ledger record of a good request received at `at`."""
    fields: dict[str, object] = {
        "id": str(uuid.UUID(int=index)),
        "client_request_id": None,
        "endpoint": "/v1/chat/completions",
        "model": "tiny",
        "key_id": ("web", "batch")[index % 2],
        "stream": True,
        "received_wall": at,
        "duration_seconds": 1.0,
        "status": 200,
        "finish_reason": "stop",
        "error_code": None,
        "num_choices": 1,
        "num_prompt_tokens": 100,
        "num_cached_tokens": 20,
        "num_generated_tokens": 50,
        "num_written_tokens": 50,
        "ttft_seconds": 0.2,
        "tpot_seconds": 0.015,
        "max_itl_seconds": 0.03,
        "num_preemptions": 0,
        "num_engine_restarts": 0,
        "joules": 30.0,
        "states": {state.value: 0.0 for state in LedgerState} | {"queued": 0.1, "prefill": 0.1, "decode": 0.8},
    }
    return msgspec.convert(fields | changes, RequestRecord)


def make_sample(at: float, *, gpu: bool = True, **changes: object) -> Sample:
    """A sample of a server at work."""
    fields: dict[str, object] = {field.name: 0 if "int" in str(field.type) else 0.25 for field in msgspec.structs.fields(Sample)}
    swing = 1 + math.sin(at / 3600)
    fields |= {
        "at_wall": at,
        "period_seconds": 60.0,
        "engine_state": "ready",
        "num_requests": 6,
        "num_good_requests": 6,
        "num_generated_tokens": int(600 * swing) + 60,
        "num_prompt_tokens": int(1200 * swing) + 60,
        "goodput": 1.0,
        "num_running": 2,
        "oldest_waiting_age_seconds": 0.1,
        "gpu_power_watts": 400.0 if gpu else None,
        "gpu_joules": 24_000.0 if gpu else None,
        "gpu_utilisation": 0.5 if gpu else None,
    }
    return msgspec.convert(fields | changes, Sample)


def make_decision(sequence: int, at: float, **changes: object) -> ScaleDecision:
    """A wish for one more replica."""
    fields: dict[str, object] = {
        "id": str(uuid.UUID(int=10**6 + sequence)),
        "sequence": sequence,
        "at_wall": at,
        "expires_wall": at + 300,
        "instance_id": "node-1",
        "fleet": "blue",
        "direction": "up",
        "current_replicas": sequence,
        "desired_replicas": sequence + 1,
        "reason": f"the queue is 4.2 s old {HOSTILE}",
        "inputs": {"waiting": 3.0},
    }
    return msgspec.convert(fields | changes, ScaleDecision)


@pytest.fixture
def sample_of() -> Callable[..., Sample]:
    """`make_sample`, for tests."""
    return make_sample


@pytest.fixture
async def database(tmp_path: Path) -> AsyncIterator[Database]:
    """Empty, with the current schema."""
    database = Database(f"sqlite+aiosqlite:///{tmp_path / 'appliance.db'}")
    await database.migrate()
    yield database
    await database.close()


@pytest.fixture
async def fill(database: Database, tmp_path: Path) -> Callable[..., object]:
    """Writes requests, samples and events as the server would."""

    async def write(requests: list[RequestRecord], samples: list[Sample], events: list[EngineEvent], *, instance_id: str = "node-1") -> None:
        writer = StoreWriter(
            database,
            settings=StoreSettings(),
            clock=ManualClock(),
            spool_dir=tmp_path / f"spool-{instance_id}",
            instance_id=instance_id,
            fleet="blue",
            judge=lambda record: judge(record, SLO),
        )
        for record in requests:
            writer.put_request(record)
        for sample in samples:
            writer.put_sample(sample)
        for event in events:
            writer.put_engine_event(event)
        await writer.flush()
        await writer.close()
        assert writer.stats.num_refused_rows == writer.stats.num_dropped_rows == 0

    return write


@pytest.fixture
async def day(database: Database, fill: Callable[..., object]) -> Database:
    """From midnight to six: four hours as they should be, one with faults, one without a server; with text that is hostile wherever it can be."""
    requests = [make_request(index, MIDNIGHT + 60 * index) for index in range(240)]
    requests += [make_request(300 + index, MIDNIGHT + 4 * 3600 + 60 * index, ttft_seconds=2.0) for index in range(20)]
    bad = {"status": 500, "finish_reason": "error", "error_code": HOSTILE[:64], "ttft_seconds": None, "tpot_seconds": None}
    requests += [make_request(400 + index, MIDNIGHT + 4.5 * 3600 + index, **bad, num_generated_tokens=0, joules=None) for index in range(10)]
    slow = {"duration_seconds": 60.0, "client_request_id": "order-4711", "key_id": HOSTILE, "model": f"{HOSTILE}/model"}
    requests.append(make_request(500, MIDNIGHT + 3600, **slow, states={"queued": 10.0, "decode": 50.0}))
    samples = [make_sample(MIDNIGHT + 60 * minute) for minute in range(1, 300) if not 270 <= minute < 280]
    samples += [make_sample(MIDNIGHT + 60 * minute, engine_state="restarting", goodput=0.2, num_good_requests=1) for minute in range(270, 280)]
    crash = EngineEvent("crashed", MIDNIGHT + 4.5 * 3600, f"exit code -9 {HOSTILE}", 42, 7)
    ready = EngineEvent("ready", MIDNIGHT + 4.6 * 3600, "after 300 s", 43)
    await fill(requests, samples, [crash, ready])
    outbox = Outbox(database, instance_id="node-1", fleet="blue")
    await outbox.record(make_decision(1, MIDNIGHT + 4.4 * 3600))
    await outbox.record(make_decision(2, MIDNIGHT + 4.7 * 3600, direction="pinned"), outcome="expired")
    return database


@pytest.fixture
def collected(day: Database) -> Callable[..., object]:
    """Collects the day from midnight to six."""

    async def run(**changes: object) -> ReportData:
        options: dict[str, object] = {
            "since_wall": MIDNIGHT + 60,
            "until_wall": MIDNIGHT + 6 * 3600,
            "made_wall": MIDNIGHT + 6 * 3600,
            "settings": PRICED,
        }
        return await collect(day, **(options | changes))  # type: ignore[arg-type]

    return run


@pytest.fixture(scope="session")
def chromium(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a headless Chromium; the test is skipped where none is installed."""
    program = find_chromium()
    if program is None:
        pytest.skip("no Chromium is installed (Debian: apt-get install chromium)")
    with running_chromium(program, tmp_path_factory.mktemp("chromium")) as address:
        yield address


@pytest.fixture
async def browser(chromium: str) -> AsyncIterator[Browser]:
    """The browser, without pages of other tests."""
    async with connected(chromium) as browser:
        yield browser

"""Records, steps and a fake NVML to measure."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace

import msgspec
import pytest

from appliance.clock import ManualClock
from appliance.events import BlockEnds, LedgerState, RequestRecord, StepCosts, StepStats
from appliance.metrics.goodput import Slo
from appliance.metrics.recorder import Recorder


@pytest.fixture
def clock() -> ManualClock:
    return ManualClock()


@pytest.fixture
def slo() -> Slo:
    """Thresholds that are no edge of the catalogue's own."""
    return Slo(ttft_seconds=0.444, tpot_seconds=0.0333, target=0.95)


@pytest.fixture
def recorder(clock: ManualClock, slo: Slo) -> Recorder:
    return Recorder(clock=clock, slo=slo, version="1.2.3", model="smollm2", instance_id="node-1", fleet="blue")


@pytest.fixture
def make_record() -> Callable[..., RequestRecord]:
    """Makes the record of a good streamed chat request, with any field replaced."""

    def make(**changes: object) -> RequestRecord:
        fields: dict[str, object] = {
            "id": "01900000-0000-7000-8000-000000000001",
            "client_request_id": None,
            "endpoint": "/v1/chat/completions",
            "model": "smollm2",
            "key_id": "",
            "stream": True,
            "received_wall": 1_700_000_000.0,
            "duration_seconds": 2.0,
            "status": 200,
            "finish_reason": "stop",
            "error_code": None,
            "num_choices": 1,
            "num_prompt_tokens": 100,
            "num_cached_tokens": 16,
            "num_generated_tokens": 50,
            "num_written_tokens": 49,
            "ttft_seconds": 0.2,
            "tpot_seconds": 0.02,
            "max_itl_seconds": 0.05,
            "num_preemptions": 0,
            "num_engine_restarts": 0,
            "states": {state.value: 0.0 for state in LedgerState} | {"queued": 0.1, "prefill": 0.06, "prefill_wait": 0.04, "decode": 1.8},
        }
        return msgspec.convert(fields | changes, RequestRecord)

    return make


@pytest.fixture
def make_stats() -> Callable[..., StepStats]:
    """Makes the statistics of a mixed step, with any field replaced."""

    def make(**changes: object) -> StepStats:
        fields: dict[str, object] = {
            "step": 1,
            "started_at": 0.0,
            "schedule_seconds": 0.001,
            "launch_seconds": 0.002,
            "wait_seconds": 0.003,
            "output_seconds": 0.0005,
            "num_decode_tokens": 8,
            "num_prefill_tokens": 100,
            "num_sequences": 9,
            "num_running": 9,
            "num_waiting": 3,
            "oldest_waiting_age_seconds": 0.5,
            "num_blocks": 100,
            "num_used_blocks": 40,
            "num_cached_blocks": 10,
            "num_used_tokens": 608,
            "prefix_query_tokens": 100,
            "prefix_hit_tokens": 16,
            "num_preemptions": 1,
            "num_aborted": 2,
            "num_surplus_tokens": 3,
            "graph_hit": True,
            "free_bytes": 5,
            "busy_seconds": 0.006,
            "num_context_tokens": 4000,
            "num_sampled_tokens": 9,
            "num_backlog_tokens": 700,
            "num_findable_blocks": 30,
            "num_allocated_blocks": 7,
            "num_reused_blocks": 1,
            "num_evicted_blocks": 2,
            "chunks": ((1, 16, 84, True), (2, 0, 16, False)),
            "block_ends": BlockEnds(((11, 3),), 4.5, ((9, 2),), 0.8, ((0, 1), (2, 2)), 5),
        }
        return StepStats(**(fields | changes))  # type: ignore[arg-type]

    return make


COSTS = StepCosts(
    flops_per_token=1e9,
    flops_per_sample=1e8,
    flops_per_pair=1e5,
    weight_bytes=1_000_000_000,
    kv_bytes_per_token=10_000,
    peak_flops=1e15,
    peak_bytes_per_second=1e12,
)


class FakeEngine:
    """The client's attributes, settable."""

    state = "ready"
    pid: int | None = None
    num_in_flight = 0
    ready: object | None = SimpleNamespace(
        device="NVIDIA H100",
        dtype="bfloat16",
        quantization="none",
        block_size=16,
        num_blocks=100,
        kv_dtype="bfloat16",
        prefix_caching=True,
        max_num_seqs=16,
        costs=COSTS,
    )
    heartbeat: object | None = None
    serving_watts: float | None = None

    def set_serving_watts(self, watts: float | None) -> None:
        self.serving_watts = watts


@pytest.fixture
def engine(recorder: Recorder) -> FakeEngine:
    """An engine's client, bound to the recorder."""
    engine = FakeEngine()
    recorder.bind_engine(engine)
    return engine


class FakeNvml:
    """pynvml with two GPUs; the second one supports little. `xid` holds the errors that wait: device handles."""

    NVML_CLOCK_SM, NVML_CLOCK_MEM, NVML_TEMPERATURE_GPU, nvmlEventTypeXidCriticalError = 1, 2, 0, 8  # noqa: N815

    def __init__(self) -> None:
        self.xid: list[str] = []
        self.registered: list[str] = []
        self.millijoules = 5_000_000
        self.throttle = 0x1 | 0x40
        self.closed = False

    def nvmlDeviceGetCount(self) -> int:  # noqa: N802
        return 2

    def nvmlDeviceGetHandleByIndex(self, index: int) -> str:  # noqa: N802
        return f"handle{index}"

    def nvmlDeviceGetUUID(self, handle: str) -> str:  # noqa: N802
        return f"GPU-{handle}"

    def nvmlDeviceGetName(self, handle: str) -> bytes:  # noqa: N802
        return b"NVIDIA H100"

    def nvmlDeviceGetIndex(self, handle: str) -> int:  # noqa: N802
        return int(handle[-1])

    def nvmlDeviceGetUtilizationRates(self, handle: str) -> SimpleNamespace:  # noqa: N802
        return SimpleNamespace(gpu=75, memory=40)

    def nvmlDeviceGetMemoryInfo(self, handle: str) -> SimpleNamespace:  # noqa: N802
        return SimpleNamespace(used=10 << 30, total=80 << 30)

    def nvmlDeviceGetPowerUsage(self, handle: str) -> int:  # noqa: N802
        return 350_000

    def nvmlDeviceGetTotalEnergyConsumption(self, handle: str) -> int:  # noqa: N802
        return self._only_first(handle, self.millijoules)

    def nvmlDeviceGetTemperature(self, handle: str, sensor: int) -> int:  # noqa: N802
        return 60

    def nvmlDeviceGetClockInfo(self, handle: str, clock: int) -> int:  # noqa: N802
        return {1: 1980, 2: 2619}[clock]

    def nvmlDeviceGetCurrentClocksThrottleReasons(self, handle: str) -> int:  # noqa: N802
        return self._only_first(handle, self.throttle)

    def nvmlEventSetCreate(self) -> str:  # noqa: N802
        return "events"

    def nvmlDeviceRegisterEvents(self, handle: str, kind: int, events: str) -> None:  # noqa: N802
        self.registered.append(handle)

    def nvmlEventSetWait(self, events: str, milliseconds: int) -> SimpleNamespace:  # noqa: N802
        if not self.xid:
            raise TimeoutError
        return SimpleNamespace(device=self.xid.pop())

    def nvmlEventSetFree(self, events: str) -> None:  # noqa: N802
        pass

    def nvmlShutdown(self) -> None:  # noqa: N802
        self.closed = True

    def _only_first(self, handle: str, value: int) -> int:
        if handle != "handle0":
            raise RuntimeError("Not Supported")
        return value


@pytest.fixture
def fake_nvml() -> FakeNvml:
    return FakeNvml()


@pytest.fixture
def engine_class() -> type[FakeEngine]:
    """For tests that bind an engine to a recorder of their own."""
    return FakeEngine

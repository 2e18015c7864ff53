"""The gauges that are only known when asked: set from the engine's client, the SQL writer and the hardware reader right before a scrape."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from appliance.events import StepCosts, StepStats, StoreStats, WindowStats
from appliance.metrics.hardware import HardwareReading
from appliance.metrics.instruments import Instruments
from appliance.metrics.labels import ENGINE_STATES, THROTTLE_REASONS
from appliance.metrics.nvml import GpuReading

_GPU_GAUGES: tuple[tuple[str, Callable[[GpuReading], float | None]], ...] = (
    ("appliance_gpu_utilisation_ratio", lambda gpu: gpu.utilisation),
    ("appliance_gpu_memory_utilisation_ratio", lambda gpu: gpu.memory_utilisation),
    ("appliance_gpu_memory_used_bytes", lambda gpu: gpu.memory_used_bytes),
    ("appliance_gpu_memory_bytes", lambda gpu: gpu.memory_bytes),
    ("appliance_gpu_power_watts", lambda gpu: gpu.power_watts),
    ("appliance_gpu_energy_joules_total", lambda gpu: gpu.energy_joules),
    ("appliance_gpu_temperature_celsius", lambda gpu: gpu.temperature_celsius),
    ("appliance_gpu_sm_clock_hertz", lambda gpu: gpu.sm_clock_hertz),
    ("appliance_gpu_memory_clock_hertz", lambda gpu: gpu.memory_clock_hertz),
)


class EngineView(Protocol):
    """What is read of the engine's client."""

    @property
    def state(self) -> str: ...
    @property
    def pid(self) -> int | None: ...
    @property
    def num_in_flight(self) -> int: ...
    @property
    def ready(self) -> object | None: ...  # engine.wire.Ready; this package does not import the engine
    @property
    def heartbeat(self) -> object | None: ...
    def set_serving_watts(self, watts: float | None) -> None: ...


def costs_of(engine: EngineView | None) -> StepCosts:
    """What the newest engine's steps cost; all zeros while there is none."""
    costs = getattr(engine.ready, "costs", None) if engine is not None else None
    return costs if isinstance(costs, StepCosts) else StepCosts()


def set_kv(instruments: Instruments, stats: StepStats | None, kv: tuple[float, float, float] | None, block_bytes: int) -> None:
    """Pool gauges after the newest step; 0 while there is none."""
    cell = instruments.cell
    for name, value in zip(("utilisation", "cached", "waste"), kv or (0.0, 0.0, 0.0), strict=True):
        cell(f"appliance_kv_{name}_ratio").value = value
    cell("appliance_kv_blocks").value = stats.num_blocks if stats else 0
    cell("appliance_kv_used_blocks").value = stats.num_used_blocks if stats else 0
    cell("appliance_kv_cached_blocks").value = stats.num_findable_blocks if stats else 0
    cell("appliance_kv_evictable_blocks").value = stats.num_cached_blocks if stats else 0
    cell("appliance_kv_used_tokens").value = stats.num_used_tokens if stats else 0
    cell("appliance_kv_bytes").value = stats.num_blocks * block_bytes if stats else 0
    cell("appliance_kv_used_bytes").value = stats.num_used_blocks * block_bytes if stats else 0
    cell("appliance_backlog_tokens").value = stats.num_backlog_tokens if stats else 0
    cell("appliance_engine_free_bytes").value = stats.free_bytes if stats else 0


def set_engine(instruments: Instruments, engine: EngineView | None) -> None:
    """State, sequences in flight and facts of the engine."""
    state = "stopped" if engine is None else engine.state
    for known in ENGINE_STATES:
        instruments.cell("appliance_engine_state", known).value = known == state
    if engine is None:
        return
    instruments.cell("appliance_requests_in_flight").value = engine.num_in_flight
    if engine.ready is not None:
        instruments.forget("appliance_engine_info")
        facts = (str(getattr(engine.ready, fact, "")) for fact in ("device", "dtype", "quantization"))
        instruments.cell("appliance_engine_info", *facts).value = 1
        instruments.forget("appliance_kv_info")
        facts = (str(getattr(engine.ready, fact, "")) for fact in ("block_size", "num_blocks", "kv_dtype", "prefix_caching"))
        instruments.cell("appliance_kv_info", *facts).value = 1


def set_work(instruments: Instruments, costs: StepCosts, window: WindowStats) -> None:
    """Utilisation over the window, and the peaks that it is measured by."""
    cell = instruments.cell
    cell("appliance_engine_peak_flops_per_second").value = costs.peak_flops
    cell("appliance_engine_peak_bytes_per_second").value = costs.peak_bytes_per_second
    cell("appliance_engine_flops_utilisation_ratio").value = window.flops_per_second / costs.peak_flops if costs.peak_flops else 0
    cell("appliance_engine_bandwidth_utilisation_ratio").value = (
        window.moved_bytes_per_second / costs.peak_bytes_per_second if costs.peak_bytes_per_second else 0
    )
    cell("appliance_engine_busy_ratio").value = window.busy_ratio
    cell("appliance_demand_prompt_tokens_per_second").value = window.prompt_tokens_per_second
    cell("appliance_demand_output_tokens_per_second").value = window.expected_output_tokens_per_second


def set_store(instruments: Instruments, stats: StoreStats) -> None:
    """The SQL writer's counters."""
    cell = instruments.cell
    cell("appliance_store_available").value = stats.available
    cell("appliance_store_queued_rows").value = stats.num_queued_rows
    cell("appliance_store_spool_backlog_rows").value = stats.num_spooled_rows
    cell("appliance_store_written_rows_total").value = stats.num_written_rows
    cell("appliance_store_spooled_rows_total").value = stats.num_spooled_total
    cell("appliance_store_dropped_rows_total").value = stats.num_dropped_rows
    cell("appliance_store_refused_rows_total").value = stats.num_refused_rows
    cell("appliance_store_flushes_total").value = stats.num_flushes
    cell("appliance_store_failed_flushes_total").value = stats.num_failed_flushes
    cell("appliance_store_flush_seconds_total").value = stats.flush_seconds


def set_hardware(instruments: Instruments, reading: HardwareReading) -> None:
    """Host, processes and GPUs as last read."""
    cell = instruments.cell
    cell("appliance_host_cpus").value = reading.num_cpus
    cell("appliance_host_cpu_utilisation_ratio").value = reading.cpu_utilisation
    cell("appliance_host_memory_used_bytes").value = reading.memory_used_bytes
    cell("appliance_host_memory_bytes").value = reading.memory_bytes
    if reading.disk_free_bytes is not None:
        cell("appliance_host_disk_free_bytes").value = reading.disk_free_bytes
    for name in ("cpu_seconds_total", "resident_bytes", "open_fds", "threads"):
        instruments.forget(f"appliance_process_{name}")
    for label, process in (("server", reading.server), ("engine", reading.engine)):
        if process is not None:
            cell("appliance_process_cpu_seconds_total", label).value = process.cpu_seconds
            cell("appliance_process_resident_bytes", label).value = process.resident_bytes
            cell("appliance_process_open_fds", label).value = process.num_fds
            cell("appliance_process_threads", label).value = process.num_threads
    for gpu in reading.gpus:
        _set_gpu(instruments, gpu)


def _set_gpu(instruments: Instruments, gpu: GpuReading) -> None:
    index = str(gpu.index)
    instruments.cell("appliance_gpu_info", index, gpu.name, gpu.uuid).value = 1
    for name, value_of in _GPU_GAUGES:
        if (value := value_of(gpu)) is not None:
            instruments.cell(name, index).value = value
    for reason in THROTTLE_REASONS:
        instruments.cell("appliance_gpu_throttled", index, reason).value = reason in gpu.throttle_reasons
    instruments.cell("appliance_gpu_xid_errors_total", index).value = gpu.num_xid_errors

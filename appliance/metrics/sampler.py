"""Turns the recorder's state into a row of `samples`, every few seconds."""

from __future__ import annotations

from appliance.events import Sample
from appliance.metrics.hardware import HardwareReading, ProcessReading
from appliance.metrics.nvml import GpuReading
from appliance.metrics.recorder import Recorder

_COUNTERS = {
    "num_requests": "appliance_requests_total",
    "num_rejected": "appliance_rejections_total",
    "num_prompt_tokens": "appliance_admitted_prompt_tokens_total",
    "num_cached_tokens": "appliance_prefix_hit_tokens_total",
    "num_generated_tokens": "appliance_output_tokens_total",
    "num_surplus_tokens": "appliance_surplus_tokens_total",
    "num_preemptions": "appliance_preemptions_total",
    "num_aborted": "appliance_aborts_total",
    "num_steps": "appliance_engine_steps_total",
}


class Sampler:
    """Remembers the totals of the sample before, so that each sample holds what happened since. Call `take` periodically, on the event loop."""

    def __init__(self, recorder: Recorder) -> None:
        self._recorder = recorder
        self._at = recorder.clock.monotonic()
        self._totals: dict[str, float] = {}
        self._totals = self._read_totals(None)

    def take(self, hardware: HardwareReading | None = None) -> Sample:
        """The machine now and since the last call."""
        recorder = self._recorder
        before, self._totals = self._totals, self._read_totals(hardware)
        since = {name: total - before.get(name, 0.0) for name, total in self._totals.items()}
        snapshot, kv = recorder.snapshot(), recorder.kv()
        period, self._at = snapshot.at - self._at, snapshot.at
        gpus = hardware.gpus if hardware is not None else ()
        return Sample(
            at_wall=snapshot.at_wall,
            period_seconds=period,
            engine_state=recorder.engine_state,
            **{name: int(since[name]) for name in (*_COUNTERS, "num_errors", "num_good_requests")},
            step_seconds=since["step_seconds"],
            ttft_p50_seconds=snapshot.fast.ttft_p50_seconds,
            ttft_p95_seconds=snapshot.fast.ttft_p95_seconds,
            tpot_p50_seconds=snapshot.fast.tpot_p50_seconds,
            tpot_p95_seconds=snapshot.fast.tpot_p95_seconds,
            goodput=snapshot.fast.goodput,
            num_running=snapshot.num_running,
            num_waiting=snapshot.num_waiting,
            oldest_waiting_age_seconds=snapshot.oldest_waiting_age_seconds,
            kv_utilisation=kv[0] if kv else None,
            kv_cached_share=kv[1] if kv else None,
            kv_waste=kv[2] if kv else None,
            cpu_utilisation=hardware.cpu_utilisation if hardware else None,
            memory_used_bytes=hardware.memory_used_bytes if hardware else None,
            server_cpu_seconds=self._since(before, "server_cpu_seconds"),
            server_resident_bytes=_resident(hardware.server if hardware else None),
            engine_cpu_seconds=self._since(before, "engine_cpu_seconds"),
            engine_resident_bytes=_resident(hardware.engine if hardware else None),
            gpu_utilisation=_mean([gpu.utilisation for gpu in gpus]),
            gpu_memory_used_bytes=_whole(_sum([gpu.memory_used_bytes for gpu in gpus])),
            gpu_power_watts=_sum([gpu.power_watts for gpu in gpus]),
            gpu_temperature_celsius=max((gpu.temperature_celsius for gpu in gpus if gpu.temperature_celsius is not None), default=None),
            gpu_joules=self._since(before, "gpu_joules"),
        )

    def _read_totals(self, hardware: HardwareReading | None) -> dict[str, float]:
        instruments = self._recorder.instruments
        totals = {field: instruments.total(name) for field, name in _COUNTERS.items()}
        totals["num_errors"] = instruments.total("appliance_requests_total", lambda labels: labels[1].startswith("5"))
        totals["num_good_requests"] = instruments.total("appliance_slo_good_requests_total", lambda labels: labels == ("both",))
        totals["step_seconds"] = instruments.total("appliance_engine_phase_seconds_total")
        if hardware is not None:
            for label, process in (("server", hardware.server), ("engine", hardware.engine)):
                if process is not None:
                    totals[f"{label}_cpu_seconds"] = process.cpu_seconds
            energy = _energy(hardware.gpus)
            if energy is not None:
                totals["gpu_joules"] = energy
        return totals

    def _since(self, before: dict[str, float], name: str) -> float | None:
        """What a counter of the machine grew by; None without two readings; its value where it began anew (another engine process)."""
        if name not in self._totals or name not in before:
            return None
        now = self._totals[name]
        return now - before[name] if now >= before[name] else now


def _energy(gpus: tuple[GpuReading, ...]) -> float | None:
    return _sum([gpu.energy_joules for gpu in gpus])


def _resident(process: ProcessReading | None) -> int | None:
    return process.resident_bytes if process is not None else None


def _sum(values: list[float | None] | list[int | None]) -> float | None:
    known = [value for value in values if value is not None]
    return float(sum(known)) if known else None


def _mean(values: list[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def _whole(value: float | None) -> int | None:
    return None if value is None else int(value)

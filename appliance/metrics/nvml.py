"""GPU readings through NVML. A value that this GPU or driver does not offer is None; no reading raises.

https://docs.nvidia.com/deploy/nvml-api/
"""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from appliance.metrics.labels import THROTTLE_REASONS

_THROTTLE_BITS = dict(zip(THROTTLE_REASONS, (0x4, 0x8, 0x10, 0x20, 0x40, 0x80), strict=True))  # nvmlClocksEventReason*; idle and set clocks are none
_COUNTER_SECONDS = 10.0


@dataclass(frozen=True, slots=True)
class GpuReading:
    """One GPU at one instant."""

    index: int
    name: str
    uuid: str
    utilisation: float | None = None  # share of NVML's sampling period in which a kernel ran
    memory_utilisation: float | None = None
    memory_used_bytes: int | None = None
    memory_bytes: int | None = None
    power_watts: float | None = None
    energy_joules: float | None = None  # since the driver was loaded
    temperature_celsius: float | None = None
    sm_clock_hertz: float | None = None
    memory_clock_hertz: float | None = None
    throttle_reasons: frozenset[str] = field(default_factory=frozenset)
    num_xid_errors: int = 0  # since the reader was opened


class EnergyCounter:
    """A GPU's joules. Reading the driver's counter takes 4 ms of CPU, its power a hundredth of that: the counter is read every ten seconds (always,
    where there is no power), and in between the power is added up from there. Falls only if the driver's does."""

    def __init__(self) -> None:
        self._counter: float | None = None
        self._counted_at = self._at = -math.inf
        self._watts: float | None = None
        self._since = self._told = self._counted = 0.0  # power since the counter's reading; what was said last; what the counter said last

    def read(self, at: float, watts: float | None, counter: Callable[[], float | None]) -> float | None:
        """Joules at `at`, where the power is `watts`; `counter` reads the driver's. None where that says nothing."""
        if self._counter is None or watts is None or self._watts is None or at - self._counted_at >= _COUNTER_SECONDS:
            self._counter = counter()
            self._counted_at, self._since = at, 0.0
            if self._counter is not None:
                if self._counter < self._counted:
                    self._told = 0.0
                self._counted = self._counter
        else:
            self._since += watts * (at - self._at)  # on Hopper the mean of the last second, which is how often we read
        self._at, self._watts = at, watts
        if self._counter is None:
            return None
        self._told = max(self._told, self._counter + self._since)
        return self._told


class Nvml:
    """The GPUs that CUDA_VISIBLE_DEVICES leaves to us. Each read takes some milliseconds of driver calls: keep it off the event loop."""

    def __init__(self, library: Any, visible: str | None) -> None:
        """`library` is pynvml, initialised, or something like it; `visible` the value of CUDA_VISIBLE_DEVICES."""
        self._library = library
        self._devices: list[tuple[int, Any, str, str]] = []  # (index, handle, name, uuid)
        self._num_xid_errors: dict[int, int] = {}
        self._energy: dict[int, EnergyCounter] = {}
        for index in range(self._ask(library.nvmlDeviceGetCount) or 0):
            handle = self._ask(library.nvmlDeviceGetHandleByIndex, index)
            if handle is None:
                continue
            uuid = _text(self._ask(library.nvmlDeviceGetUUID, handle))
            if _is_visible(index, uuid, visible):
                self._devices.append((index, handle, _text(self._ask(library.nvmlDeviceGetName, handle)), uuid))
        self._devices.sort(key=lambda device: _rank(device[0], device[3], visible) or 0)
        self._events = self._watch_xid()

    @classmethod
    def open(cls) -> Nvml | None:
        """The machine's NVML; None where there is no driver or no GPU for us."""
        try:
            import pynvml

            pynvml.nvmlInit()
        except Exception:  # no package, no library, no driver, a driver of another version: all mean no GPU to read
            return None
        nvml = cls(pynvml, os.environ.get("CUDA_VISIBLE_DEVICES"))
        return nvml if nvml.num_gpus else None

    @property
    def num_gpus(self) -> int:
        """GPUs that are read."""
        return len(self._devices)

    def read(self, at: float) -> tuple[GpuReading, ...]:
        """Every GPU now, `at` (CLOCK_MONOTONIC), in CUDA's order: the first is the engine's."""
        self._count_xid()
        return tuple(self._read(at, *device) for device in self._devices)

    def close(self) -> None:
        """Let go of the driver."""
        if self._events is not None:
            self._ask(self._library.nvmlEventSetFree, self._events)
        self._ask(self._library.nvmlShutdown)

    def _read(self, at: float, index: int, handle: Any, name: str, uuid: str) -> GpuReading:
        library, ask = self._library, self._ask
        rates, memory = ask(library.nvmlDeviceGetUtilizationRates, handle), ask(library.nvmlDeviceGetMemoryInfo, handle)
        milliwatts = ask(library.nvmlDeviceGetPowerUsage, handle)
        watts = None if milliwatts is None else milliwatts / 1e3
        sm_mhz = ask(library.nvmlDeviceGetClockInfo, handle, library.NVML_CLOCK_SM)
        memory_mhz = ask(library.nvmlDeviceGetClockInfo, handle, library.NVML_CLOCK_MEM)
        throttle = ask(library.nvmlDeviceGetCurrentClocksThrottleReasons, handle) or 0
        return GpuReading(
            index=index,
            name=name,
            uuid=uuid,
            utilisation=None if rates is None else rates.gpu / 100,
            memory_utilisation=None if rates is None else rates.memory / 100,
            memory_used_bytes=None if memory is None else int(memory.used),
            memory_bytes=None if memory is None else int(memory.total),
            power_watts=watts,
            energy_joules=self._energy.setdefault(index, EnergyCounter()).read(at, watts, lambda: self._joules(handle)),
            temperature_celsius=ask(library.nvmlDeviceGetTemperature, handle, library.NVML_TEMPERATURE_GPU),
            sm_clock_hertz=None if sm_mhz is None else sm_mhz * 1e6,
            memory_clock_hertz=None if memory_mhz is None else memory_mhz * 1e6,
            throttle_reasons=frozenset(reason for reason, bit in _THROTTLE_BITS.items() if throttle & bit),
            num_xid_errors=self._num_xid_errors.get(index, 0),
        )

    def _joules(self, handle: Any) -> float | None:
        millijoules = self._ask(self._library.nvmlDeviceGetTotalEnergyConsumption, handle)
        return None if millijoules is None else float(millijoules / 1e3)

    def _watch_xid(self) -> Any | None:
        """An event set of XID errors; None where the driver offers none."""
        library = self._library
        events = self._ask(library.nvmlEventSetCreate)
        if events is not None:
            for _, handle, _, _ in self._devices:
                self._ask(library.nvmlDeviceRegisterEvents, handle, library.nvmlEventTypeXidCriticalError, events)
        return events

    def _count_xid(self) -> None:
        """Take what has happened since the last look, without waiting."""
        if self._events is None:
            return
        for _ in range(100):  # a storm of them must not hold the reader
            try:
                event = self._library.nvmlEventSetWait(self._events, 0)
            except Exception:  # a timeout says that there is no more
                return
            index = self._ask(self._library.nvmlDeviceGetIndex, event.device)
            if index is not None:
                self._num_xid_errors[index] = self._num_xid_errors.get(index, 0) + 1

    @staticmethod
    def _ask(question: Callable[..., Any], *arguments: Any) -> Any | None:
        with contextlib.suppress(Exception):  # NVMLError of any kind: not supported, no permission, GPU lost
            return question(*arguments)
        return None


def _text(value: Any) -> str:
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else str(value or "")


def _is_visible(index: int, uuid: str, visible: str | None) -> bool:
    return _rank(index, uuid, visible) is not None


def _rank(index: int, uuid: str, visible: str | None) -> int | None:
    """The GPU's number within CUDA; None if that does not see it.

    CUDA's rule: indices or (beginnings of) UUIDs, up to the first that is invalid; unset means all.
    """
    if visible is None:
        return index
    for rank, entry in enumerate(part.strip() for part in visible.split(",")):
        if entry.isdecimal():
            if int(entry) == index:
                return rank
        elif entry.startswith(("GPU-", "MIG-")):
            if uuid.startswith(entry):
                return rank
        else:
            return None
    return None

"""Stands in for pynvml in a server whose PYTHONPATH names this folder: one GPU whose counters move, the engine's own, and faults on demand.

$FAKE_NVML_FAULTS names a file: each line `xid` is one XID error, a line `throttle` holds the clock down by heat while it is there.
"""

from __future__ import annotations

import math
import os
import time
from pathlib import Path
from types import SimpleNamespace

MEAN_WATTS, SWING_WATTS, PERIOD_SECONDS = 300.0, 100.0, 11.0
SW_POWER_CAP, HW_THERMAL = 0x4, 0x40
NVML_CLOCK_SM, NVML_CLOCK_MEM, NVML_TEMPERATURE_GPU, nvmlEventTypeXidCriticalError = 0, 1, 0, 8  # noqa: N816 (pynvml's names)
_seen = 0


class NVMLError(Exception):
    """What the driver does not offer."""


def __getattr__(name: str) -> object:
    if not name.startswith("nvml"):
        raise AttributeError(name)

    def refuse(*_: object) -> None:
        raise NVMLError(name)

    return refuse


def _faults() -> list[str]:
    path = os.environ.get("FAKE_NVML_FAULTS")
    return Path(path).read_text().split() if path and Path(path).exists() else []


def nvmlInit() -> None:  # noqa: N802
    """The driver is there; and the server, which alone calls this, takes its engine on the CPU for one on this GPU, or no energy would be its own."""
    import msgspec

    from appliance.engine.supervisor import SupervisedEngine

    def keep(self: SupervisedEngine, ready: object) -> None:
        self.__dict__["ready"] = ready and msgspec.structs.replace(ready, device="Fake H100")  # type: ignore[type-var]

    SupervisedEngine.ready = property(lambda self: self.__dict__["ready"], keep)  # type: ignore[assignment]


def nvmlShutdown() -> None:  # noqa: N802
    """Nothing to let go of."""


def nvmlDeviceGetCount() -> int:  # noqa: N802
    """One GPU."""
    return 1


def nvmlDeviceGetHandleByIndex(index: int) -> int:  # noqa: N802
    """The index itself."""
    return index


def nvmlDeviceGetIndex(handle: int) -> int:  # noqa: N802
    """The handle itself."""
    return handle


def nvmlDeviceGetUUID(handle: int) -> str:  # noqa: N802
    """Made up."""
    return f"GPU-fake{handle}"


def nvmlDeviceGetName(handle: int) -> str:  # noqa: N802
    """Made up."""
    return "Fake H100"


def nvmlDeviceGetUtilizationRates(handle: int) -> SimpleNamespace:  # noqa: N802
    """Percent."""
    return SimpleNamespace(gpu=70, memory=40)


def nvmlDeviceGetMemoryInfo(handle: int) -> SimpleNamespace:  # noqa: N802
    """Bytes."""
    return SimpleNamespace(total=80 << 30, used=60 << 30, free=20 << 30)


def nvmlDeviceGetPowerUsage(handle: int) -> int:  # noqa: N802
    """Milliwatts: a slow wave."""
    return int(1e3 * (MEAN_WATTS + SWING_WATTS * math.sin(time.monotonic() * 2 * math.pi / PERIOD_SECONDS)))


def nvmlDeviceGetTotalEnergyConsumption(handle: int) -> int:  # noqa: N802
    """Millijoules: the integral of the power."""
    turn, now = 2 * math.pi / PERIOD_SECONDS, time.monotonic()
    return int(1e3 * (MEAN_WATTS * now - SWING_WATTS / turn * math.cos(now * turn)))


def nvmlDeviceGetTemperature(handle: int, sensor: int) -> int:  # noqa: N802
    """Degrees."""
    return 61


def nvmlDeviceGetClockInfo(handle: int, clock: int) -> int:  # noqa: N802
    """Megahertz."""
    return 2619 if clock == NVML_CLOCK_MEM else 1755


def nvmlDeviceGetCurrentClocksThrottleReasons(handle: int) -> int:  # noqa: N802
    """Held down by its power limit always, by heat on demand."""
    return SW_POWER_CAP | (HW_THERMAL if "throttle" in _faults() else 0)


def nvmlEventSetCreate() -> str:  # noqa: N802
    """A set."""
    return "events"


def nvmlEventSetFree(events: str) -> None:  # noqa: N802
    """Nothing to let go of."""


def nvmlDeviceRegisterEvents(handle: int, types: int, events: str) -> None:  # noqa: N802
    """Every event is delivered anyway."""


def nvmlEventSetWait(events: str, timeout_ms: int) -> SimpleNamespace:  # noqa: N802
    """The next XID error that was asked for; raises where there is none, as the driver does at a timeout."""
    global _seen
    if _faults().count("xid") <= _seen:
        raise NVMLError("timeout")
    _seen += 1
    return SimpleNamespace(device=0)

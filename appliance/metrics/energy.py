"""Joules of the engine's device, split into serving and idle, and the price of a second of work."""

from __future__ import annotations

from dataclasses import dataclass

from appliance.metrics.nvml import GpuReading

_SMOOTHING = 0.5  # weight of all intervals before the newest in the price
_LEVELLING = 2.0  # intervals over which what was charged too much or too little is made up for
_MAX_PRICE_RATIO = 3.0  # to the price without that, either way


@dataclass(frozen=True, slots=True)
class Interval:
    """What one interval between two readings drew."""

    serving_joules: float
    idle_joules: float


class EnergyAccount:
    """Fed with every reading of the device; all joules that it drew go to serving or to idle, none twice.

    An interval's joules are the difference of its readings' energy (nvml.EnergyCounter) or, where there is none, the mean of the power at its two
    ends times its length. Of an interval with work in it, the time without work is idle at the power last seen in an interval without any; the
    rest is serving.

    `price_watts` is what a busy second costs from now on. Requests end between readings, so they are charged at the price of the recent past;
    what that was wrong by is spread over the next intervals, so that all charges follow the serving joules.
    """

    def __init__(self) -> None:
        self.serving_joules = self.idle_joules = self.charged_joules = 0.0
        self.idle_watts: float | None = None
        self.price_watts: float | None = None
        self._newest: tuple[float, GpuReading] | None = None
        self._recent_joules = self._recent_seconds = 0.0  # serving, decayed
        self._joules = self._seconds = self._busy_seconds = 0.0  # of the open interval, if there is one

    def add(self, at: float, gpu: GpuReading, busy_seconds: float, *, working: bool) -> Interval | None:
        """A reading at `at` (CLOCK_MONOTONIC), `busy_seconds` of work since the one before it; `working`: a step may be under way right now.

        None while nothing can be said: the first reading, one without power, or an interval in which no step was done though there was work.
        """
        before, self._newest = self._newest, (at, gpu)
        joules = None if before is None else _joules(before[1], gpu, at - before[0])
        if before is None or joules is None:
            if self.price_watts is None:
                self.price_watts = gpu.power_watts
            return None
        self._joules += joules
        self._seconds += at - before[0]
        self._busy_seconds += busy_seconds
        if working and self._busy_seconds == 0.0:
            return None  # a long step: it will say how long it was
        return self._close()

    def _close(self) -> Interval:
        joules, seconds, busy = self._joules, self._seconds, min(self._busy_seconds, self._seconds)
        charged = (self.price_watts or 0.0) * self._busy_seconds
        self._joules = self._seconds = self._busy_seconds = 0.0
        if busy == 0.0:
            self.idle_watts = self._power(joules, seconds)
            idle = joules
        elif self.idle_watts is None:
            idle = joules * (1 - busy / seconds)
        else:
            idle = min(joules, self.idle_watts * (seconds - busy))
        serving = joules - idle
        self.serving_joules += serving
        self.idle_joules += idle
        self.charged_joules += charged
        if busy > 0.0:
            self._price(serving, busy, seconds)
        return Interval(serving, idle)

    def _power(self, joules: float, seconds: float) -> float | None:
        """Of an interval without work: what the device says, since joules may hold a correction of earlier ones."""
        watts = self._newest[1].power_watts if self._newest is not None else None
        if watts is not None:
            return watts
        return joules / seconds if seconds > 0 else self.idle_watts

    def _price(self, joules: float, busy_seconds: float, seconds: float) -> None:
        self._recent_joules = _SMOOTHING * self._recent_joules + joules
        self._recent_seconds = _SMOOTHING * self._recent_seconds + busy_seconds
        base = self._recent_joules / self._recent_seconds
        owed = self.serving_joules - self.charged_joules
        self.price_watts = min(max(base + owed / (_LEVELLING * seconds), base / _MAX_PRICE_RATIO), base * _MAX_PRICE_RATIO)


def _joules(before: GpuReading, now: GpuReading, seconds: float) -> float | None:
    if before.energy_joules is not None and now.energy_joules is not None and now.energy_joules >= before.energy_joules:
        return now.energy_joules - before.energy_joules
    if before.power_watts is not None and now.power_watts is not None:
        return (before.power_watts + now.power_watts) / 2 * seconds
    return None

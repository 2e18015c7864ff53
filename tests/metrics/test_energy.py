"""Every joule that the device drew goes to serving or to idle, and what requests are charged follows what serving drew."""

from __future__ import annotations

import math
import random
from types import SimpleNamespace
from typing import Any

import pytest

from appliance.clock import ManualClock
from appliance.events import StepStats
from appliance.metrics.energy import EnergyAccount
from appliance.metrics.hardware import HardwareReader
from appliance.metrics.nvml import EnergyCounter, GpuReading, Nvml
from appliance.metrics.recorder import Recorder


def _gpu(joules: float | None = None, watts: float | None = None) -> GpuReading:
    return GpuReading(0, "H100", "GPU-0", energy_joules=joules, power_watts=watts)


def test_the_parts_sum_to_the_counter() -> None:
    """Whatever the load, serving and idle joules are together what the energy counter says."""
    account, chance, joules = EnergyAccount(), random.Random(5), 1000.0
    account.add(0.0, _gpu(joules, 70.0), 0.0, working=False)
    for second in range(1, 200):
        busy = chance.choice([0.0, 0.0, 0.1, 0.5, 0.99])
        joules += 70.0 * (1 - busy) + chance.uniform(300, 600) * busy
        account.add(float(second), _gpu(joules, 70.0), busy, working=busy > 0)
    assert account.serving_joules + account.idle_joules == pytest.approx(joules - 1000.0)


def test_idle_time_costs_what_idle_power_was() -> None:
    """Half a second of work at 500 W in a second that idles at 70 W otherwise is 250 J of serving and 35 J of idling."""
    account = EnergyAccount()
    account.add(0.0, _gpu(0.0, 500.0), 0.0, working=False)
    account.add(1.0, _gpu(70.0), 0.0, working=False)
    interval = account.add(2.0, _gpu(70.0 + 285.0), 0.5, working=True)
    assert interval is not None
    assert (interval.serving_joules, interval.idle_joules) == (pytest.approx(250.0), pytest.approx(35.0))
    assert account.price_watts == pytest.approx(500.0)


def test_without_a_counter_power_is_integrated() -> None:
    """The joules of an interval are then the mean of the power at its two ends times its length."""
    account = EnergyAccount()
    account.add(0.0, _gpu(watts=100.0), 0.0, working=False)
    account.add(2.0, _gpu(watts=200.0), 0.0, working=False)
    account.add(3.0, _gpu(watts=400.0), 1.0, working=True)
    assert (account.idle_joules, account.serving_joules) == (300.0, 300.0)


def test_a_driver_that_was_loaded_anew_costs_nothing() -> None:
    """A counter that runs backwards is no negative energy; the interval is integrated by power or left out."""
    account = EnergyAccount()
    account.add(0.0, _gpu(5000.0), 0.0, working=False)
    assert account.add(1.0, _gpu(10.0), 0.0, working=False) is None
    account.add(2.0, _gpu(80.0), 0.0, working=False)
    assert (account.idle_joules, account.serving_joules) == (70.0, 0.0)


def test_a_step_longer_than_the_interval_is_no_idle_time() -> None:
    """While there is work and no step has ended, the joules wait for the step that says how long it was."""
    account = EnergyAccount()
    account.add(0.0, _gpu(0.0), 0.0, working=False)
    assert account.add(1.0, _gpu(400.0), 0.0, working=True) is None
    assert account.add(2.0, _gpu(800.0), 0.0, working=True) is None
    interval = account.add(3.0, _gpu(1200.0), 2.9, working=True)
    assert interval is not None
    assert interval.serving_joules > 1100
    assert account.serving_joules + account.idle_joules == pytest.approx(1200.0)


@pytest.mark.parametrize("shape", ["steady", "wave", "bursts"])
def test_charges_follow_the_power(shape: str) -> None:
    """Work is charged at the price of the past, yet after ten minutes of changing load and power the charges are within 1 % of what serving drew."""
    account, chance, joules, charged = EnergyAccount(), random.Random(7), 0.0, 0.0
    account.add(0.0, _gpu(0.0, 70.0), 0.0, working=False)
    account.add(1.0, _gpu(70.0, 70.0), 0.0, working=False)
    joules = 70.0
    for second in range(2, 602):
        busy = {"steady": 0.8, "wave": 0.5 + 0.45 * math.sin(second / 9), "bursts": chance.choice([0.02, 0.95])}[shape]
        watts = 450.0 + 150.0 * math.sin(second / 31) + chance.uniform(-30, 30)
        charged += (account.price_watts or 0.0) * busy
        joules += watts * busy + 70.0 * (1 - busy)
        account.add(float(second), _gpu(joules, watts), busy, working=True)
    assert charged == pytest.approx(account.serving_joules, rel=0.01)
    assert charged == pytest.approx(account.charged_joules)


@pytest.mark.parametrize("bias", [0.94, 1.06])
def test_power_that_is_wrong_is_made_good_by_the_counter(bias: float) -> None:
    """The counter is read every ten seconds: what the power said wrongly in between lands in one interval, and neither what idling draws nor the
    charges follow that. After ten minutes all joules are the counter's, within what ten seconds of a wrong power are."""
    account, counter, joules, charged = EnergyAccount(), EnergyCounter(), 0.0, 0.0
    for second in range(602):
        busy = 0.0 if second % 20 < 3 else 0.5 + 0.45 * math.sin(second / 9)
        charged += (account.price_watts or 0.0) * busy
        watts = 500.0 * busy + 70.0 * (1 - busy)
        joules += watts if second else 0.0
        energy = counter.read(float(second), watts * bias, lambda: joules)  # noqa: B023 (called at once)
        account.add(float(second), GpuReading(0, "H100", "GPU-0", power_watts=watts * bias, energy_joules=energy), busy, working=busy > 0)
        if busy == 0.0 and second:
            assert account.idle_watts == pytest.approx(70.0 * bias)
    assert account.serving_joules + account.idle_joules == pytest.approx(joules, abs=10 * 500 * 0.06)
    assert charged == pytest.approx(account.serving_joules, rel=0.015)


class _Nvml:
    """pynvml with one GPU whose energy counter integrates a power that changes with the load."""

    NVML_CLOCK_SM, NVML_CLOCK_MEM, NVML_TEMPERATURE_GPU, nvmlEventTypeXidCriticalError = 1, 2, 0, 8  # noqa: N815

    def __init__(self) -> None:
        self.watts = 70.0
        self.joules = 12_345.0

    def advance(self, seconds: float) -> None:
        self.joules += self.watts * seconds

    def nvmlDeviceGetCount(self) -> int:  # noqa: N802
        return 1

    def nvmlDeviceGetHandleByIndex(self, index: int) -> int:  # noqa: N802
        return index

    def nvmlDeviceGetUUID(self, handle: int) -> str:  # noqa: N802
        return "GPU-0"

    def nvmlDeviceGetPowerUsage(self, handle: int) -> int:  # noqa: N802
        return round(self.watts * 1e3)

    def nvmlDeviceGetTotalEnergyConsumption(self, handle: int) -> int:  # noqa: N802
        return round(self.joules * 1e3)

    def __getattr__(self, name: str) -> Any:
        if not name.startswith("nvml"):
            raise AttributeError(name)

        def unsupported(*arguments: object) -> SimpleNamespace:
            raise RuntimeError("Not Supported")

        return unsupported


def test_the_counters_integrate_nvml_power(recorder: Recorder, engine: Any, clock: ManualClock, make_stats: Any, tmp_path: Any) -> None:
    """Through reader and recorder: the exported joules are the integral of the power, and the engine's client hears the price."""
    library = _Nvml()
    reader = HardwareReader(clock=clock, state_dir=tmp_path, nvml=Nvml(library, None))
    step: StepStats = make_stats(busy_seconds=0.1)
    drawn, engine.num_in_flight = 0.0, 0
    recorder.on_hardware(reader.read())
    for second in range(60):
        is_busy = second >= 20
        library.watts = 500.0 if is_busy else 70.0
        engine.num_in_flight = int(is_busy)
        for _ in range(10):
            clock.advance(0.1)
            library.advance(0.1)
            drawn += library.watts * 0.1
            if is_busy:
                recorder.on_step(step)
        recorder.on_hardware(reader.read())
    cell = recorder.instruments.cell
    serving, idle = (cell("appliance_energy_joules_total", use).value for use in ("serving", "idle"))
    assert serving + idle == pytest.approx(drawn)
    assert (serving, idle) == (pytest.approx(40 * 500.0), pytest.approx(20 * 70.0))
    assert engine.serving_watts == pytest.approx(500.0, rel=0.02)


def test_another_devices_energy_is_not_ours(recorder: Recorder, engine: Any, clock: ManualClock, make_stats: Any, tmp_path: Any) -> None:
    """An engine on the CPU of a machine with a GPU is charged nothing for that GPU."""
    engine.ready = SimpleNamespace(device="cpu")
    reader = HardwareReader(clock=clock, state_dir=tmp_path, nvml=Nvml(_Nvml(), None))
    for _ in range(3):
        recorder.on_hardware(reader.read())
        clock.advance(1.0)
    assert recorder.instruments.total("appliance_energy_joules_total") == 0
    assert engine.serving_watts is None


def test_before_the_device_is_known_nothing_is_charged(recorder: Recorder, engine: Any, clock: ManualClock, tmp_path: Any) -> None:
    """An engine that has not become ready may be one on the CPU: what the GPU draws meanwhile sets no price."""
    engine.ready = None
    reader = HardwareReader(clock=clock, state_dir=tmp_path, nvml=Nvml(_Nvml(), None))
    for _ in range(3):
        recorder.on_hardware(reader.read())
        clock.advance(1.0)
    assert recorder.instruments.total("appliance_energy_joules_total") == 0
    assert engine.serving_watts is None

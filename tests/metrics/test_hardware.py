"""Readings of host, processes and GPUs: complete where the machine offers them, None where it does not, never an exception."""

from __future__ import annotations

import os
import threading
from pathlib import Path
from typing import Any

import pytest

from appliance.clock import ManualClock
from appliance.metrics.hardware import HardwareReader, detect_device
from appliance.metrics.nvml import EnergyCounter, Nvml


def test_gpu_values_are_in_base_units(fake_nvml: Any) -> None:
    """Milliwatts become watts, millijoules joules, megahertz hertz, percent shares; reasons are named; what is not supported is None."""
    first, second = Nvml(fake_nvml, None).read(0.0)
    assert (first.name, first.uuid, first.utilisation, first.memory_utilisation) == ("NVIDIA H100", "GPU-handle0", 0.75, 0.4)
    assert (first.power_watts, first.energy_joules, first.temperature_celsius) == (350.0, 5000.0, 60)
    assert (first.sm_clock_hertz, first.memory_clock_hertz) == (1.98e9, 2.619e9)
    assert (first.memory_used_bytes, first.memory_bytes) == (10 << 30, 80 << 30)
    assert first.throttle_reasons == {"hw_thermal"}
    assert (second.index, second.energy_joules, second.throttle_reasons, second.power_watts) == (1, None, frozenset(), 350.0)


def test_energy_follows_the_counter_and_between_its_readings_the_power() -> None:
    """The driver's counter is read every ten seconds; power is added in between, what that was wrong by is gone with the next reading, and joules
    never fall, unless the counter began anew. Without power the counter is read every time; without a counter there are no joules."""
    energy, asked = EnergyCounter(), []

    def at(second: float, watts: float | None, counter: float | None) -> float | None:
        def read() -> float | None:
            asked.append(second)
            return counter

        return energy.read(second, watts, read)

    assert at(0, 100.0, 5000.0) == 5000.0
    assert [at(second, 100.0, 0.0) for second in range(1, 10)] == [5000.0 + 100.0 * second for second in range(1, 10)]
    assert at(10, 100.0, 6200.0) == 6200.0  # it drew more than its power said
    assert at(11, 500.0, 0.0) == 6700.0
    assert at(20, 500.0, 6500.0) == 6700.0  # and now less: it waits for the counter
    assert at(21, 100.0, 0.0) == 6700.0
    assert at(24, 100.0, 0.0) == 6900.0
    assert at(30, 100.0, 50.0) == 50.0
    assert asked == [0, 10, 20, 30]
    assert [at(second, None, 60.0 + second) for second in (31, 32)] == [91.0, 92.0]
    assert at(33, 500.0, 93.0) == 93.0
    assert at(34, 500.0, 0.0) == 593.0
    assert at(44, 500.0, None) is None  # a reading that failed
    assert at(45, 100.0, 193.0) == 593.0  # is not one that fell
    assert asked == [0, 10, 20, 30, 31, 32, 33, 44, 45]


def test_xid_errors_are_counted_by_gpu(fake_nvml: Any) -> None:
    """Each error that the driver reports counts once, for its GPU."""
    nvml = Nvml(fake_nvml, None)
    assert fake_nvml.registered == ["handle0", "handle1"]
    fake_nvml.xid += ["handle1", "handle1", "handle0"]
    assert [gpu.num_xid_errors for gpu in nvml.read(0.0)] == [1, 2]
    assert [gpu.num_xid_errors for gpu in nvml.read(0.0)] == [1, 2]


@pytest.mark.parametrize(
    ("visible", "indices"),
    [(None, [0, 1]), ("1", [1]), ("0,1", [0, 1]), ("GPU-handle1", [1]), ("", []), ("-1", []), ("NoDevFiles", []), ("1,-1,0", [1])],
)
def test_only_visible_gpus_are_read(visible: str | None, indices: list[int], fake_nvml: Any) -> None:
    """CUDA_VISIBLE_DEVICES decides, by CUDA's own rule."""
    assert [gpu.index for gpu in Nvml(fake_nvml, visible).read(0.0)] == indices


def test_no_driver_means_no_nvml(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a machine without GPU `open` answers None."""
    import pynvml

    def missing() -> None:
        raise pynvml.NVMLError(pynvml.NVML_ERROR_LIBRARY_NOT_FOUND)

    monkeypatch.setattr(pynvml, "nvmlInit", missing)
    assert Nvml.open() is None


def test_device_detection(fake_nvml: Any) -> None:
    """A GPU is taken when asked for, or when there is one and nothing else was asked for."""
    nvml = Nvml(fake_nvml, None)
    assert [detect_device(setting, nvml) for setting in ("auto", "cpu", "cuda")] == ["cuda", "cpu", "cuda"]
    assert [detect_device(setting, None) for setting in ("auto", "cpu", "cuda")] == ["cpu", "cpu", "cuda"]


def test_host_and_processes_are_read(tmp_path: Path) -> None:
    """This machine and this process have plausible numbers; an engine that is not there, or has just ended, has none."""
    pid: list[int | None] = [os.getpid()]
    reader = HardwareReader(clock=ManualClock(), state_dir=tmp_path, engine_pid=lambda: pid[0])
    reading = reader.read()
    assert 1 <= reading.num_cpus <= (os.cpu_count() or 1)
    assert 0 <= reading.cpu_utilisation <= 1
    assert 0 < reading.memory_used_bytes < reading.memory_bytes
    assert reading.disk_free_bytes is not None
    assert reading.server is not None
    assert reading.server.resident_bytes > 1 << 20
    assert reading.engine is not None
    assert reading.engine.num_threads >= 1
    pid[0] = 2**22 + 1  # over the kernel's largest pid
    assert reader.read().engine is None
    pid[0] = None
    assert reader.read().engine is None
    assert HardwareReader(clock=ManualClock(), state_dir=tmp_path / "gone").read().disk_free_bytes is None


def test_the_host_is_read_less_often_than_the_gpus(tmp_path: Path, fake_nvml: Any) -> None:
    """Within five seconds of a whole reading only time and GPUs are new, unless the engine is another process. The first is followed by another."""
    clock, pid = ManualClock(), [os.getpid()]
    reader = HardwareReader(clock=clock, state_dir=tmp_path, engine_pid=lambda: pid[0], nvml=Nvml(fake_nvml, None))
    reader._read_due()  # the CPU's share of the very first reading is not known
    first = reader._read_due()
    clock.advance(4.9)
    fake_nvml.xid += ["handle1"]
    second = reader._read_due()
    assert (second.at, second.server, second.engine) == (first.at + 4.9, first.server, first.engine)
    assert second.server is first.server
    assert second.gpus[1].num_xid_errors == 1
    assert reader.latest is second
    pid[0] = os.getppid()
    third = reader._read_due()
    assert third.server is not first.server
    clock.advance(5.0)
    assert reader._read_due().server is not third.server


def test_the_thread_reads_and_survives_failures(tmp_path: Path, fake_nvml: Any) -> None:
    """Readings go on after one that failed, and `stop` ends the thread and lets go of the driver."""
    calls: list[int] = []
    read_twice = threading.Event()

    def engine_pid() -> int | None:
        calls.append(1)
        if len(calls) == 1:
            raise RuntimeError("a reading that fails")
        if len(calls) == 3:
            read_twice.set()
        return None

    reader = HardwareReader(clock=ManualClock(), state_dir=tmp_path, engine_pid=engine_pid, nvml=Nvml(fake_nvml, None), period_seconds=0.001)
    reader.start()
    assert read_twice.wait(20)
    reader.stop()
    assert reader.latest is not None
    assert len(reader.latest.gpus) == 2
    assert fake_nvml.closed
    assert not any(thread.name == "hardware-reader" for thread in threading.enumerate())


@pytest.mark.parametrize(("visible", "indices"), [(None, [0, 1]), ("1,0", [1, 0]), ("GPU-handle1,GPU-handle0", [1, 0]), ("1", [1])])
def test_the_engines_gpu_comes_first(fake_nvml: Any, visible: str | None, indices: list[int]) -> None:
    """In CUDA's order, which CUDA_VISIBLE_DEVICES names: the first is device 0, whose energy is the engine's."""
    assert [gpu.index for gpu in Nvml(fake_nvml, visible).read(0.0)] == indices

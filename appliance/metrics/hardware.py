"""Readings of host, processes and GPUs, taken by a thread of their own so that the event loop never waits for /proc or a driver.

A thread of Python beside a busy event loop is dear: for each file that it reads it gives the interpreter's lock up and wants it back, and while it
waits the loop pays for waking it in vain. So the host is read less often than the GPUs, whose energy is split by the second.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
import shutil
import threading
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import psutil

from appliance.clock import Clock
from appliance.metrics.nvml import GpuReading, Nvml

_log = logging.getLogger(__name__)

HOST_SECONDS = 5.0  # between readings of host and processes


@dataclass(frozen=True, slots=True)
class ProcessReading:
    """One of our processes at one instant."""

    cpu_seconds: float
    resident_bytes: int
    num_fds: int
    num_threads: int


@dataclass(frozen=True, slots=True)
class HardwareReading:
    """The machine at one instant; host and processes up to HOST_SECONDS earlier.

    `engine` is None while there is no engine process; `disk_free_bytes` while the folder cannot be read.
    """

    at: float  # CLOCK_MONOTONIC
    num_cpus: int
    cpu_utilisation: float  # of the host, since the reading of it before
    memory_used_bytes: int
    memory_bytes: int
    disk_free_bytes: int | None
    server: ProcessReading | None
    engine: ProcessReading | None
    gpus: tuple[GpuReading, ...] = ()


def detect_device(device: str, nvml: Nvml | None) -> str:
    """Where the engine will run, as far as the server can tell without torch: "cuda" or "cpu". `device` is the setting engine.device."""
    return "cuda" if device == "cuda" or (device == "auto" and nvml is not None) else "cpu"


class HardwareReader:
    """Reads every `period_seconds` in a daemon thread, host and processes every `host_seconds`; `latest` is the newest reading.

    `start` and `stop` once each.
    """

    def __init__(
        self,
        *,
        clock: Clock,
        state_dir: Path,
        engine_pid: Callable[[], int | None] = lambda: None,
        nvml: Nvml | None = None,
        period_seconds: float = 1.0,
        host_seconds: float = HOST_SECONDS,
        on_reading: Callable[[HardwareReading], None] = lambda _: None,
    ) -> None:
        """`on_reading` gets each reading as soon as it is there, in the reader's thread."""
        self.latest: HardwareReading | None = None
        self._clock = clock
        self._state_dir = state_dir
        self._engine_pid = engine_pid
        self._nvml = nvml
        self._period = period_seconds
        self._host_seconds = host_seconds
        self._host_read_at = -math.inf
        self._on_reading = on_reading
        self._server = psutil.Process()
        self._engine: psutil.Process | None = None
        self._stopped = threading.Event()
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Take a first reading soon, then go on. Returns at once."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="hardware-reader", daemon=True)
            self._thread.start()

    def stop(self) -> None:
        """End the thread (it is waited for, five seconds at most: a driver call may hang) and let go of the driver."""
        self._stopped.set()
        if self._thread is not None:
            self._thread.join(5.0)
            if self._thread.is_alive():
                return
            self._thread = None
        if self._nvml is not None:
            self._nvml.close()
            self._nvml = None

    def read(self) -> HardwareReading:
        """Take a whole reading now, in this thread, and make it the latest."""
        memory = psutil.virtual_memory()
        at = self._clock.monotonic()
        if self.latest is not None:  # the CPU's share of a thread's first reading is 0: it has nothing to measure from
            self._host_read_at = at
        self.latest = HardwareReading(
            at=at,
            num_cpus=len(os.sched_getaffinity(0)),
            cpu_utilisation=psutil.cpu_percent() / 100,
            memory_used_bytes=memory.total - memory.available,
            memory_bytes=memory.total,
            disk_free_bytes=self._disk_free(),
            server=_read_process(self._server),
            engine=_read_process(self._engine_process()),
            gpus=self._nvml.read(at) if self._nvml is not None else (),
        )
        return self.latest

    def _read_due(self) -> HardwareReading:
        """The same, with host and processes as they were if they were read a moment ago."""
        at, latest = self._clock.monotonic(), self.latest
        same_engine = self._engine_pid() == (self._engine.pid if self._engine is not None else None)
        if latest is None or not same_engine or at - self._host_read_at >= self._host_seconds:
            return self.read()
        self.latest = replace(latest, at=at, gpus=self._nvml.read(at) if self._nvml is not None else ())
        return self.latest

    def _run(self) -> None:
        failed = False
        while not self._stopped.is_set():
            try:
                self._on_reading(self._read_due())
                failed = False
            except Exception:  # a reading that fails must not end the readings
                if not failed:
                    _log.exception("a hardware reading failed")
                failed = True
            self._stopped.wait(self._period)

    def _engine_process(self) -> psutil.Process | None:
        pid = self._engine_pid()
        if self._engine is None or self._engine.pid != pid:
            self._engine = None
            with contextlib.suppress(psutil.Error):  # gone before we looked
                self._engine = psutil.Process(pid) if pid is not None else None
        return self._engine

    def _disk_free(self) -> int | None:
        try:
            return shutil.disk_usage(self._state_dir).free
        except OSError:
            return None


def _read_process(process: psutil.Process | None) -> ProcessReading | None:
    if process is None:
        return None
    try:
        with process.oneshot():
            times = process.cpu_times()
            return ProcessReading(times.user + times.system, process.memory_info().rss, process.num_fds(), process.num_threads())
    except psutil.Error:  # it has ended
        return None

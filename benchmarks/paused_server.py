"""Servers that take turns: `appliance serve` beside another, one of them stopped (SIGSTOP) while the other is measured."""

from __future__ import annotations

import contextlib
import math
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Sequence
from pathlib import Path

import psutil

START_SECONDS = 900.0
IDLE_CPU_SHARE = 0.03  # of a core: an engine at rest beats and polls
ALL_CORES = sorted(os.sched_getaffinity(0))


class PausedServer:
    """A server and its engine process, which run between `resume` and `pause` only. Ready and paused once made; `end` it.

    `name` says which of the servers of `folder` it is; they share the compiled kernels and calibrations in `folder/cache`.
    """

    def __init__(self, name: str, folder: Path, flags: Sequence[str], pin: int = 0) -> None:
        self.name = name
        port = _free_port()
        self.url = f"http://127.0.0.1:{port}"
        cache, state = folder / "cache", folder / name
        cache.mkdir(parents=True, exist_ok=True)
        state.mkdir(exist_ok=True)
        if not (state / "cache").exists():
            (state / "cache").symlink_to(cache.resolve())
        command = [sys.executable, "-m", "appliance.cli", "serve", "--port", str(port), "--state-dir", str(state), "--log-level", "warning", *flags]
        self._log = (folder / f"{name}.log").open("w+b")
        self._process = subprocess.Popen(command, stdout=self._log, stderr=subprocess.STDOUT, preexec_fn=lambda: os.sched_setaffinity(0, ALL_CORES))
        try:
            self._wait_ready()
            server = psutil.Process(self._process.pid)
            self._processes = [server, *server.children()]  # not the compilers that an engine may be running
            if pin:
                self._pin(pin)
            self.pause()
        except BaseException:
            self._process.kill()
            raise

    def pause(self) -> None:
        """Stop it where it is, the server before its engine, so that it cannot take a stopped engine for a hung one."""
        for process in self._processes:
            process.send_signal(signal.SIGSTOP)

    def resume(self) -> None:
        """Let it run again. Timers that were due run at once."""
        for process in reversed(self._processes):
            process.send_signal(signal.SIGCONT)

    def settle(self, seconds: float) -> None:
        """Run until its engine has no idle work left (kernels to compile, forms to calibrate, graphs to capture), for so long at most, then pause."""
        self.resume()
        deadline, used, num_quiet = time.monotonic() + seconds, math.inf, 0
        while num_quiet < 2 and time.monotonic() < deadline:
            before = self.cpu_seconds()[1]
            time.sleep(3.0)
            used = (self.cpu_seconds()[1] - before) / 3.0
            is_quiet = used <= IDLE_CPU_SHARE and not any(engine.children() for engine in self._processes[1:])
            num_quiet = num_quiet + 1 if is_quiet else 0
        if num_quiet < 2:
            print(f"the engine of {self.name} is not at rest after {seconds:.0f} s: {used:.0%} of a core", flush=True)
        self.pause()

    def cpu_seconds(self) -> tuple[float, float]:
        """User and system time so far, to the nanosecond: of the server, and of its engine."""
        server, *engines = (time.clock_gettime(_cpu_clock(process.pid)) for process in self._processes)
        return server, sum(engines)

    def end(self) -> None:
        """Drain and leave; killed if it does not."""
        with contextlib.suppress(psutil.Error):
            self.resume()
        self._process.send_signal(signal.SIGTERM)
        try:
            self._process.wait(60)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._log.close()

    def _wait_ready(self) -> None:
        deadline = time.monotonic() + START_SECONDS
        while time.monotonic() < deadline and self._process.poll() is None:
            with contextlib.suppress(OSError):
                urllib.request.urlopen(self.url + "/ready", timeout=5).close()
                return
            time.sleep(0.2)
        self._log.seek(0)
        raise SystemExit(f"the server {self.name} did not start:\n{self._log.read().decode(errors='replace')[-2000:]}")

    def _pin(self, num_cores: int) -> None:
        """Keep the server and its engine each to `num_cores` cores of their own, with every thread they have and will have."""
        for index, process in enumerate(self._processes[:2]):
            cores = ALL_CORES[index * num_cores : (index + 1) * num_cores]
            for thread in process.threads():
                os.sched_setaffinity(thread.id, cores)


def cores_for_clients(pin: int) -> list[int]:
    """The cores that servers pinned to `pin` cores each leave, or the servers' where there are no others."""
    return (ALL_CORES[2 * pin :] or ALL_CORES[:pin]) if pin else ALL_CORES


def _cpu_clock(pid: int) -> int:
    return ~pid << 3 | 2  # clock_getcpuclockid(3) of Linux: all threads of the process, by the scheduler's account


def _free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])
